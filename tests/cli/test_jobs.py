"""Training as a job of a cluster, of which this machine can be one."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from polytask.cli import main
from tests.cli.forks import Forks

Write = Callable[..., Path]
Call = Callable[..., tuple[int, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Exit code and error output of one command line."""

    def run(*words: object) -> tuple[int, str]:
        code = main([*map(str, words)])
        return code, capsys.readouterr().err

    return run


def test_submitting_without_submitit(
    call: Call, recipe_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    code, err = call("train", recipe_file(), "--output", tmp_path / "run", "--slurm", "cluster=local")
    assert code == 2
    assert "--slurm needs submitit; pip install 'polytask[slurm]'" in err


def test_submitting_with_faulty_settings(call: Call, recipe_file: Write, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    job = ("train", recipe_file(), "--output", tmp_path / "run", "--slurm")
    for words, message in {
        ("nonsense",): "settings look like KEY=VALUE",
        ("cluster=local", "bogus=1"): "submitit refuses a parameter",
        ("partition=x",): "there is no such cluster",
        ("cluster=moon",): "--slurm: ",
    }.items():
        code, err = call(*job, *words)
        assert code == 2, err
        assert message in err


@pytest.mark.slow
def test_job_on_this_machine(forks: Forks, call: Call, recipe_file: Write, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    run, local = tmp_path / "run", ("--slurm", "cluster=local", "processes=1")
    fork = forks.run("train", recipe_file(), "--output", run, "--set", "seed=4", "--json", *local)
    assert fork.wait() == 0, fork.err
    job = json.loads(fork.out)["job"]
    result, deadline = run / "slurm" / f"{job}_0_result.pkl", time.monotonic() + 180
    while not result.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert json.loads((run / "scores.json").read_text())["seed"] == 4
    code, err = call("train", recipe_file(), "--output", run, *local)
    assert code == 2
    assert "holds a run already" in err
