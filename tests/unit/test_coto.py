"""Progressive activation: draws, what a branch that is off computes, and that nothing moves it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from polytask.adapters.mtlora import TaskLinear
from polytask.engine.phase import PhaseRun
from polytask.errors import ConfigError
from polytask.model import MultiTaskModel
from polytask.phases import CoTo, shared_branches
from polytask.recipe import Recipe
from polytask.runs import Run
from polytask.types import materialize
from tests.conftest import killed_before, train_quietly
from tests.helpers import MERGED_SWIN, build, gap, image, model_spec, shake
from tests.unit.adapters.test_lowrank import layer

Make = Callable[..., Recipe]


def adapted(**settings: Any) -> MultiTaskModel:
    adapter = {"type": "mtlora", "rank": 2, "task_rank": 2, "dropout": 0.0, **settings}
    model = build(model_spec(adapter=adapter)).train()
    shake(model, which=lambda name: name.endswith(".B"))
    return model


def pattern(model: nn.Module) -> list[bool]:
    return [branch.on for branch in shared_branches(model)]


def test_draws_follow_the_schedule_and_nothing_else() -> None:
    model, action = adapted(), CoTo(p0=0.2, p1=0.8, rho=0.5)
    seen = []
    for step in (0, 3, 7):
        shares = []
        for seed in range(60):
            action.before_step(model, step, 10, seed)
            shares.append(sum(pattern(model)) / len(pattern(model)))
        seen.append(sum(shares) / len(shares))
    assert seen == pytest.approx([0.2, 0.2 + 0.6 * 3 / 5, 0.8], abs=0.03)
    action.before_step(model, 3, 10, 1)
    first = pattern(model)
    torch.manual_seed(99)  # no generator but its own
    action.before_step(model, 4, 10, 1)
    other = pattern(model)
    action.before_step(model, 3, 10, 1)
    assert pattern(model) == first != other
    action.leave(model)
    assert all(pattern(model))


def test_one_is_always_on() -> None:
    model = adapted()
    chosen = set()
    for seed in range(40):
        CoTo().before_step(model, 0, 10, seed)
        assert sum(pattern(model)) == 1
        chosen.add(pattern(model).index(True))
    assert len(chosen) > 5
    CoTo().before_step(model, math.ceil(0.75 * 10), 10, 0)
    assert all(pattern(model))


def test_branches_of_tasks_are_not_among_them() -> None:
    model = adapted(layers=["qkv", "proj", "fc1", "fc2", "reduction"])
    layers = [m for m in model.modules() if isinstance(m, TaskLinear)]
    assert [id(b) for b in shared_branches(model)] == [id(m.shared) for m in layers]
    mixed = adapted(mode="addition")  # layers with tasks have no shared branch in this mode
    assert 0 < len(shared_branches(mixed)) < sum(isinstance(m, TaskLinear) for m in mixed.modules())


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("mode", ["matrix", "matrixv2"])
def test_a_layer_without_its_shared_branch(mode: str, narrow: bool) -> None:
    made = layer(mode=mode, narrow=narrow).train()
    plain = layer(mode=mode, narrow=narrow).train()
    plain.load_state_dict(made.state_dict())
    assert made.shared is not None
    assert plain.shared is not None
    nn.init.zeros_(plain.shared.B)
    x = torch.randn(2 if narrow else 6, 7, 6, dtype=torch.float64)
    everything = made.eval()(x)
    made.train().shared.on = False  # type: ignore[union-attr]
    for run in (made._fused, made._composed):
        y = run(x, ["a", "b"])
        torch.testing.assert_close(y, plain._composed(x, ["a", "b"]))
        y.square().sum().backward()
        assert made.shared.A.grad is made.shared.B.grad is None
        assert made.tasks["a"].A.grad is not None
    assert torch.equal(made.eval()(x), everything)  # evaluation uses all
    without_tasks = made.train()._fused(x[:2], [])
    torch.testing.assert_close(without_tasks, made.base(x[:2]))


def test_the_map_between_stages_takes_part() -> None:
    model = adapted(layers=["reduction"])
    on = model(image()).logits
    for branch in shared_branches(model):
        branch.on = False
    off = model(image()).logits
    for branch in shared_branches(model):
        nn.init.zeros_(branch.B)  # type: ignore[arg-type]
        branch.on = True
    assert gap(on, off) > 1e-3
    assert gap(model(image()).logits, off) < 1e-5


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_branches_of_plain_lora_take_part(dropout: float) -> None:
    settings = {"type": "lora", "rank": 2, "layers": ["qkv", "fc1", "reduction"], "dropout": dropout}
    model, plain = (build(model_spec(MERGED_SWIN, adapter=settings)).train() for _ in range(2))
    plain.load_state_dict(model.state_dict())  # B is zero
    shake(model, which=lambda name: name.endswith(".B.weight"))
    everything = [materialize(x) for x in model.eval().backbone(image(), model.tasks).shared]
    for branch in shared_branches(model.train()):
        branch.on = False
    logits = model(image()).logits
    assert gap(logits, plain(image()).logits) < 1e-5
    sum(x.square().sum() for x in logits.values()).backward()
    assert not any(p.grad is not None for n, p in model.named_parameters() if ".branch." in n)
    again = [materialize(x) for x in model.eval().backbone(image(), model.tasks).shared]
    assert gap(again, everything) == 0
    CoTo().check(model)


def test_needs_shared_branches() -> None:
    of_tasks = {"type": "lora", "rank": 2, "per_task": True}
    with pytest.raises(ConfigError, match="no shared branches"):
        CoTo().check(build(model_spec(adapter=of_tasks)))
    with pytest.raises(ConfigError, match="no shared branches"):
        CoTo().check(build(model_spec()))


COTO = ("phases=[{steps: 4, actions: [{type: coto, rho: 1.0}]}]", "run.checkpoint_every=1")


def test_what_is_off_does_not_move(
    small: Make, rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[tuple[list[bool], list[bool]]] = []
    step = PhaseRun._step

    def watched(self: PhaseRun, batch: Any) -> None:
        branches = shared_branches(self.model)
        before = [branch.A.detach().clone() for branch in branches]  # type: ignore[operator]
        step(self, batch)
        differ = [not torch.equal(b.A, a) for b, a in zip(branches, before, strict=True)]  # type: ignore[arg-type]
        moved.append((pattern(self.model), differ))

    monkeypatch.setattr(PhaseRun, "_step", watched)
    train_quietly(small(*COTO, "model.adapter.mode=matrixv2", "optim.weight_decay=0.1"), tmp_path / "run")
    assert sum(moved[0][0]) == 1
    assert len({tuple(on) for on, _ in moved}) == 4
    for on, differ in moved:
        assert not any(d and not o for o, d in zip(on, differ, strict=True))
    assert any(any(differ) for _, differ in moved[1:])


def test_resumed_run_draws_the_same(small: Make, rooms: Path, tmp_path: Path) -> None:
    recipe = small(*COTO)
    train_quietly(recipe, tmp_path / "whole")
    with killed_before(2):
        train_quietly(recipe, tmp_path / "run")
    train_quietly(recipe, tmp_path / "run", resume=True)
    one, other = (Run(tmp_path / name).model().state_dict() for name in ("whole", "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)
