"""Gradients of meta-learning: by hand, against copies that are really changed, and differences."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from polytask.adapters.base import Branch
from polytask.balancers.scalar import FixedSpec
from polytask.config import decode, registered
from polytask.engine import checkpoint, launch
from polytask.engine.step import StepSetup, _twice_differentiable, train_step
from polytask.errors import ConfigError, NonFiniteLossError
from polytask.meta import FOMAML, Learner, Meta, MetaSGD, Reptile
from polytask.model import MultiTaskModel
from polytask.phases import Objective, PhaseSpec
from polytask.recipe import Recipe
from polytask.runs import Run
from polytask.types import PerTask, Sample
from tests.conftest import killed_before, train_quietly
from tests.helpers import TASKS, build, model_spec, shake
from tests.unit.engine.test_step import batch

D = 3
Grads = dict[str, Tensor]


class Vector(Branch):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(values)


class Tiny(nn.Module):
    """``y = X (theta * psi)`` with theta = shared + own of the task; psi is outside the inner steps."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.shared = Vector(torch.randn(D, generator=g, dtype=torch.float64))
        self.own = PerTask({t: Vector(torch.randn(D, generator=g, dtype=torch.float64)) for t in ("a", "b")})
        self.psi = nn.Parameter(torch.randn(D, generator=g, dtype=torch.float64))
        self.data = {
            (t, part): (torch.randn(5, D, generator=g, dtype=torch.float64),
                        torch.randn(5, generator=g, dtype=torch.float64))
            for t in ("a", "b") for part in (0, 1)
        }  # fmt: skip

    def forward(self, task: str, part: int) -> Tensor:
        x, y = self.data[task, part]
        theta: Tensor = self.shared.value + self.own[task].value  # type: ignore[operator,assignment]
        return 0.5 * (x @ (theta * self.psi) - y).square().mean() + 0.25 * theta.pow(4).sum()

    def loss_of(self, task: str, part: int, parameters: Mapping[str, Tensor], *, last: bool) -> Tensor | None:
        assert last == (part == 1)
        loss: Tensor = functional_call(self, dict(parameters), (task, part))
        return loss

    def by_hand(self, task: str, part: int, theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """First derivatives by theta and psi, second ones by theta twice and by theta and psi."""
        (x, y), psi = self.data[task, part], self.psi.detach()
        r, h = x.T @ (x @ (theta * psi) - y) / len(y), x.T @ x / len(y)
        return (
            psi * r + theta**3, theta * r, psi[:, None] * h * psi + 3 * torch.diag(theta**2),
            torch.diag(r) + psi[:, None] * h * theta,
        )  # fmt: skip


def start(tiny: Tiny, task: str) -> Tensor:
    return (tiny.shared.value + tiny.own[task].value).detach()  # type: ignore[operator]


def summed(losses: Mapping[str, Tensor], module: nn.Module) -> Grads:
    torch.stack([*losses.values()]).sum().backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


WEIGHTS = {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize("steps", [1, 3])
def test_first_order_by_hand(steps: int) -> None:
    tiny, lr = Tiny(), 0.05
    learner = FOMAML(steps=steps, lr=lr).build(tiny, ("a", "b"))
    found = summed(learner.losses(tiny.loss_of, WEIGHTS), tiny)
    shared, psi = torch.zeros(2, D, dtype=torch.float64)
    for task, weight in WEIGHTS.items():
        theta = start(tiny, task)
        for _ in range(steps):
            theta = theta - weight * lr * tiny.by_hand(task, 0, theta)[0]
        g, by_psi, _, _ = tiny.by_hand(task, 1, theta)
        torch.testing.assert_close(found[f"own.{task}.value"], g, rtol=1e-12, atol=1e-12)
        shared, psi = shared + g, psi + by_psi
    torch.testing.assert_close(found["shared.value"], shared, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["psi"], psi, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 3])
def test_second_order_by_hand(steps: int) -> None:
    """d theta_K by theta_0, by the step sizes and by psi, one step after the other."""
    tiny = Tiny()
    learner = MetaSGD(steps=steps, lr=0.05).build(tiny, ("a", "b"))
    rates = dict(learner.named_parameters())
    assert list(rates) == ["rates.own/a/value", "rates.own/b/value"]
    shake(learner, 0.02)
    found = summed(learner.losses(tiny.loss_of, WEIGHTS), tiny)
    eye, psi = torch.eye(D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
    for task, weight in WEIGHTS.items():
        theta, alpha = start(tiny, task), weight * rates[f"rates.own/{task}/value"].detach()
        by_start, by_rate, by_psi = eye, 0 * eye, 0 * eye
        for _ in range(steps):
            g, _, h, mixed = tiny.by_hand(task, 0, theta)
            onward = eye - alpha[:, None] * h
            by_rate = onward @ by_rate - weight * torch.diag(g)
            by_psi = onward @ by_psi - alpha[:, None] * mixed
            by_start, theta = onward @ by_start, theta - alpha * g
        g, direct, _, _ = tiny.by_hand(task, 1, theta)
        torch.testing.assert_close(found[f"own.{task}.value"], by_start.T @ g, rtol=1e-11, atol=1e-12)
        rate = rates[f"rates.own/{task}/value"].grad
        torch.testing.assert_close(rate, by_rate.T @ g, rtol=1e-11, atol=1e-12)
        psi = psi + direct + by_psi.T @ g
    torch.testing.assert_close(found["psi"], psi, rtol=1e-11, atol=1e-12)


def test_reptile_by_hand() -> None:
    tiny, lr, before = Tiny(), 0.05, copy.deepcopy(Tiny().state_dict())
    spec = Reptile(steps=2, lr=lr, outer=0.5, inner="all")
    learner = spec.build(tiny, ("a", "b"))
    calls = []

    def loss_of(task: str, part: int, parameters: Mapping[str, Tensor], *, last: bool) -> Tensor:
        calls.append((task, part, last))
        loss: Tensor = functional_call(tiny, dict(parameters), (task, part))
        return loss

    found = summed(learner.losses(loss_of, WEIGHTS), tiny)
    assert calls == [(task, 0, last) for task in "ab" for last in (False, True)]
    assert list(found) == ["psi"]  # what inner steps move gets no gradient, so that no optimizer moves it
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items())
    learner.move()
    ways, psi = {}, torch.zeros(D, dtype=torch.float64)
    for task, weight in WEIGHTS.items():
        own, shared = before[f"own.{task}.value"], before["shared.value"]
        for _ in range(2):
            g, by_psi, _, _ = tiny.by_hand(task, 0, own + shared)
            own, shared = own - weight * lr * g, shared - weight * lr * g
        psi = psi + by_psi
        ways[task] = shared - before["shared.value"]
        after = 0.5 * (before[f"own.{task}.value"] + own)
        torch.testing.assert_close(tiny.state_dict()[f"own.{task}.value"], after)
    torch.testing.assert_close(tiny.shared.value.detach(), before["shared.value"] + 0.25 * sum(ways.values()))
    torch.testing.assert_close(found["psi"], psi)


# --- on a model --------------------------------------------------------------------------------------------


MTLORA = {"type": "mtlora", "rank": 2, "task_rank": 2, "dropout": 0.0}
LORA = {"type": "lora", "rank": 2, "train": ["norm1"]}


def adapted(kind: Mapping[str, Any] = MTLORA, **settings: Any) -> MultiTaskModel:
    model = build(model_spec(adapter={**kind, **settings}, head={"type": "hrnet", "width": 1})).train()
    shake(model, which=lambda name: name.endswith((".B", ".B.weight")))
    return model


def step(model: MultiTaskModel, learner: Learner, data: Sample, **changes: Any) -> Any:
    parameters = [*(p for p in model.parameters() if p.requires_grad), *learner.parameters()]
    defaults: dict[str, Any] = {
        "tasks": TASKS, "balancer": FixedSpec().build(TASKS), "partition": model.partition(),
        "optimizer": torch.optim.SGD(parameters, lr=0.0), "objective": Objective(), "learner": learner,
    }  # fmt: skip
    return train_step(model, data, StepSetup(**defaults | changes))


def half(data: Sample, which: int) -> Sample:
    return {key: value[which::2] for key, value in data.items()}


def in_place(model: MultiTaskModel, data: Sample, lr: float, inner: Literal["tasks", "all"]) -> Grads:
    """First-order gradients by really changing a copy of the model."""
    total: Grads = {}
    for task in TASKS:
        own = copy.deepcopy(model)
        values = [*FOMAML(inner=inner).build(own, (task,)).inner[task].values()]
        support = TASKS.losses(own(half(data, 0)["image"], (task,)).logits, half(data, 0))[task]
        moves = torch.autograd.grad(TASKS[task].weight * support, values, materialize_grads=True)
        for p, g in zip(values, moves, strict=True):
            p.data -= lr * g
        query = TASKS.losses(own(half(data, 1)["image"], (task,)).logits, half(data, 1))[task]
        (TASKS[task].weight * query).backward()
        for name, p in own.named_parameters():
            if p.grad is not None:
                total[name] = total.get(name, 0) + p.grad
    return total


def difference(found: Grads, expected: Grads) -> float:
    return max(float((found[n] - expected[n]).norm() / expected[n].norm().clamp(min=1e-6)) for n in expected)


@pytest.mark.parametrize(
    ("inner", "adapter"),
    [("tasks", MTLORA), ("all", MTLORA), ("tasks", LORA | {"per_task": True}), ("all", LORA)],
)
def test_first_order_is_that_of_a_changed_copy(
    inner: Literal["tasks", "all"], adapter: dict[str, Any]
) -> None:
    model, data, lr = adapted(adapter), batch(4), 0.05
    log = step(model, FOMAML(lr=lr, inner=inner).build(model, tuple(TASKS)), data)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = in_place(model, data, lr, inner)
    assert found.keys() == expected.keys()
    assert {name.partition(".")[0] for name in found} == {"backbone", "neck", "heads"}
    assert list(log.losses) == list(TASKS)
    assert difference(found, expected) < 1e-3
    assert difference(in_place(model, data, 0.0, inner), expected) > 0.01  # the inner steps do count


class Factors(Branch):
    """``B A x`` whose graph holds the parameters themselves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.A = nn.Parameter(torch.randn(2, 6, dtype=torch.float64))
        self.B = nn.Parameter(torch.randn(5, 2, dtype=torch.float64))

    def loss(self, half: int) -> Tensor:
        g = torch.Generator().manual_seed(half)
        x, y = (torch.randn(9, n, generator=g, dtype=torch.float64) for n in (6, 5))
        return nn.functional.mse_loss(nn.functional.linear(nn.functional.linear(x, self.A), self.B), y)


@pytest.mark.parametrize("restored", [False, True])
def test_values_restored_before_the_backward_pass_would_be_wrong(restored: bool) -> None:
    """As in a fork of the official code: the graph then reads the restored B when it makes dA."""
    own = Factors()
    changed = copy.deepcopy(own)
    moves = torch.autograd.grad(changed.loss(0), [*changed.parameters()])
    for p, g in zip(changed.parameters(), moves, strict=True):
        p.data -= 0.1 * g
    query = changed.loss(1)
    if restored:
        for p, value in zip(changed.parameters(), own.parameters(), strict=True):
            p.data.copy_(value.detach())
    query.backward()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tasks = PerTask({"a": own})

        def forward(self, part: int) -> Tensor:
            return own.loss(part)

    net = Net()
    learner = FOMAML(lr=0.1).build(net, ("a",))

    def loss_of(_: str, part: int, parameters: Mapping[str, Tensor], **__: bool) -> Tensor:
        loss: Tensor = functional_call(net, dict(parameters), (part,))
        return loss

    learner.losses(loss_of, {"a": 1.0})["a"].backward()  # type: ignore[arg-type]
    gaps = [float((p.grad - q.grad).norm() / q.grad.norm())  # type: ignore[operator,union-attr]
            for p, q in zip(own.parameters(), changed.parameters(), strict=True)]  # fmt: skip
    assert gaps[1] < 1e-12
    assert gaps[0] > 0.05 if restored else gaps[0] < 1e-12


def test_nothing_is_changed_but_by_the_optimizer() -> None:
    model, data = adapted(), batch(4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for spec in (FOMAML(steps=2), MetaSGD(steps=2, inner="all")):
        step(model, spec.build(model, tuple(TASKS)), data)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not model.backbone.streams.plain


@pytest.mark.parametrize("inner", ["tasks", "all"])
def test_second_order_against_differences(inner: Literal["tasks", "all"]) -> None:
    """Without kinks, whose derivatives no backward pass sees."""
    model, data, tasks = adapted().double(), batch(4), ("semseg",)
    for name in [name for name, m in model.named_modules() if isinstance(m, nn.ReLU)]:
        model.set_submodule(name, nn.Softplus())
    data = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in data.items()}
    learner = MetaSGD(lr=0.03, inner=inner).build(model, tasks).double()

    def loss_of(task: str, part: int, parameters: Mapping[str, Tensor], *, last: bool) -> Tensor | None:
        output = functional_call(model, dict(parameters), (half(data, part)["image"], (task,)))
        return TASKS.losses(output.logits, half(data, part)).get(task)

    def value() -> Tensor:
        with _twice_differentiable(model):
            return learner.losses(loss_of, {"semseg": 1.0})["semseg"]

    model.eval()  # batch norms that do not depend on the order of passes
    value().backward()
    for module, which in ((model, ".A"), (model, "heads"), (model, "norm1.weight"), (learner, "rates")):
        some = {n: p for n, p in module.named_parameters() if which in n and p.grad is not None}
        assert some
        torch.manual_seed(1)
        ways = {name: torch.randn_like(p) for name, p in some.items()}
        slope = sum(float((p.grad * ways[name]).sum()) for name, p in some.items())  # type: ignore[operator]
        ends = []
        for sign in (1, -2):
            for name, p in some.items():
                p.data += sign * 1e-5 * ways[name]
            ends.append(value().item())
        for name, p in some.items():
            p.data += 1e-5 * ways[name]
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope, rel=2e-4), which


def test_step_sizes_are_not_decayed_and_learn() -> None:
    model, data = adapted(), batch(4)
    learner = MetaSGD(lr=0.01).build(model, tuple(TASKS))
    optimizer = decode(Recipe.model_fields["optim"].annotation, {"lr": 1e-3}).optimizer(  # type: ignore[arg-type,union-attr]
        model, list(learner.parameters()), 4
    )
    groups = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {groups[id(p)] for p in learner.parameters()} == {0.0}
    log = step(model, learner, data, optimizer=optimizer)
    assert any((rate != 0.01).any() for rate in learner.parameters())
    assert log.stats["step_size"] == pytest.approx(0.01, abs=1e-3)
    assert learner.state_dict().keys() == dict(learner.named_parameters()).keys()


def test_reptile_moves_branches_and_the_optimizer_the_rest() -> None:
    model, data = adapted(), batch(2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learner = Reptile(lr=0.01).build(model, tuple(TASKS))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=1.0)
    step(model, learner, data, optimizer=optimizer)
    moved = {n: p for inner in learner.inner.values() for n, p in inner.items()}
    assert all(p.grad is None and p not in optimizer.state for p in moved.values())
    assert any(not torch.equal(p, before[name]) for name, p in moved.items())
    assert not torch.equal(model.heads["depth"][0].weight, before["heads.depth.0.weight"])  # type: ignore[index]


def test_task_without_labels_is_left_out() -> None:
    model, data = adapted(), batch(4)
    data["semseg"] = torch.full_like(data["semseg"], 255)
    for spec in (FOMAML(), Reptile()):
        log = step(model, spec.build(model, tuple(TASKS)), data)
        assert list(log.losses) == ["normals", "depth"]
    data = batch(4)
    data["semseg"][::2] = 255  # none in the half for inner steps: the loss is that of the values as they are
    log = step(model, FOMAML(lr=10.0).build(model, ("semseg",)), data)
    plain = TASKS.losses(model(half(data, 1)["image"], ("semseg",)).logits, half(data, 1))
    assert log.losses["semseg"] == pytest.approx(float(plain["semseg"].detach()), rel=1e-5)


@pytest.mark.parametrize("kind", ["fixed", "uw", "pcgrad"])
def test_any_balancer_sees_the_tasks(kind: str) -> None:
    model, data = adapted(), batch(4)
    balancer = decode(registered("balancer")[kind], {}).build(TASKS)  # type: ignore[attr-defined]
    log = step(model, FOMAML().build(model, tuple(TASKS)), data, balancer=balancer)
    assert list(log.weights) == list(TASKS)
    assert log.gradient_norm > 0


@pytest.mark.filterwarnings("ignore::polytask.errors.PolytaskWarning")
def test_refused(small: Callable[..., Recipe]) -> None:
    model = adapted()
    with pytest.raises(ConfigError, match="a step needs 2 independent batches"):
        step(model, FOMAML().build(model, tuple(TASKS)), batch(1))
    with pytest.raises(NonFiniteLossError, match="inner steps of task 'semseg' are not finite"):
        step(model, Reptile(lr=1e38).build(model, ("semseg",)), batch(2))
    plain = build(model_spec())
    shared = adapted(mode="lora_only")
    for spec in (FOMAML(), MetaSGD(), Reptile()):
        for other in (plain, shared):
            with pytest.raises(ConfigError, match="no branch of an adapter that task 'semseg' could adapt"):
                spec.build(other, tuple(TASKS))
    assert FOMAML(inner="all").build(shared, tuple(TASKS)).inner["semseg"]
    with pytest.raises(ConfigError, match="steps know no penalties"):
        decode(PhaseSpec, {"epochs": 1, "meta": "fomaml", "objective": {"penalties": {"kl": 1.0}}})
    for changes, match in (
        (("balancer=famo",), "balancer 'famo'"), (("balancer=modo",), "balancer 'modo'"),
        (("balancer={type: mgda, mode: features}",), "mode features"),
        (("balancer={type: recon, method: {type: mgda, mode: last_layer}}",), "mode last_layer"),
        (("model.adapter=null",), "model.adapter is null"),
        (("model.backbone.recompute=[0]",), "leave out model.backbone.recompute"),
        (("run.parallel=fsdp",), "run.parallel=replicated"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"phases.0.meta: .*{match}"):
            small("phases.0.meta=fomaml", *changes)


def test_registered() -> None:
    kinds: Mapping[str, Any] = registered("meta")
    assert {"fomaml", "metasgd", "reptile"} <= set(kinds)
    phase = decode(PhaseSpec, {"epochs": 1, "meta": {"type": "meta_sgd", "lr": 0.1}})
    assert isinstance(phase.meta, Meta)
    assert phase.meta == MetaSGD(lr=0.1)


# --- in a run ----------------------------------------------------------------------------------------------

PHASES = (
    "phases=[{steps: 2}, {name: meta, steps: 4, meta: {type: metasgd, inner: all, lr: 0.01}}, "
    "{name: reptile, steps: 2, meta: {type: reptile, steps: 2}}]",
    "run.checkpoint_every=1", "data.batch_size=8", "model.adapter.dropout=0.1",
)  # fmt: skip


@pytest.mark.parametrize("killed_at", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 6, 7))])
def test_resumed_run_ends_the_same(
    small: Callable[..., Recipe], rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    recipe = small(*PHASES)
    monkeypatch.setattr(launch, "_measure", lambda _: _NoCost())
    train_quietly(recipe, tmp_path / "whole")
    with killed_before(killed_at):
        train_quietly(recipe, tmp_path / "run")
    sizes = checkpoint.read(tmp_path / "run").state["meta"]
    assert bool(sizes) == (2 < killed_at < 7)
    assert not sizes or any((size != 0.01).any() for size in sizes.values())
    train_quietly(recipe, tmp_path / "run", resume=True)
    one, other = (checkpoint.read(tmp_path / name) for name in ("whole", "run"))
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    logs = [[{k: v for k, v in line.items() if "seconds" not in k} for line in Run(tmp_path / name).log]
            for name in ("whole", "run")]  # fmt: skip
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0] if "stat/step_size" in line] == [3, 4, 5, 6]


class _NoCost:
    def as_dict(self) -> dict[str, Any]:
        return {}


def test_refused_before_anything_is_written(
    small: Callable[..., Recipe], rooms: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no branch of an adapter that task 'semseg'"):
        train_quietly(small("phases.0.meta=fomaml", "model.adapter.mode=lora_only"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
