"""Runs that survive: killed anywhere and resumed, they end as if nothing had happened."""

from __future__ import annotations

import copy
import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from polytask.engine import checkpoint
from polytask.engine.log import read_log
from polytask.errors import CheckpointError
from polytask.files import dump_yaml, override
from tests.cli.forks import Forks
from tests.conftest import SMALL

Write = Callable[..., Path]
KILLED = -9
TIMES = ("seconds", "cpu_seconds")
CHANGES = (
    "phases=[{steps: 6}, {name: second, steps: 3, actions: [{type: freeze, patterns: [neck.*]}]}]",
    "run.checkpoint_every=1", "data.batch_size=16", "balancer=moco", "tasks=[depth, scene]",
    "model.adapter.dropout=0.1",
)  # fmt: skip


def losses(run: Path) -> list[dict[str, Any]]:
    """Step lines of the log without the times."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_log(run / "metrics.jsonl")]


def assert_same_end(run: Path, reference: Path) -> None:
    """Bit-identical weights, optimizer state, log and scores."""
    for name in ("last", "best"):
        mine, theirs = checkpoint.read(run, name), checkpoint.read(reference, name)
        assert mine.weights.keys() == theirs.weights.keys()
        for key, value in theirs.weights.items():
            assert torch.equal(mine.weights[key], value), key
        assert_equal(_timeless(mine.state), _timeless(theirs.state))
        assert mine.manifest["step"] == theirs.manifest["step"]
    assert losses(run) == losses(reference)
    mine, theirs = (json.loads((folder / "scores.json").read_text()) for folder in (run, reference))
    assert mine["scores"] == theirs["scores"]
    leftovers = sorted(p.name.partition("-")[0] for p in (run / "checkpoints").iterdir())
    assert leftovers == ["best", "best", "last", "last"]


def _timeless(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "position": {k: v for k, v in state["position"].items() if k not in TIMES}}


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


@pytest.fixture(scope="module")
def whole(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The recipe, and an uninterrupted run of it."""
    folder = tmp_path_factory.mktemp("whole")
    file = folder / "recipe.yaml"
    file.write_text(dump_yaml(override(copy.deepcopy(SMALL), CHANGES)))
    fork = forks.run("train", file, "--output", folder / "run")
    assert fork.wait() == 0, fork.err
    return file, folder / "run"


def resume_until_done(forks: Forks, file: Path, run: Path, *more: str) -> None:
    fork = forks.run("train", file, "--output", run, "--resume", *more)
    assert fork.wait() == 0, fork.err


# every place where a kill could leave something half done: (function, which call of it)
PLACES = [
    ("polytask.engine.phase:train_step", 8),
    ("safetensors.torch:save_file", 3),
    ("polytask.engine.checkpoint:_link", 1),
    *(
        pytest.param(*place, marks=pytest.mark.slow)
        for place in (
            ("polytask.engine.phase:train_step", 1),
            ("polytask.engine.phase:train_step", 4),
            ("polytask.engine.phase:train_step", 7),
            ("safetensors.torch:save_file", 1),
            ("torch:save", 4),
            ("polytask.engine.checkpoint:file_hash", 5),
            ("polytask.engine.checkpoint:_seal", 3),
            ("polytask.engine.checkpoint:_sync", 10),
            ("polytask.engine.checkpoint:_link", 4),
            ("polytask.engine.checkpoint:_link", 9),
            ("shutil:rmtree", 2),
            ("polytask.engine.trainer:evaluate", 1),
            ("polytask.engine.trainer:evaluate", 2),
            ("polytask.engine.trainer:write_text", 2),
        )
    ),
]


@pytest.mark.parametrize(("place", "call"), PLACES)
def test_kill_at_a_place(
    forks: Forks, whole: tuple[Path, Path], tmp_path: Path, place: str, call: int
) -> None:
    file, reference = whole
    run = tmp_path / "run"
    assert forks.run("train", file, "--output", run, die=(place, call)).wait() == KILLED
    if (run / "checkpoints" / "last").exists():
        checkpoint.read(run, "last")  # the old one is whole
    resume_until_done(forks, file, run)
    assert_same_end(run, reference)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_kills_at_random_moments(
    forks: Forks, whole: tuple[Path, Path], tmp_path: Path, workers: int
) -> None:
    file, reference = whole
    changed = ("--set", f"data.workers={workers}")
    run, rng, kills = tmp_path / "run", random.Random(workers), 0
    fork = forks.start(["train", str(file), "--output", str(run), *changed])
    while kills < 8:
        moment = time.monotonic() + rng.uniform(0.2, 1.0)
        while fork.running() and time.monotonic() < moment:
            time.sleep(0.005)
        if not fork.running():
            break
        fork.kill()
        assert fork.wait() == KILLED
        kills += 1
        more = ["--resume"] if (run / "recipe.yaml").exists() else []
        fork = forks.start(["train", str(file), "--output", str(run), *changed, *more])
    assert fork.wait() == 0, fork.err
    assert kills >= 2  # how many fit in depends on how busy the machine is
    assert_same_end(run, reference)


def test_complete_run_just_returns_its_scores(forks: Forks, whole: tuple[Path, Path], tmp_path: Path) -> None:
    file, reference = whole
    run = tmp_path / "run"
    shutil.copytree(reference, run, symlinks=True)
    stamps = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != "scores.json"}
    fork = forks.run("train", file, "--output", run, "--resume", "--json")
    assert fork.wait() == 0, fork.err
    assert json.loads(fork.out)["scores"] == json.loads((reference / "scores.json").read_text())["scores"]
    assert {p: p.stat().st_mtime_ns for p in stamps if p.name != "metrics.jsonl"} == {
        p: stamp for p, stamp in stamps.items() if p.name != "metrics.jsonl"
    }
    assert losses(run) == losses(reference)


def test_resuming_another_recipe_is_refused(forks: Forks, whole: tuple[Path, Path], tmp_path: Path) -> None:
    file, reference = whole
    run = tmp_path / "run"
    shutil.copytree(reference, run, symlinks=True)
    fork = forks.run("train", file, "--output", run, "--resume", "--set", "optim.lr=1", "--set", "seed=3")
    assert fork.wait() == 2
    assert "started with another recipe, got 'other values of seed, optim.lr'" in fork.err
    fork = forks.run("train", file, "--output", run)
    assert fork.wait() == 2
    assert "holds a run already; use --resume" in fork.err
    fork = forks.run("train", file, "--output", tmp_path / "nothing", "--resume")
    assert fork.wait() == 4
    assert "no run to resume" in fork.err
    assert not (tmp_path / "nothing").exists()


def test_half_a_line_in_the_log_is_no_trouble(forks: Forks, whole: tuple[Path, Path], tmp_path: Path) -> None:
    file, reference = whole
    run = tmp_path / "run"
    place = ("polytask.engine.phase:train_step", 5)
    assert forks.run("train", file, "--output", run, die=place).wait() == KILLED
    with (run / "metrics.jsonl").open("ab") as log:
        log.write(b'{"kind": "step", "step": 5, "loss/dep\xc3')
    assert [line["step"] for line in read_log(run / "metrics.jsonl")] == [1, 2, 3, 4, 4]
    resume_until_done(forks, file, run)
    assert_same_end(run, reference)


@pytest.mark.parametrize("file", ["weights.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("harm", ["cut", "change", "remove"])
def test_damage_is_noticed_and_the_file_named(
    forks: Forks, whole: tuple[Path, Path], tmp_path: Path, file: str, harm: str
) -> None:
    recipe, reference = whole
    run = tmp_path / "run"
    shutil.copytree(reference, run, symlinks=True)
    target = run / "checkpoints" / "last" / file
    data = target.read_bytes()
    if harm == "remove":
        target.unlink()
    elif harm == "cut":
        target.write_bytes(data[: len(data) // 2])
    else:
        middle = data.index(b'"step": 9') + 8 if file == "manifest.json" else len(data) // 2
        target.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    with pytest.raises(CheckpointError, match=file):
        checkpoint.read(run, "last")
    checkpoint.read(run, "best")
    if harm == "cut":
        fork = forks.run("train", recipe, "--output", run, "--resume")
        assert fork.wait() == 4
        assert file in fork.err


def test_link_to_nothing_is_no_fresh_start(forks: Forks, whole: tuple[Path, Path], tmp_path: Path) -> None:
    file, reference = whole
    run = tmp_path / "run"
    shutil.copytree(reference, run, symlinks=True)
    shutil.rmtree((run / "checkpoints" / "last").resolve())
    fork = forks.run("train", file, "--output", run, "--resume")
    assert fork.wait() == 4
    assert "no such checkpoint" in fork.err
