"""Two processes do what one does: the same losses, gradients, scores and files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from polytask.engine import checkpoint
from polytask.engine.launch import restarted
from polytask.engine.log import read_log
from polytask.runs import Run
from tests.cli.forks import Fork, Forks

Write = Callable[..., Path]
# small steps of SGD: Adam divides by the size of the gradient, so that where that is nearly zero rounding
# becomes a whole step, and large steps let rounding grow at the kinks of L1 and ReLU
SAME = (
    "optim={type: sgd, lr: 0.002}", "model.adapter.dropout=0", "model.backbone.options.drop_path_rate=0",
    "phases.0.steps=5", "run.max_eval_batches=null",
)  # fmt: skip


def deviation(one: Path, other: Path) -> float:
    """Largest relative difference of any loss, weight or learning rate of any step."""
    logs = [
        [line for line in read_log(run / "metrics.jsonl") if line["kind"] == "step"] for run in (one, other)
    ]
    assert len(logs[0]) == len(logs[1]) > 0
    worst = 0.0
    for mine, theirs in zip(*logs, strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine:
            if key.startswith(("loss/", "weight/", "lr")):
                least = 0.1 if key.startswith("weight/") else 1e-12  # weights are about 1
                worst = max(worst, abs(mine[key] - theirs[key]) / max(abs(theirs[key]), least))
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-3)
    return worst


def scores(run: Path) -> dict[str, Any]:
    return {f"{t}/{m}": v for t, of in Run(run).scores["scores"].items() for m, v in of.items()}


def assert_done(forks: list[Fork]) -> None:
    for fork in forks:
        assert fork.wait() == 0, fork.err


def train_both(
    forks: Forks, file: Path, folder: Path, *more: str, patch: str | None = None
) -> tuple[Path, Path]:
    """The same recipe in one process and in two."""
    one, two = folder / "one", folder / "two"
    assert_done([forks.run("train", file, "--output", one, *more, patch=patch)])
    assert_done(forks.group(2, "train", file, "--output", two, *more, patch=patch))
    return one, two


def assert_same(one: Path, two: Path) -> None:
    assert deviation(one, two) < 1e-5
    assert scores(two) == pytest.approx(scores(one), rel=2e-3, abs=0.05)
    mine, theirs = checkpoint.read(two), checkpoint.read(one)
    assert mine.weights.keys() == theirs.weights.keys()
    for name, value in theirs.weights.items():
        torch.testing.assert_close(mine.weights[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("balancer", ["fixed", pytest.param("uw", marks=pytest.mark.slow)])
def test_replicated(forks: Forks, recipe_file: Write, tmp_path: Path, balancer: str) -> None:
    one, two = train_both(forks, recipe_file(*SAME, f"balancer={balancer}"), tmp_path)
    assert_same(one, two)
    assert Run(one).log[0]["loss/semseg"] - Run(one).log[4]["loss/semseg"] > 0.02  # it did learn
    assert (
        json.loads((two / "cost.json").read_text())["total"]
        == json.loads((one / "cost.json").read_text())["total"]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "parallel"), [("{type: segformer, dropout: 0}", "fsdp"), ("updecoder", "replicated")]
)
def test_decoders_with_trained_scales(
    forks: Forks, recipe_file: Write, tmp_path: Path, head: str, parallel: str
) -> None:
    scales = ("model.adapter.train_scale=true", "model.adapter.train_task_scale=true")
    file = recipe_file(*SAME, *scales, f"model.head={head}")
    one, two = tmp_path / "one", tmp_path / "two"
    assert_done([forks.run("train", file, "--output", one)])
    assert_done(forks.group(2, "train", file, "--output", two, "--set", f"run.parallel={parallel}"))
    assert_same(one, two)


@pytest.mark.parametrize(
    "meta",
    [
        "{type: metasgd, inner: all, lr: 0.05, steps: 2}",
        pytest.param("{type: fomaml, lr: 0.05}", marks=pytest.mark.slow),
        pytest.param("{type: reptile, inner: all, lr: 0.01}", marks=pytest.mark.slow),
    ],
)
def test_meta(forks: Forks, recipe_file: Write, tmp_path: Path, meta: str) -> None:
    actions = "phases.0.actions=[{type: coto, p0: 0.5}]"
    one, two = train_both(forks, recipe_file(*SAME, f"phases.0.meta={meta}", actions), tmp_path)
    assert_same(one, two)


@pytest.mark.parametrize(
    "balancer",
    [
        "upgrad",
        *(
            pytest.param(text, marks=pytest.mark.slow)
            for text in (
                "{type: nash, mode: features}", "{type: nash, mode: 'sketch:50'}", "{type: gn}", "famo",
                "{type: cagrad, mode: 'stale:2', scale_heads: true}", "moco", "db_mtl", "excessmtl", "gsd",
            )
        ),
    ],
)  # fmt: skip
def test_balanced(forks: Forks, recipe_file: Write, tmp_path: Path, balancer: str) -> None:
    hard = ("model.adapter=null",) if "features" in balancer else ()
    same = [change for change in SAME if not (hard and "adapter" in change)]
    file = recipe_file(*hard, *same, f"balancer={balancer}")
    one, two = train_both(forks, file, tmp_path)
    assert deviation(one, two) < 1e-4
    if balancer == "upgrad":
        logs = [Run(run).log[4] for run in (one, two)]
        for key in ("stat/cos/semseg~depth", "stat/norm_ratio"):
            assert logs[1][key] == pytest.approx(logs[0][key], rel=1e-3)


@pytest.mark.slow
def test_balanced_when_sharded(forks: Forks, recipe_file: Write, tmp_path: Path) -> None:
    for balancer in ("upgrad", "{type: nash, mode: features}"):
        file = recipe_file(
            "model.adapter=null", *(c for c in SAME if "adapter" not in c), f"balancer={balancer}"
        )
        one, two = tmp_path / f"one-{balancer[:5]}", tmp_path / f"two-{balancer[:5]}"
        assert_done([forks.run("train", file, "--output", one)])
        sharded = ("--set", "run.parallel=fsdp")
        assert_done(forks.group(2, "train", file, "--output", two, *sharded))
        assert deviation(one, two) < 1e-4
    for balancer, sentence in (
        ("moco", "looks at whole gradients, which sharded parameters do not have"),
        ("{type: nash, mode: 'sketch:9'}", "balancer.mode: sharded parameters allow the modes exact, stale"),
    ):
        file = recipe_file("model.adapter=null", "run.parallel=fsdp", f"balancer={balancer}")
        for fork in forks.group(2, "train", file, "--output", tmp_path / f"x-{balancer[:5]}"):
            assert fork.wait() == 2
            assert sentence in fork.err


def test_scores_that_need_the_whole_split_at_once(forks: Forks, recipe_file: Write, tmp_path: Path) -> None:
    file = recipe_file(
        *SAME, "tasks={semseg: null, scene: {type: embedding, dimension: 4}}", "phases.0.steps=1",
        "phases.0.objective.losses={semseg: 1}", "optim.lr=1e-9", "data.eval_batch_size=6",
    )  # fmt: skip
    one, two = train_both(forks, file, tmp_path)
    mine, theirs = scores(two), scores(one)
    assert 0 < mine["scene/MAP_R"] < mine["scene/recall_1"] < mine["scene/recall_8"]
    assert mine == pytest.approx(theirs, rel=1e-6)


def test_labels_that_only_one_process_has(forks: Forks, recipe_file: Write, tmp_path: Path) -> None:
    file = recipe_file(*SAME, "data.batch_size=4", "phases.0.steps=8")
    one, two = train_both(forks, file, tmp_path, patch="sparse_labels")
    assert deviation(one, two) < 1e-5
    counts = {len([k for k in line if k.startswith("loss/")]) for line in read_log(two / "metrics.jsonl")}
    assert len(counts) > 1  # some batches have no label for some task


@pytest.mark.slow
def test_sharded(forks: Forks, recipe_file: Write, tmp_path: Path) -> None:
    file = recipe_file(*SAME, "run.checkpoint_every=2", "phases.0.epochs=1", "phases.0.steps=null")
    one = tmp_path / "one"
    assert_done([forks.run("train", file, "--output", one)])
    two = tmp_path / "two"
    sharded = ("--set", "run.parallel=fsdp")
    assert_done(forks.group(2, "train", file, "--output", two, *sharded, patch="resharded"))
    assert_same(one, two)
    model = Run(two).model()  # in one process, replicated
    assert not any(type(p).__name__ == "DTensor" for p in model.parameters())
    assert forks.run("eval", two, "--json").wait() == 0
    assert "cost.json" in [p.name for p in two.iterdir()]
    # interrupted and resumed
    three = tmp_path / "three"
    copy = forks.group(2, "train", file, "--output", three, *sharded, patch="stop_after_five")
    assert all(fork.wait() != 0 for fork in copy)
    assert_done(forks.group(2, "train", file, "--output", three, *sharded, "--resume"))
    mine, theirs = checkpoint.read(three), checkpoint.read(two)
    for name, value in theirs.weights.items():
        assert torch.equal(mine.weights[name], value), name


def test_uneven_evaluation_when_sharded(forks: Forks, recipe_file: Write, tmp_path: Path) -> None:
    changes = ("run.parallel=fsdp", "data.eval_batch_size=1", "phases.0.steps=1", "run.max_eval_batches=3")
    assert_done(forks.group(2, "train", recipe_file(*changes), "--output", tmp_path / "three"))
    few = recipe_file(*changes, "run.max_eval_batches=1", name="few.yaml")
    for fork in forks.group(2, "train", few, "--output", tmp_path / "one"):
        assert fork.wait() == 2
        assert "run.eval_split: fewer samples to evaluate than processes" in fork.err


def test_sharding_needs_several_processes(forks: Forks, recipe_file: Write, tmp_path: Path) -> None:
    fork = forks.run("train", recipe_file("run.parallel=fsdp"), "--output", tmp_path / "x")
    assert fork.wait() == 2
    assert "run.parallel: FSDP needs transformer blocks and a process group" in fork.err
    assert not (tmp_path / "x").exists()


def test_order_of_the_data(
    forks: Forks, recipe_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, orders = recipe_file(*SAME), {}
    for size in (1, 2):
        monkeypatch.setattr(forks, "extra", {"ORDER": str(tmp_path / f"order{size}")})
        assert_done(forks.group(size, "train", file, "--output", tmp_path / f"run{size}", patch="note_order"))
        lines = [(tmp_path / f"order{size}.{rank}").read_text().splitlines() for rank in range(size)]
        orders[size] = [" ".join(parts) for parts in zip(*lines, strict=True)]
    assert orders[1] == orders[2]


def test_gradients_travel_in_one_exchange(
    forks: Forks, recipe_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, run = recipe_file(*SAME, "phases.0.steps=1"), tmp_path / "run"
    monkeypatch.setattr(forks, "extra", {"EXCHANGES": str(tmp_path / "sizes")})
    assert_done(forks.group(2, "train", file, "--output", run, patch="note_exchanges"))
    sizes = [int(line) for line in (tmp_path / "sizes").read_text().split()]
    trainable = json.loads((run / "cost.json").read_text())["trainable"]
    gradients = [size for size in sizes if size > trainable / 50]
    assert len(gradients) == 2  # one in each process, of all that got a gradient
    assert trainable * 0.9 < gradients[0] <= trainable


def test_what_the_first_process_refuses_all_refuse(forks: Forks, recipe_file: Write, tmp_path: Path) -> None:
    file, run = recipe_file(*SAME), tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("name: other\n")
    for fork in forks.group(2, "train", file, "--output", run):
        assert fork.wait() == 2
        assert "holds a run already" in fork.err
    for fork in forks.group(2, "train", file, "--output", tmp_path / "x", "--set", "data.batch_size=7"):
        assert fork.wait() == 2
        assert "data.batch_size: the batch cannot be divided among the processes" in fork.err
    for fork in forks.group(2, "train", file, "--output", tmp_path / "y", patch="bad_depth"):
        assert fork.wait() == 5
        assert "the loss of task 'depth' is inf" in fork.err


def test_only_the_first_process_talks(forks: Forks, recipe_file: Write, tmp_path: Path) -> None:
    first, second = forks.group(2, "train", recipe_file(), "--output", tmp_path / "run", "--json")
    assert first.wait() == second.wait() == 0
    assert json.loads(first.out)["run"] == str(tmp_path / "run")
    assert second.out == ""
    assert "warning" not in second.err


@pytest.mark.slow
def test_torchrun(forks: Forks, recipe_file: Write, tmp_path: Path, rooms: Path) -> None:
    file, one, two = recipe_file(*SAME), tmp_path / "one", tmp_path / "two"
    assert_done([forks.run("train", file, "--output", one)])
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "polytask", "train", str(file), "--output", str(two), "--json",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == str(two)
    assert_same(one, two)


@pytest.mark.slow
def test_torchrun_restarts(recipe_file: Write, forks: Forks, tmp_path: Path, rooms: Path) -> None:
    """One of two processes is killed; torchrun starts both again, and they go on from the last checkpoint."""
    file = recipe_file(*SAME, "phases.0.steps=40", "run.checkpoint_every=2")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert_done(forks.group(2, "train", file, "--output", whole))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "--max-restarts", "1", "tests/cli/doomed.py", "train", str(file), "--output", str(killed),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DOOM": "1:5"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr
    mine, theirs = checkpoint.read(killed), checkpoint.read(whole)
    for name, value in theirs.weights.items():
        torch.testing.assert_close(mine.weights[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        monkeypatch.setenv(name, "0")
        assert not restarted()
        monkeypatch.setenv(name, "2")
        assert restarted()
        monkeypatch.delenv(name)
