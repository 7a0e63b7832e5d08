"""Counting conflicts between task gradients, layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polytask.adapters.recon import REPORT, Conflicts
from polytask.balancers.recon import BINS, ConflictMeter, ReconSpec
from polytask.config import decode
from polytask.engine import phase
from polytask.engine.step import train_step
from polytask.recipe import Recipe  # noqa: F401 - registers all balancers
from polytask.runs import Run
from polytask.tasks import Depth, TaskSet
from polytask.types import partition
from tests.conftest import Make, train_quietly

TASKS = TaskSet({name: Depth() for name in ("a", "b", "c")})


class Planted(nn.Module):
    """Three layers; tasks agree on four outputs and want opposite values of what layer 2 alone adds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 5), nn.Linear(5, 1), nn.Linear(5, 5)])
        with torch.no_grad():
            self.layers[2].weight.copy_(torch.eye(5))

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        first, second, third = self.layers
        hidden = first(x)
        hidden = torch.cat([hidden[:, :4], second(hidden)], 1)
        common, fought = third(hidden).split([4, 1], 1)
        agreed = (common - 9).square().mean()
        return {"a": agreed + (fought - 1).square().mean(), "b": agreed + (fought + 1).square().mean()}


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 6, generator=generator) for _ in range(count)]


def test_a_planted_conflict_ranks_first() -> None:
    net, meter = Planted(), ConflictMeter(("a", "b"))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for x in batches(20):
        losses = net.losses(x)
        meter.observe(losses, net)
        assert all(p.grad is None for p in net.parameters())
        sum(losses.values()).backward()  # type: ignore[union-attr]  # the graph is still there
        optimizer.step()
        optimizer.zero_grad()
    found = meter.conflicts()
    assert found.tasks == ("a", "b") and found.steps == 20
    assert list(found.ranking()) == ["layers.1", "layers.0", "layers.2"]
    assert found.ranking() == {"layers.1": 20, "layers.0": 0, "layers.2": 0}
    assert [counts[0] for counts in found.layers.values()] == [35, 6, 30]
    assert found.ranking(-0.1)["layers.1"] > 15


class Angles(nn.Module):
    """A layer whose task gradients have chosen angles; a task's own layer; one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.own = nn.Linear(2, 1), nn.Linear(1, 1)
        self.frozen = nn.Linear(1, 1).requires_grad_(False)
        self.around = nn.Module()
        self.around.scale = nn.Parameter(torch.ones(()))  # not all parameters of `around` are its own
        self.around.inner = nn.Linear(1, 1)

    def losses(self, *cosines: float | None) -> dict[str, Tensor]:
        (x, y), bias = self.shared.weight[0], self.shared.bias
        rest = self.around.scale * self.around.inner.weight.sum() + self.frozen.weight.sum()
        turned = {
            f"t{k}": bias.sum() * 0 if c is None else c * x + (1 - c * c) ** 0.5 * y
            for k, c in enumerate(cosines)
        }
        return {"first": x + self.own.weight.sum() + rest, **{k: v + 0 * rest for k, v in turned.items()}}


def test_bins_and_thresholds() -> None:
    net = Angles()
    for cosine in (-1.0, -0.11, -0.03, -0.01, 0.5):
        meter = ConflictMeter(("first", "t0"))
        meter.observe(net.losses(cosine), net)
        for threshold in (0.0, -0.02, -0.1, -0.5):
            assert meter.conflicts().ranking(threshold)["shared"] == (cosine < threshold)
    two = Conflicts(tasks=("a", "b"), steps=1, layers={"x": (1, 4, 0, 8, 0)})
    assert two.ranking(-0.5)["x"] == 4 and two.ranking(0.25)["x"] == 8  # linear between borders


def test_what_counts() -> None:
    net, meter = Angles(), ConflictMeter(("first", "t0", "t1"))
    meter.observe(net.losses(-0.5, None), net)  # one gradient is zero: one pair of three is left
    assert set(meter.conflicts().layers) == {
        "shared"
    }  # neither own nor frozen nor scale, inner is zero for one
    assert sum(meter.conflicts().layers["shared"][1:]) == 1
    meter.observe(net.losses(-0.5, -0.4), net)
    assert sum(meter.conflicts().layers["shared"][1:]) == 4
    meter.observe({"first": net.losses()["first"]}, net)
    meter.observe({k: v * float("nan") for k, v in net.losses(-0.5).items()}, net)
    assert sum(meter.conflicts().layers["shared"][1:]) == 4


def test_every() -> None:
    net, meter = Planted(), ConflictMeter(("a", "b"), every=4)
    for x in batches(9):
        meter.observe(net.losses(x), net)
    assert meter.conflicts().steps == 3
    assert sum(meter.conflicts().layers["layers.0"][1:]) == 3


def test_parameters_by_name() -> None:
    net, meter = Planted(), ConflictMeter(("a", "b"))
    meter.observe(net.losses(batches(1)[0]), {k: p for k, p in net.named_parameters() if "0" in k})
    assert list(meter.conflicts().layers) == ["layers.0"]


@pytest.mark.parametrize("method", ["equal", "uw", "cagrad", "pcgrad", "moco", "famo"])
def test_the_method_does_as_alone(method: str) -> None:
    results = []
    for settings in ({"method": method}, None):
        spec = decode(ReconSpec, settings) if settings else decode(ReconSpec, {"method": method}).method
        balancer, net = spec.build(TASKS), Planted()
        for x in batches(3):
            net.zero_grad()
            weights = balancer.backward(net.losses(x), partition(net, ("a", "b", "c")))
            if balancer.looks_back:
                balancer.after_step(net.losses(x))
        balancer.epoch_end()
        results.append((weights, [p.grad for p in net.parameters()], balancer.stats, balancer.looks_back))
    assert results[0][0] == results[1][0] and results[0][2:] == results[1][2:]
    for mine, alone in zip(results[0][1], results[1][1], strict=True):
        assert mine is not None and torch.equal(mine, alone)  # type: ignore[arg-type]


def test_counts_and_memory_of_the_method_go_into_a_file_and_back() -> None:
    net, spec = Planted(), decode(ReconSpec, {"method": "moco", "every": 2})
    whole: Any = spec.build(TASKS)
    first: Any = spec.build(TASKS)
    for k, x in enumerate(batches(5)):
        whole.backward(net.losses(x), partition(net, tuple(TASKS)))
        if k == 3:
            second: Any = spec.build(TASKS)
            second.load_state_dict(first.state_dict())
            first = second
        first.backward(net.losses(x), partition(net, tuple(TASKS)))
    assert first.conflicts() == whole.conflicts() and whole.conflicts().steps == 3
    state, wanted = first.state_dict(), whole.state_dict()
    assert state.keys() == wanted.keys() and all(torch.equal(state[k], wanted[k]) for k in state)
    assert any(key.startswith("method.memory.") for key in state)


def test_cost_says_what_looking_adds() -> None:
    text = decode(ReconSpec, {"every": 5}).build(TASKS).cost()
    assert text.endswith("; in one of 5 steps, one more per task to measure conflicts")
    assert "; in each step, one more" in decode(ReconSpec, {}).build(TASKS).cost()


@pytest.mark.slow
def test_a_resumed_run_counts_as_one_that_was_not_interrupted(
    small: Make, rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(
        "model.adapter=null",
        "balancer={type: recon, every: 2}",
        "phases=[{steps: 6}]",
        "run.checkpoint_every=1",
    )
    train_quietly(recipe, tmp_path / "whole")
    steps = iter(range(4))

    def dying(*arguments: Any, **options: Any) -> Any:
        next(steps)  # StopIteration in the fifth step
        return train_step(*arguments, **options)

    monkeypatch.setattr(phase, "train_step", dying)
    with pytest.raises(StopIteration):
        train_quietly(recipe, tmp_path / "part")
    monkeypatch.undo()
    train_quietly(recipe, tmp_path / "part", resume=True)
    one, other = ((tmp_path / name / REPORT).read_text() for name in ("whole", "part"))
    assert one == other and decode(Conflicts, json.loads(one)).steps == 3


@pytest.mark.slow
def test_a_run_measures_and_the_next_one_splits(small: Make, rooms: Path, tmp_path: Path) -> None:
    plain = ("model.adapter=null", "tasks=[semseg, depth]", "phases=[{steps: 4}]")
    train_quietly(small(*plain, "balancer={type: recon, method: cagrad}"), tmp_path / "measured")
    found = decode(Conflicts, json.loads((tmp_path / "measured" / REPORT).read_text()))
    assert found.steps == 4 and found.tasks == ("semseg", "depth")
    assert all(len(counts) == BINS + 1 and sum(counts[1:]) <= 4 for counts in found.layers.values())
    net = small(*plain).model.build(small(*plain).task_set(), (32, 48)).backbone.net
    wanted = {
        f"backbone.net.{name}": sum(p.numel() for p in module.parameters())
        for name, module in net.named_modules()
        if list(module.parameters(recurse=False)) and not list(module.children())
    }
    assert {name: counts[0] for name, counts in found.layers.items()} == wanted

    recipe = small(*plain, f"model.adapter={{type: recon, layers: {{run: {tmp_path}/measured, top: 3}}}}")
    names = recipe.model.adapter.layers  # type: ignore[union-attr]
    assert [f"backbone.net.{name}" for name in names] == list(found.ranking())[:3]
    train_quietly(recipe, tmp_path / "split")
    assert not (tmp_path / "split" / REPORT).exists()
    owned = Run(tmp_path / "split").model().partition().per_task["depth"]
    assert {f"backbone.net.{name}.tasks.depth.weight" for name in names} <= set(owned)
