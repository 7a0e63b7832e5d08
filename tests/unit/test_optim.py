"""Optimizers and schedules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from polytask.errors import ConfigError
from polytask.optim import OptimSpec


@pytest.fixture
def net() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    net[2].requires_grad_(False)
    return net


def rates(spec: OptimSpec, net: nn.Module, steps: int, per_epoch: int = 10, batch: int = 8) -> list[float]:
    optimizer = spec.optimizer(net, [], batch)
    scheduler = spec.scheduler(optimizer, steps, per_epoch, batch)
    found = []
    for step in range(steps):
        if scheduler is not None:
            scheduler.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize(
    ("kind", "cls"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_kinds_and_groups(net: nn.Module, kind: str, cls: type) -> None:
    extra = nn.Parameter(torch.zeros(()))
    optimizer = OptimSpec(type=kind, weight_decay=0.3).optimizer(net, [extra], 8)  # type: ignore[arg-type]
    assert type(optimizer) is cls
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay[id(net[0].weight)] == 0.3  # type: ignore[index]
    for vector in (net[0].bias, net[1].weight, net[1].bias, extra):  # type: ignore[index]
        assert decay[id(vector)] == 0
    assert id(net[2].weight) not in decay  # type: ignore[index]
    assert len(decay) == 5


def test_vectors_may_be_decayed_too(net: nn.Module) -> None:
    extra = nn.Parameter(torch.zeros(()))
    optimizer = OptimSpec(weight_decay=0.3, decay_vectors=True).optimizer(net, [extra], 8)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay.pop(id(extra)) == 0
    assert list(decay.values()) == [0.3] * 4


def test_nothing_trains(net: nn.Module) -> None:
    net.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter of the model trains"):
        OptimSpec().optimizer(net, [], 8)


def test_rate_follows_the_batch_size(net: nn.Module) -> None:
    assert rates(OptimSpec(lr=1.0, lr_per_batch=512, schedule="constant"), net, 1, batch=128) == [0.25]
    assert rates(OptimSpec(lr=1.0, schedule="constant"), net, 1, batch=128) == [1.0]


def test_cosine_with_warmup(net: nn.Module) -> None:
    spec = OptimSpec(lr=1.0, warmup_epochs=0.5, warmup_lr=0.1, min_lr=0.01)
    found = rates(spec, net, 20)
    assert found[:5] == pytest.approx([0.1, 0.28, 0.46, 0.64, 0.82])
    for step in range(5, 20):
        assert found[step] == pytest.approx(0.01 + 0.5 * 0.99 * (1 + math.cos(math.pi * (step - 5) / 15)))


def test_poly(net: nn.Module) -> None:
    found = rates(OptimSpec(lr=1.0, schedule="poly", power=2.0), net, 10)
    assert found == pytest.approx([(1 - step / 10) ** 2 for step in range(10)])


def test_constant(net: nn.Module) -> None:
    assert rates(OptimSpec(lr=0.5, schedule="constant"), net, 4) == [0.5] * 4
    warm = OptimSpec(lr=0.5, schedule="constant", warmup_epochs=0.2)
    assert rates(warm, net, 5) == pytest.approx([0, 0.25, 0.5, 0.5, 0.5])


def test_warmup_longer_than_the_phase(net: nn.Module) -> None:
    assert rates(OptimSpec(lr=1.0, warmup_epochs=100), net, 4) == pytest.approx([0, 0.25, 0.5, 0.75])


@pytest.mark.parametrize(
    "settings", [{"lr": 0}, {"lr": -1}, {"clip_norm": 0}, {"warmup_epochs": -1}, {"type": "lion"}]
)
def test_impossible_settings(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        OptimSpec(**settings)  # type: ignore[arg-type]
