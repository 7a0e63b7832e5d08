"""What every registered balancer promises."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polytask.balancers.base import Balancer, BalancerSpec
from polytask.balancers.scalar import FixedSpec, UncertaintySpec
from polytask.config import decode, encode, registered
from polytask.recipe import Recipe  # noqa: F401 - registers all balancers
from polytask.tasks import Depth, TaskSet
from polytask.types import Partition, PerTask, partition

NAMES = ("a", "b", "c")
TASKS = TaskSet({name: Depth(weight=weight) for name, weight in zip(NAMES, (1.0, 2.0, 0.5), strict=True)})
KINDS = sorted(registered("balancer"))


class Net(nn.Module):
    """A shared layer and one head per task."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 5)
        self.heads = PerTask({name: nn.Linear(5, 1) for name in NAMES})
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.shared(x))
        return {name: head(hidden).square().mean() for name, head in self.heads.items()}

    def partition(self) -> Partition:
        return partition(self, NAMES)


def make(kind: str, tasks: TaskSet = TASKS) -> Balancer:
    spec = decode(registered("balancer")[kind], {})
    assert isinstance(spec, BalancerSpec)
    return spec.build(tasks)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def gradients(net: Net) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
class TestEvery:
    def test_spec_round_trip(self, kind: str) -> None:
        spec = decode(registered("balancer")[kind], {})
        assert decode(type(spec), encode(spec)) == spec

    def test_writes_finite_gradients_of_all_that_trains(self, kind: str, net: Net, x: Tensor) -> None:
        weights = make(kind).backward(net.losses(x), net.partition())
        assert list(weights) == list(NAMES)
        assert all(isinstance(w, float) for w in weights.values())
        for name, gradient in gradients(net).items():
            assert (gradient is None) == (name == "frozen"), name
            assert gradient is None or torch.isfinite(gradient).all()

    def test_equal_losses_of_alike_tasks_get_equal_weights(self, kind: str, net: Net) -> None:
        alike = TaskSet(dict.fromkeys(NAMES, Depth()))
        loss = net.shared.weight.square().mean()
        weights = make(kind, alike).backward(dict.fromkeys(NAMES, loss), net.partition())
        assert len(set(weights.values())) == 1

    def test_permuting_the_tasks_permutes_the_weights(self, kind: str, net: Net, x: Tensor) -> None:
        results = []
        for order in itertools.permutations(NAMES):
            net.zero_grad()
            losses = net.losses(x)
            weights = make(kind).backward({name: losses[name] for name in order}, net.partition())
            assert list(weights) == list(order)
            results.append((weights, gradients(net)))
        for weights, found in results[1:]:
            assert weights == pytest.approx(results[0][0])
            for name, gradient in found.items():
                if gradient is not None:
                    torch.testing.assert_close(gradient, results[0][1][name])

    def test_single_task(self, kind: str, net: Net, x: Tensor) -> None:
        balancer = make(kind, TaskSet({"a": Depth()}))
        loss = net.losses(x)["a"]
        (weight,) = balancer.backward({"a": loss}, net.partition()).values()
        assert weight > 0
        (alone,) = torch.autograd.grad(net.losses(x)["a"], [net.shared.weight])
        torch.testing.assert_close(net.shared.weight.grad, weight * alone)

    def test_task_that_is_missing_this_time(self, kind: str, net: Net, x: Tensor) -> None:
        balancer, losses = make(kind), net.losses(x)
        weights = balancer.backward({"a": losses["a"], "c": losses["c"]}, net.partition())
        assert list(weights) == ["a", "c"]
        assert net.heads["b"].weight.grad is None  # type: ignore[union-attr]
        net.zero_grad()
        balancer.zero_grad()
        assert list(balancer.backward(net.losses(x), net.partition())) == list(NAMES)

    def test_state_goes_into_a_file_and_back(self, kind: str, net: Net, x: Tensor) -> None:
        balancer = make(kind)
        for parameter in balancer.parameters():
            nn.init.uniform_(parameter)
        again = make(kind)
        again.load_state_dict(balancer.state_dict())
        one = balancer.backward(net.losses(x), net.partition())
        net.zero_grad()
        assert again.backward(net.losses(x), net.partition()) == one


def test_fixed_weights_come_from_the_recipe_or_the_task(net: Net, x: Tensor) -> None:
    weights = FixedSpec(weights={"a": 3.0}).build(TASKS).backward(net.losses(x), net.partition())
    assert weights == {"a": 3.0, "b": 2.0, "c": 0.5}


def test_fixed_weight_of_zero_stops_a_task(net: Net, x: Tensor) -> None:
    FixedSpec(weights={"a": 0.0}).build(TASKS).backward(net.losses(x), net.partition())
    mine = net.shared.weight.grad
    assert net.heads["a"].weight.grad is not None  # type: ignore[union-attr]
    assert not net.heads["a"].weight.grad.any()  # type: ignore[union-attr,operator]
    losses = net.losses(x)
    (expected,) = torch.autograd.grad(2.0 * losses["b"] + 0.5 * losses["c"], [net.shared.weight])
    torch.testing.assert_close(mine, expected)


def test_scaling_a_loss_scales_its_gradient(net: Net, x: Tensor) -> None:
    balancer: Any = FixedSpec().build(TASKS)
    balancer.backward({"a": net.losses(x)["a"]}, net.partition())
    once = net.shared.weight.grad.clone()  # type: ignore[union-attr]
    net.zero_grad()
    balancer.backward({"a": 4 * net.losses(x)["a"]}, net.partition())
    torch.testing.assert_close(net.shared.weight.grad, 4 * once)


def test_uncertainty_has_the_gradient_of_its_formula(net: Net, x: Tensor) -> None:
    balancer: Any = UncertaintySpec().build(TASKS)
    for value, s in zip((-1.0, 0.3, 2.0), balancer.log_variance.values(), strict=True):
        nn.init.constant_(s, value)
    balancer.backward(net.losses(x), net.partition())
    mine = {name: s.grad.clone() for name, s in balancer.log_variance.items()}
    shared = net.shared.weight.grad.clone()  # type: ignore[union-attr]
    balancer.zero_grad()
    net.zero_grad()
    losses = net.losses(x)
    total = sum(0.5 * (torch.exp(-s) * losses[name] + s) for name, s in balancer.log_variance.items())
    total.backward()  # type: ignore[union-attr]
    for name, s in balancer.log_variance.items():
        torch.testing.assert_close(mine[name], s.grad)
    torch.testing.assert_close(shared, net.shared.weight.grad)


def test_uncertainty_learns_to_weigh_down_what_is_large(net: Net) -> None:
    balancer: Any = UncertaintySpec().build(TASKS)
    optimizer = torch.optim.SGD(balancer.parameters(), lr=0.2)
    for _ in range(400):
        losses = {
            name: net.shared.weight.sum() * 0 + value
            for name, value in zip(NAMES, (0.5, 1.0, 4.0), strict=True)
        }
        weights = balancer.backward(losses, net.partition())
        optimizer.step()
    assert [weights[name] for name in NAMES] == pytest.approx([1.0, 0.5, 0.125], rel=1e-2)  # 1 / (2 L)
