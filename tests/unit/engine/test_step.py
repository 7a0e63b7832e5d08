"""One training step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polytask.balancers.base import PATIENCE, Balancer, BalancerSpec
from polytask.balancers.scalar import EqualSpec, UncertaintySpec
from polytask.config import decode, registered
from polytask.engine.step import StepLog, StepSetup, train_step
from polytask.errors import ConfigError, NonFiniteLossError
from polytask.model import MultiTaskModel
from polytask.phases import Objective
from polytask.types import Drainable, Sample
from tests.helpers import TASKS, build, image, model_spec

SIZE = (64, 64)


def batch(n: int = 2, seed: int = 0) -> Sample:
    g = torch.Generator().manual_seed(seed)
    normals = nn.functional.normalize(torch.randn(n, 3, *SIZE, generator=g), dim=1)
    return {
        "image": image(n),
        "semseg": torch.randint(0, 3, (n, 1, *SIZE), generator=g),
        "normals": normals,
        "depth": 1 + torch.rand(n, 1, *SIZE, generator=g),
        "id": [f"picture{i}" for i in range(n)],
    }


@pytest.fixture
def model() -> MultiTaskModel:
    return build(model_spec(adapter={"type": "mtlora", "rank": 2, "task_rank": 2, "dropout": 0.0})).train()


def step(model: MultiTaskModel, data: Sample, where: str = "here", **changes: Any) -> StepLog:
    defaults: dict[str, Any] = {
        "tasks": TASKS,
        "balancer": EqualSpec().build(TASKS),
        "optimizer": torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01),
        "objective": Objective(),
        "partition": model.partition(),
    }
    return train_step(model, data, StepSetup(**defaults | changes), where)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_step_moves_what_trains_and_nothing_else(model: MultiTaskModel) -> None:
    before, data = weights(model), batch()
    kept = {k: v.clone() for k, v in data.items() if isinstance(v, Tensor)}
    log = step(model, data)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name]), name
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(torch.equal(data[k], v) for k, v in kept.items())  # the batch is read, never written
    assert list(log.losses) == list(TASKS)
    assert log.weights == dict.fromkeys(TASKS, 1.0)
    assert log.gradient_norm > 0


def test_gradient_is_that_of_the_sum(model: MultiTaskModel) -> None:
    data = batch()
    step(model, data, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    mine = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.load_state_dict(model.state_dict())
    losses = TASKS.losses(model(data["image"]).logits, data)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(mine[name], parameter.grad, msg=name)


def test_clip(model: MultiTaskModel) -> None:
    log = step(model, batch(), clip_norm=0.1, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    clipped = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert log.gradient_norm > 0.1
    assert float(clipped) == pytest.approx(0.1, rel=1e-4)


def test_task_without_valid_labels_is_left_out(model: MultiTaskModel) -> None:
    data = batch()
    data["semseg"] = torch.full_like(data["semseg"], 255)
    before = weights(model)
    log = step(model, data)
    assert list(log.losses) == ["normals", "depth"]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert not any(".semseg." in name for name in changed)
    assert any(name.startswith("heads.depth") for name in changed)


def test_batch_without_any_label_takes_no_step(model: MultiTaskModel) -> None:
    data = batch()
    data["semseg"] = torch.full_like(data["semseg"], 255)
    data["normals"], data["depth"] = torch.zeros_like(data["normals"]), torch.zeros_like(data["depth"])
    before = weights(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    log = step(model, data, optimizer=optimizer, clip_norm=1.0)
    assert log.losses == {}
    assert log.weights == {}
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert optimizer.state_dict()["state"] == {}


def test_non_finite_loss_names_task_place_and_samples(model: MultiTaskModel) -> None:
    data, before = batch(), weights(model)
    data["depth"][1] = float("inf")
    with pytest.raises(NonFiniteLossError) as caught:
        step(model, data, where="phase 'warm up', step 7")
    text = str(caught.value)
    for part in (
        "task 'depth' is inf",
        "phase 'warm up', step 7",
        "picture0, picture1",
        "last checkpoint (action `load`), which is intact",
    ):
        assert part in text
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_many_samples_are_abbreviated(model: MultiTaskModel) -> None:
    data = batch(10)
    data["image"][0] = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"samples picture0, .*picture7 …"):
        step(model, data)


def test_non_finite_gradient_names_its_parameter(model: MultiTaskModel) -> None:
    before = weights(model)
    weight = model.heads["depth"][-1].weight  # type: ignore[index,union-attr]
    handle = weight.register_hook(lambda g: g * float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"gradient of heads\.depth\.3\.weight is not finite"):
        step(model, batch(), clip_norm=1.0)
    handle.remove()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_objective_scales_and_selects(model: MultiTaskModel) -> None:
    data, options = batch(), {"optimizer": torch.optim.SGD(model.parameters(), lr=0.0)}
    step(model, data, objective=Objective(losses={"depth": 1.0}), **options)
    once = model.heads["depth"][-1].weight.grad.clone()  # type: ignore[index,union-attr]
    assert model.heads["semseg"][-1].weight.grad is None  # type: ignore[index,union-attr]
    log = step(model, data, objective=Objective(losses={"depth": 3.0}), **options)
    torch.testing.assert_close(model.heads["depth"][-1].weight.grad, 3 * once)  # type: ignore[index,union-attr]
    assert set(log.losses) == set(TASKS)  # all are logged, unscaled
    assert log.weights == {"depth": 1.0}


class Noisy(Drainable):
    """Records a penalty and a statistic."""

    def __init__(self, inner: nn.Module, knob: nn.Parameter) -> None:
        super().__init__()
        self.inner, self.knob = inner, knob

    def forward(self, pyramids: Any, tasks: Any) -> Mapping[str, Tensor]:
        self.recorded_penalties["budget"] = (self.knob**2).sum()
        self.recorded_stats["kept"] = self.knob.detach().mean()
        return self.inner(pyramids, tasks)  # type: ignore[no-any-return]


def test_penalties_add_to_the_gradient_and_are_not_balanced(model: MultiTaskModel) -> None:
    knob = nn.Parameter(torch.tensor([2.0]))
    model.neck = Noisy(model.neck, knob)
    for factor, balancer in ((0.5, EqualSpec().build(TASKS)), (2.0, UncertaintySpec().build(TASKS))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        objective = Objective(penalties={"budget": factor})
        log = step(model, batch(), objective=objective, optimizer=optimizer, balancer=balancer)
        assert knob.grad is not None
        assert float(knob.grad) == pytest.approx(2 * 2.0 * factor)
        assert log.penalties == {"budget": pytest.approx(4 * factor)}
        assert log.stats == {"kept": 2.0}
    only = Objective(losses={}, penalties={"budget": 1.0})
    log = step(model, batch(), objective=only, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    assert log.weights == {}
    assert model.heads["depth"][-1].weight.grad is None  # type: ignore[index,union-attr]
    with pytest.raises(ConfigError, match=r"emits penalty 'budgte'.*did you mean 'budget'"):
        step(model, batch(), objective=Objective(penalties={"budgte": 1.0}))


@pytest.mark.parametrize("adapted", [False, True])
def test_bf16_keeps_parameters_and_losses_in_float32(model: MultiTaskModel, adapted: bool) -> None:
    model = model if adapted else build(model_spec()).train()
    log = step(model, batch(), bf16=True)
    exact = TASKS.losses(model(batch()["image"]).logits, batch())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert log.losses["semseg"] == pytest.approx(float(exact["semseg"].detach()), rel=0.1)


def test_loss_falls(model: MultiTaskModel) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    logs = [step(model, batch(), optimizer=optimizer) for _ in range(20)]
    assert sum(logs[-1].losses.values()) < 0.9 * sum(logs[0].losses.values())


def make(name: str, **settings: Any) -> Balancer:
    spec = decode(registered("balancer")[name], settings)
    assert isinstance(spec, BalancerSpec)
    return spec.build(TASKS)


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


def test_task_whose_loss_is_not_finite_may_sit_out(model: MultiTaskModel) -> None:
    good, bad = batch(), batch()
    bad["depth"][1] = float("inf")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for name in ("equal", "cagrad", "db_mtl"):
        options: dict[str, Any] = {"balancer": make(name, nonfinite="skip"), "optimizer": optimizer}
        log = step(model, bad, **options)
        assert list(log.weights) == ["semseg", "normals"]
        assert log.losses["depth"] == float("inf")
        assert model.heads["depth"][-1].weight.grad is None  # type: ignore[index,union-attr]
        for _ in range(PATIENCE - 2):
            step(model, bad, **options)
        with pytest.raises(NonFiniteLossError, match="task 'depth' is inf"):
            step(model, bad, **options)
        assert list(step(model, good, **options).weights) == list(TASKS)
        assert list(step(model, bad, **options).weights) == ["semseg", "normals"]


def test_gradient_of_one_task_names_place_and_samples(model: MultiTaskModel) -> None:
    forward = model.heads["depth"].forward

    def broken(x: Tensor) -> Tensor:
        y = x.clone()
        y.register_hook(lambda g: g * float("nan"))
        return forward(y)  # type: ignore[no-any-return]

    model.heads["depth"].forward = broken  # type: ignore[method-assign,assignment]
    with pytest.raises(NonFiniteLossError, match=r"step 9: the gradient of task 'depth'.*picture0"):
        step(model, batch(), "step 9", balancer=make("cagrad"))


def test_losses_after_the_update(model: MultiTaskModel) -> None:
    """The same batch, dropout and statistics; nothing else notices."""
    model = build(model_spec(adapter={"type": "mtlora", "rank": 2, "task_rank": 2, "dropout": 0.5})).train()
    before, seen = buffers(model), []
    balancer = make("famo")
    after = balancer.after_step
    balancer.after_step = lambda losses: (seen.append(losses), after(losses))[1]  # type: ignore[method-assign,func-returns-value]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    torch.manual_seed(3)
    log = step(model, batch(), balancer=balancer, optimizer=optimizer)
    drawn = torch.rand(1)
    assert {name: float(loss) for name, loss in seen[0].items()} == pytest.approx(log.losses, rel=1e-6)
    assert not any(loss.requires_grad for loss in seen[0].values())
    changed = buffers(model)
    for name, value in model.named_buffers():
        value.copy_(before[name])
    torch.manual_seed(3)
    step(model, batch(), optimizer=optimizer)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(value, changed[name]) for name, value in buffers(model).items())


def test_several_batches_in_one(model: MultiTaskModel) -> None:
    log = step(model, batch(6), balancer=make("modo"))
    assert list(log.weights) == list(TASKS)
    assert "conflict" in log.stats
    with pytest.raises(ConfigError, match=r"needs 3 independent batches.* got '2 samples"):
        step(model, batch(2), balancer=make("modo"))


def test_cheap_modes_in_a_model() -> None:
    model = build(model_spec()).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    exact = step(model, batch(), balancer=make("gn", mode="exact"), optimizer=optimizer)
    cheap = step(model, batch(), balancer=make("gn", mode="features"), optimizer=optimizer)
    assert cheap.weights == exact.weights  # of the first step
    assert cheap.gradient_norm == pytest.approx(exact.gradient_norm, rel=1e-4)
