"""What every registered balancer promises."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polytask.balancers.base import PATIENCE, Balancer, BalancerSpec
from polytask.balancers.scalar import FixedSpec
from polytask.balancers.weighting import GradientWeighting, Rowwise, Scalarizer
from polytask.config import decode, encode, full_name, registered
from polytask.errors import NonFiniteLossError, PolytaskWarning
from polytask.recipe import Recipe  # noqa: F401 - registers all balancers
from polytask.tasks import Depth, TaskSet
from polytask.types import Partition, PerTask, partition

NAMES = ("a", "b", "c")
TASKS = TaskSet({name: Depth(weight=weight) for name, weight in zip(NAMES, (1.0, 2.0, 0.5), strict=True)})
ALL = registered("balancer")
KINDS = sorted(ALL)
SETTINGS: dict[str, dict[str, Any]] = {"torchjd": {"aggregator": "Sum"}}
"""What a kind cannot do without."""
GRADIENTS = [k for k in KINDS if issubclass(ALL[k], GradientWeighting | Rowwise)]
STATELESS = ["equal", "si", "mgda", "cagrad", "nash", "fairgrad", "amtl", "upgrad", "dualproj", "excessmtl"]


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


def make(kind: str, tasks: TaskSet = TASKS, **settings: Any) -> Balancer:
    if kind == "torchjd":
        pytest.importorskip("torchjd")
    spec = decode(ALL[kind], {**SETTINGS.get(kind, {}), **settings})
    assert isinstance(spec, BalancerSpec)
    return spec.build(tasks)


def run(balancer: Balancer, net: Net, x: Tensor, names: Sequence[str] = NAMES) -> dict[str, float]:
    """One backward pass; methods that see several batches get two more."""
    return go(balancer, net, lambda batch: {name: net.losses(batch)[name] for name in names}, x)


def go(
    balancer: Balancer, net: Net, losses: Callable[[Tensor], dict[str, Tensor]], x: Tensor
) -> dict[str, float]:
    batches = [x, *(x.roll(k + 1, 0) ** 2 for k in range(balancer.batches - 1))]
    return balancer.backward(losses(x), net.partition(), parts=[losses(batch) for batch in batches[1:]])


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def gradients(net: Net) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}


def trunk(net: Net) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in net.shared.parameters()])  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
class TestEvery:
    def test_spec_round_trip(self, kind: str) -> None:
        spec = decode(ALL[kind], SETTINGS.get(kind, {}))
        assert decode(type(spec), encode(spec)) == spec

    def test_writes_finite_gradients_of_all_that_trains(self, kind: str, net: Net, x: Tensor) -> None:
        balancer = make(kind)
        weights = run(balancer, net, x)
        assert list(weights) == list(NAMES)
        assert all(isinstance(w, float) for w in weights.values())
        assert all(isinstance(value, float) for value in balancer.stats.values())
        assert balancer.cost().count("\n") == 0
        for name, gradient in gradients(net).items():
            assert (gradient is None) == (name == "frozen"), name
            assert gradient is None or torch.isfinite(gradient).all()

    def test_adds_to_what_is_there(self, kind: str, net: Net, x: Tensor) -> None:
        run(make(kind), net, x)
        once = gradients(net)
        net.zero_grad()
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        run(make(kind), net, x)
        for name, gradient in gradients(net).items():
            if gradient is not None:
                torch.testing.assert_close(gradient, once[name] + 1)  # type: ignore[operator]

    def test_equal_losses_of_alike_tasks(self, kind: str, net: Net, x: Tensor) -> None:
        def losses(_: Tensor) -> dict[str, Tensor]:
            return dict.fromkeys(NAMES, net.shared.weight.square().mean())

        go(make(kind, TaskSet(dict.fromkeys(NAMES, Depth()))), net, losses, x)
        (alone,) = torch.autograd.grad(losses(x)["a"], [net.shared.weight])
        mine = net.shared.weight.grad
        assert mine is not None
        assert float(nn.functional.cosine_similarity(mine.flatten(), alone.flatten(), 0)) > 1 - 1e-5
        if kind not in ("uw", "si", "nash", "fairgrad", "pivrg", "stch", "db_mtl", "cagrad", "moco"):
            torch.testing.assert_close(mine, 3 * alone, rtol=1e-4, atol=1e-6)  # the others by their own laws

    def test_permuting_the_tasks_permutes_the_weights(self, kind: str, net: Net, x: Tensor) -> None:
        if kind == "gvac":
            return  # goes through the pairs in some order
        more = {"order": "expected"} if kind == "pcgrad" else {}
        results = []
        for order in itertools.permutations(NAMES):
            net.zero_grad()
            weights = run(make(kind, **more), net, x, order)
            assert list(weights) == list(order)
            results.append((weights, gradients(net)))
        for weights, found in results[1:]:
            assert weights == pytest.approx(results[0][0], rel=1e-4, abs=1e-6)
            for name, gradient in found.items():
                if gradient is not None:
                    torch.testing.assert_close(gradient, results[0][1][name], rtol=1e-4, atol=1e-6)

    @pytest.mark.filterwarnings("ignore:balancer .* has one task")
    def test_single_task(self, kind: str, net: Net, x: Tensor) -> None:
        balancer = make(kind, TaskSet({"a": Depth()}))
        for _ in range(2):
            net.zero_grad()
            assert run(balancer, net, x, ["a"]) == {"a": 1.0}
            torch.testing.assert_close(
                net.shared.weight.grad, torch.autograd.grad(net.losses(x)["a"], [net.shared.weight])[0]
            )

    def test_task_that_is_missing_this_time(self, kind: str, net: Net, x: Tensor) -> None:
        balancer = make(kind)
        weights = run(balancer, net, x, ["a", "c"])
        assert list(weights) == ["a", "c"]
        assert net.heads["b"].weight.grad is None  # type: ignore[union-attr]
        for present in (["b"], NAMES):
            net.zero_grad()
            balancer.zero_grad()
            assert list(run(balancer, net, x, present)) == list(present)

    def test_state_goes_into_a_file_and_back(self, kind: str, net: Net, x: Tensor) -> None:
        balancer, again = make(kind), make(kind)
        for _ in range(3):
            run(balancer, net, x)
            balancer.epoch_end()
        net.zero_grad()
        again.load_state_dict(balancer.state_dict())
        one = run(balancer, net, x)
        mine = gradients(net)
        net.zero_grad()
        assert run(again, net, x) == one
        for name, gradient in gradients(net).items():
            assert gradient is None or torch.equal(gradient, mine[name])  # type: ignore[arg-type]

    def test_all_gradients_zero(self, kind: str, net: Net, x: Tensor) -> None:
        nn.init.zeros_(net.shared.weight)
        for head in net.heads.values():
            nn.init.zeros_(head.weight)  # type: ignore[arg-type]
        weights = run(make(kind), net, x)
        assert not trunk(net).any()
        assert all(abs(w) < 1e9 for w in weights.values())

    @pytest.mark.parametrize("how", ["same", "opposite", "zero"])
    def test_degenerate(self, kind: str, net: Net, x: Tensor, how: str) -> None:
        def losses(batch: Tensor) -> dict[str, Tensor]:
            some = net.losses(batch)
            extra = {"same": some["a"], "opposite": 9 - some["a"], "zero": 0 * some["a"] + 1}[how]
            return {"a": some["a"], "b": extra, "c": some["c"]}

        balancer = make(kind)
        for _ in range(3):
            net.zero_grad()
            go(balancer, net, losses, x)
            assert torch.isfinite(trunk(net)).all()
            assert float(trunk(net).norm()) < 1e3

    def test_loss_that_is_not_a_number(self, kind: str) -> None:
        good, bad = {"a": 1.0, "b": 2.0}, {"a": 1.0, "b": float("nan")}
        assert make(kind).tolerates(good)
        assert not make(kind).tolerates(bad)
        balancer = make(kind, nonfinite="skip")
        assert balancer.tolerates(good)
        for _ in range(2):
            assert all(balancer.tolerates(bad) for _ in range(PATIENCE - 1))
            assert balancer.tolerates(good)
        assert [balancer.tolerates(bad) for _ in range(PATIENCE)].count(False) == 1
        again = make(kind, nonfinite="skip")
        again.load_state_dict(balancer.state_dict())
        assert not again.tolerates(bad)  # the count is kept


@pytest.mark.parametrize("kind", STATELESS)
def test_absent_task_is_as_if_there_were_none(kind: str, net: Net, x: Tensor) -> None:
    run(make(kind), net, x, ["a", "c"])
    mine = trunk(net)
    net.zero_grad()
    run(make(kind, TASKS.subset(["a", "c"])), net, x, ["a", "c"])
    torch.testing.assert_close(trunk(net), mine)


@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradient_that_is_not_a_number(kind: str, net: Net, x: Tensor) -> None:
    def broken(batch: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(net.shared(batch))
        hidden.register_hook(lambda g: g * float("nan"))
        return net.losses(batch) | {"b": net.heads["b"](hidden).square().mean()}

    balancer = make(kind)
    with pytest.raises(NonFiniteLossError, match="gradient of task 'b' is not finite"):
        go(balancer, net, broken, x)
    if balancer.batches > 1 or kind in ("gn", "gvac", "pcgrad", "gsd"):  # other modes and draws
        return
    net.zero_grad()
    balancer = make(kind, nonfinite="skip")
    weights = go(balancer, net, broken, x)
    mine = trunk(net)
    assert weights["b"] == 0.0
    assert net.heads["b"].weight.grad is None  # type: ignore[union-attr]
    net.zero_grad()
    run(make(kind), net, x, ["a", "c"])
    torch.testing.assert_close(mine, trunk(net))


@pytest.mark.parametrize("kind", ["nash", "fairgrad", "pivrg"])
def test_limit_of_the_length_holds_for_one_task_present_of_several(kind: str, net: Net, x: Tensor) -> None:
    make(kind).backward({"a": 1000 * net.losses(x)["a"]}, net.partition())
    assert float(torch.linalg.vector_norm(trunk(net))) == pytest.approx(1.0)


def test_aliases() -> None:
    names = {
        "gradnorm": "gn", "uncertainty": "uw", "gls": "geo", "graddrop": "gsd", "gradvac": "gvac",
        "aligned_mtl": "amtl", "nash_mtl": "nash", "log_losses": "si", "ew": "equal", "excess": "excessmtl",
        "uncertainty_weighting": "uw", "gradient_vaccine": "gvac",
        "dynamic_weight_average": "dwa", "random_loss_weighting": "rlw", "geometric_loss_strategy": "geo",
    }  # fmt: skip
    assert {alias: full_name("balancer", alias) for alias in names} == names
    asked = {
        "gn", "uw", "dwa", "rlw", "mgda", "pcgrad", "cagrad", "recon", "nash", "geo", "gsd", "imtl", "gvac",
        "moco", "amtl", "equal", "fixed", "si", "famo", "upgrad", "fairgrad", "excessmtl", "stch", "db_mtl",
        "go4align", "sdmgrad", "modo", "pivrg",
    }  # fmt: skip
    assert asked <= set(ALL)


def test_angles_and_cheap_modes() -> None:
    with pytest.warns(PolytaskWarning, match="'pcgrad' goes by angles of gradients"):
        make("pcgrad", mode="features")
    make("gn", mode="features")


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


@pytest.mark.parametrize("kind", [k for k in KINDS if issubclass(ALL[k], Scalarizer)])
def test_scalarizers_weight_the_heads_too(kind: str, net: Net, x: Tensor) -> None:
    weights = run(make(kind), net, x)
    for name, head in net.heads.items():
        (own,) = torch.autograd.grad(net.losses(x)[name], [head.weight])  # type: ignore[list-item]
        torch.testing.assert_close(head.weight.grad, weights[name] * own)


@pytest.mark.parametrize("kind", ["si", "geo", "stch", "famo", "go4align", "imtl_l", "db_mtl", "imtl"])
def test_negative_losses_are_refused(kind: str, net: Net, x: Tensor) -> None:
    losses = net.losses(x)
    with pytest.raises(NonFiniteLossError, match=f"'{kind}' divides by losses.* task 'b' is negative"):
        make(kind).backward({**losses, "b": losses["b"] - 100}, net.partition())
