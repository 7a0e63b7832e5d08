"""The engine: what it writes into ``.grad``, in every mode, against autograd by hand."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from polytask.balancers import balancer, weights
from polytask.balancers.base import Balancer
from polytask.balancers.engine import GradientBalancer
from polytask.balancers.jacobian import mix, product
from polytask.errors import ConfigError, ConfigErrors, NonFiniteLossError, PolytaskWarning
from polytask.types import Partition, PerTask, partition
from tests.helpers import TASKS, build, image, model_spec

NAMES = ("a", "b", "c")


class Net(nn.Module):
    """A trunk with two outputs, and heads that read both; in float64, so that sums can be compared."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)
        self.unused = nn.Parameter(torch.ones(3))
        self.heads = PerTask({name: nn.Linear(13, 2) for name in NAMES})
        self.double()

    def features(self, x: Tensor) -> list[Tensor]:
        one = torch.tanh(self.first(x))
        return [one.view_as(one), torch.tanh(self.second(one))]

    def losses(self, z: list[Tensor]) -> dict[str, Tensor]:
        together = torch.cat(z, 1)
        return {
            name: (head(together) - k).square().mean() for k, (name, head) in enumerate(self.heads.items())
        }

    def partition(self) -> Partition:
        return partition(self, NAMES)

    @property
    def trunk(self) -> list[nn.Parameter]:
        return [*self.first.parameters(), *self.second.parameters()]


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def make(name: str = "cagrad", **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PolytaskWarning)
        return balancer(name, NAMES, **settings)


def run(b: Balancer, net: Net, x: Tensor, names: tuple[str, ...] = NAMES) -> dict[str, float]:
    net.zero_grad()
    z = net.features(x)
    losses = net.losses(z)
    return b.backward({name: losses[name] for name in names}, net.partition(), z)


def rows(net: Net, x: Tensor) -> Tensor:
    """The Jacobian by hand, ``[3, P]``."""
    return torch.stack([
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, net.trunk, retain_graph=True)])
        for loss in net.losses(net.features(x)).values()
    ])  # fmt: skip


def trunk(net: Net) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in net.trunk])  # type: ignore[union-attr]


def head_gradients(net: Net, x: Tensor) -> dict[str, Tensor]:
    losses = net.losses(net.features(x))
    return {
        name: torch.autograd.grad(losses[name], [head.weight], retain_graph=True)[0]  # type: ignore[list-item]
        for name, head in net.heads.items()
    }


def assert_heads(net: Net, x: Tensor, factors: Mapping[str, float]) -> None:
    for name, own in head_gradients(net, x).items():
        torch.testing.assert_close(net.heads[name].weight.grad, factors[name] * own)


@pytest.mark.parametrize("name", ["mgda", "cagrad", "nash", "upgrad", "imtl", "amtl", "pcgrad"])
def test_exact(net: Net, x: Tensor, name: str) -> None:
    b = make(name)
    w = run(b, net, x)
    j = rows(net, x)
    values = [float(loss.detach()) for loss in net.losses(net.features(x)).values()]
    expected, _ = weights(name, (j @ j.T).numpy(), losses=values, seed=b._problem({}).seed)
    assert [*w.values()] == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(trunk(net), torch.tensor([*w.values()], dtype=torch.float64) @ j)
    assert_heads(net, x, dict.fromkeys(NAMES, 1.0))
    assert net.unused.grad is None  # nobody reaches it
    assert b.gram == pytest.approx((j @ j.T).numpy())
    cosine = float(nn.functional.cosine_similarity(j[0], j[1], 0))
    assert b.stats["cos/a~b"] == pytest.approx(cosine)
    assert 0 <= b.stats["conflict"] <= 1
    assert b.stats["norm_ratio"] == pytest.approx(float(j.norm(dim=1).max() / j.norm(dim=1).min()))


def test_gradients_are_views_of_one_vector(net: Net, x: Tensor) -> None:
    b = make()
    for _ in range(2):
        run(b, net, x)
        storages = {p.grad.untyped_storage().data_ptr() for p in net.trunk}  # type: ignore[union-attr]
        assert len(storages) == 1
    flat = b._jacobians[0].direction
    assert {flat.untyped_storage().data_ptr()} == storages
    once = trunk(net)
    net.zero_grad(set_to_none=False)  # the old gradients lie where the new ones will be
    b.backward(net.losses(net.features(x)), net.partition())
    torch.testing.assert_close(trunk(net), once)
    b.backward(net.losses(net.features(x)), net.partition())
    torch.testing.assert_close(trunk(net), 2 * once)


def test_heads(net: Net, x: Tensor) -> None:
    w = run(make("mgda", scale_heads=True), net, x)
    assert_heads(net, x, w)
    run(make("db_mtl"), net, x)
    assert_heads(net, x, {n: 1 / (float(y.detach()) + 1e-8) for n, y in net.losses(net.features(x)).items()})
    b = make("imtl", lr=0.5)
    run(b, net, x)
    scales = dict(zip(NAMES, np.exp(b.memory["s"].numpy()), strict=True))
    run(b, net, x)
    assert_heads(net, x, scales)


def test_frozen_trunk_and_missing_tasks(net: Net, x: Tensor) -> None:
    b = make()
    assert list(run(b, net, x, ("c", "a"))) == ["c", "a"]
    j = rows(net, x)[[2, 0]]
    expected, _ = weights("cagrad", (j @ j.T).numpy())
    torch.testing.assert_close(trunk(net), torch.tensor(expected) @ j)
    for parameter in [*net.trunk, net.unused]:
        parameter.requires_grad_(False)
    assert run(b, net, x) == dict.fromkeys(NAMES, 1.0)
    assert_heads(net, x, dict.fromkeys(NAMES, 1.0))


def test_rows_forget_what_a_task_no_longer_reaches(net: Net, x: Tensor) -> None:
    b = make("mgda")
    run(b, net, x)
    net.zero_grad()
    losses = net.losses(net.features(x))
    losses["b"] = net.first(x).square().mean()  # past the second layer
    w = b.backward(losses, net.partition())
    again = net.losses(net.features(x))
    rest = w["a"] * again["a"] + w["c"] * again["c"]
    (expected,) = torch.autograd.grad(rest, [net.second.weight])
    torch.testing.assert_close(net.second.weight.grad, expected)


def test_bfloat16_parameters(net: Net, x: Tensor) -> None:
    net, x = net.bfloat16(), x.bfloat16()
    run(make("upgrad"), net, x)
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in net.trunk)
    assert make("upgrad").stats == {}


def test_parameters_that_become_more_precise(net: Net, x: Tensor) -> None:
    b, net = make("mgda"), net.float()
    run(b, net, x.float())
    net.first.double()
    net.second.register_forward_pre_hook(lambda _, inputs: inputs[0].float())
    for head in net.heads.values():
        head.float()
    z = net.features(x)
    losses = net.losses([z[0].float(), z[1]])
    w = b.backward(losses, net.partition())
    found = torch.autograd.grad(net.losses([y.float() for y in net.features(x)])["a"], [net.first.weight])
    assert b._jacobians[0].matrix.dtype == torch.float64
    assert net.first.weight.grad is not None and net.second.weight.grad is not None
    assert net.first.weight.grad.dtype == found[0].dtype == torch.float64
    assert net.second.weight.grad.dtype == torch.float32
    assert list(w) == list(NAMES)


def test_accumulation(net: Net, x: Tensor) -> None:
    b, net2 = make("upgrad"), Net()
    x2 = x.flip(0) * 1.5
    for batch in (x, x2):
        b.step(net.losses(net.features(batch)), [*net.trunk], accumulate=batch is x)
    j, twice = rows(net, x) + rows(net, x2), [head_gradients(net, y) for y in (x, x2)]
    w, _ = weights("upgrad", (j @ j.T).numpy())
    torch.testing.assert_close(trunk(net), torch.tensor(w) @ j)
    for name, head in net.heads.items():
        torch.testing.assert_close(head.weight.grad, twice[0][name] + twice[1][name])
    # a task that only the first batch has
    b, losses = make("upgrad"), net2.losses(net2.features(x))
    b.step(losses, [*net2.trunk], accumulate=True)
    outcome = b.step({"a": net2.losses(net2.features(x2))["a"]}, [*net2.trunk])
    j = rows(net, x)
    j[0] += rows(net, x2)[0]
    w, _ = weights("upgrad", (j @ j.T).numpy())
    torch.testing.assert_close(trunk(net2), torch.tensor(w) @ j)
    assert list(outcome.weights) == list(NAMES)
    for b, what in (
        (make("uw"), "its weights depend on the losses of a whole batch"),
        (make("modo"), "it needs 3 batches for a step already"),
        (make(mode="features"), "gradients of several batches add up in mode 'exact' only"),
    ):
        with pytest.raises(ConfigError, match=what):
            b.step(net.losses(net.features(x)), accumulate=True)


def test_accumulation_with_constant_weights(net: Net, x: Tensor) -> None:
    b, x2 = make("fixed", weights={"b": 3.0}), x.flip(0) * 1.5
    for batch in (x, x2):
        b.step(net.losses(net.features(batch)), [*net.trunk], accumulate=batch is x)
    expected = torch.tensor([1.0, 3.0, 1.0], dtype=torch.float64) @ (rows(net, x) + rows(net, x2))
    torch.testing.assert_close(trunk(net), expected)


@pytest.mark.parametrize("nonfinite", ["skip", "stop"])
def test_what_was_collected_for_a_step_that_fails_is_forgotten(net: Net, x: Tensor, nonfinite: str) -> None:
    b = make("upgrad", nonfinite=nonfinite)
    b.step(net.losses(net.features(x * 2)), [*net.trunk], accumulate=True)
    bad = {name: loss * torch.nan for name, loss in net.losses(net.features(x)).items()}
    if nonfinite == "stop":
        with pytest.raises(NonFiniteLossError):
            b.step(bad, [*net.trunk])
    else:
        assert b.step(bad, [*net.trunk]).weights == {}
    b.step(net.losses(net.features(x)), [*net.trunk])
    j = rows(net, x)
    torch.testing.assert_close(trunk(net), torch.tensor(weights("upgrad", (j @ j.T).numpy())[0]) @ j)


@pytest.mark.parametrize("name", ["db_mtl", "imtl"])
def test_accumulation_of_what_heads_get(net: Net, x: Tensor, name: str) -> None:
    """These methods multiply the gradients of the heads: those of all batches."""
    b, batches = make(name, **({"lr": 0.5} if name == "imtl" else {})), (x, x.flip(0) * 1.5)
    for _ in range(2):
        net.zero_grad()
        scales = b.memory.get("s", torch.zeros(3)).exp()
        values = torch.zeros(3, dtype=torch.float64)
        for batch in batches:
            losses = net.losses(net.features(batch))
            values += torch.stack([*losses.values()]).detach()
            b.step(losses, [*net.trunk], accumulate=batch is x)
    scales = scales if name == "imtl" else 1 / values
    own = [head_gradients(net, batch) for batch in batches]
    for k, (task, head) in enumerate(net.heads.items()):
        torch.testing.assert_close(head.weight.grad, (own[0][task] + own[1][task]) * scales[k])


def test_stale(net: Net, x: Tensor) -> None:
    b, seen = make("upgrad", mode="stale:3"), []
    for step in range(5):
        w = run(b, net, x * (1 + step))
        seen.append(tuple(w.values()))
        j = rows(net, x * (1 + step))
        torch.testing.assert_close(trunk(net), torch.tensor(seen[-1], dtype=torch.float64) @ j)
        assert_heads(net, x * (1 + step), dict.fromkeys(NAMES, 1.0))
    assert seen[0] == seen[1] == seen[2] != seen[3] == seen[4]


def test_stale_weights_wait_for_all_tasks(net: Net, x: Tensor) -> None:
    """A task without a weight yet is not given one that fits nothing: weights are found again."""
    b = make("nash", mode="stale:9")
    run(b, net, x, ("a", "b"))
    w = run(b, net, x)
    j = rows(net, x)
    np.testing.assert_allclose([*w.values()], weights("nash", (j @ j.T).numpy())[0], rtol=1e-6)
    assert run(b, net, x * 2) == w


def test_weights_of_zero_leave_the_heads_alone(net: Net, x: Tensor) -> None:
    b = make("mgda", mode="stale:2")
    run(b, net, x)
    b.memory["kept"] = torch.tensor([0.0, 2.0, 1e-12], dtype=torch.float64)
    run(b, net, x)
    assert_heads(net, x, dict.fromkeys(NAMES, 1.0))
    torch.testing.assert_close(trunk(net), 2 * rows(net, x)[1])


def test_features(net: Net, x: Tensor) -> None:
    b = make("mgda", mode="features")
    w = run(b, net, x)
    z = net.features(x)
    losses = net.losses(z)
    r = torch.stack([torch.cat([g.reshape(-1) for g in torch.autograd.grad(y, z, retain_graph=True)])
                     for y in losses.values()])  # fmt: skip
    expected, _ = weights("mgda", (r @ r.T).numpy())
    assert [*w.values()] == pytest.approx(expected)
    # each path counts once, though one output is computed from the other
    torch.testing.assert_close(trunk(net), torch.tensor([*w.values()], dtype=torch.float64) @ rows(net, x))
    assert_heads(net, x, dict.fromkeys(NAMES, 1.0))
    with pytest.raises(ConfigError, match="mode 'features' needs tensors that all tasks share"):
        b.backward(net.losses(net.features(x)), net.partition())


def test_last_layer(net: Net, x: Tensor) -> None:
    w = run(make("gn"), net, x)
    assert [*w.values()] == [1.0, 1.0, 1.0]
    b = make("mgda", mode="last_layer")
    w = run(b, net, x)
    r = torch.stack([torch.autograd.grad(y, [net.second.weight], retain_graph=True)[0].reshape(-1)
                     for y in net.losses(net.features(x)).values()])  # fmt: skip
    assert b.gram == pytest.approx((r @ r.T).numpy())
    torch.testing.assert_close(trunk(net), torch.tensor([*w.values()], dtype=torch.float64) @ rows(net, x))
    assert_heads(net, x, dict.fromkeys(NAMES, 1.0))


def test_last_layer_is_one_that_all_tasks_reach(net: Net, x: Tensor) -> None:
    """One head reads the last map, another one the map before it, as with a decoder of some tasks."""
    early = PerTask({"b": nn.Linear(8, 1).double()})
    for _ in range(2):
        z = net.features(x)
        losses = {"a": net.losses(z)["a"], "b": (early["b"](z[0]) - 1).square().mean()}
        part = Partition({str(i): p for i, p in enumerate(net.trunk)}, {}, {})
        b = make("gn")
        weights = b.backward(losses, part, z)
        r = torch.stack([torch.autograd.grad(y, [net.first.weight], retain_graph=True)[0].reshape(-1)
                         for y in (net.losses(net.features(x))["a"],
                                   (early["b"](net.features(x)[0]) - 1).square().mean())])  # fmt: skip
        assert b.gram == pytest.approx((r @ r.T).numpy())
        assert weights == {"a": 1.0, "b": 1.0}
    apart = {"a": net.second(torch.ones(1, 8).double()).sum(), "b": net.first(x).sum()}
    with pytest.raises(ConfigError, match="mode 'last_layer' needs a layer that all tasks depend on"):
        make("gn").backward(apart, part)


def test_sketch(net: Net, x: Tensor) -> None:
    j, exact = rows(net, x), rows(net, x) @ rows(net, x).T
    b = make("upgrad", mode="sketch:64")
    w = run(b, net, x)
    torch.testing.assert_close(trunk(net), torch.tensor([*w.values()], dtype=torch.float64) @ j)
    assert np.abs(b.gram - exact.numpy()).max() < 0.5 * float(exact.max())
    wide = torch.randn(3, 200_000, generator=torch.Generator().manual_seed(0))
    wide[1] += wide[0]
    from polytask.balancers import cheap

    heads = [nn.Parameter(torch.zeros(200_000))]
    losses = [(heads[0] * row).sum() for row in wide]
    gram = cheap.of_parameters(losses, heads, 256)
    torch.testing.assert_close(gram, product(wide, wide), rtol=0.2, atol=0.2 * 200_000)


def test_audit(net: Net, x: Tensor) -> None:
    b = make("upgrad", mode="sketch:100000", audit=2)
    run(b, net, x)
    assert b.stats["agreement"] == pytest.approx(1)  # a sketch this large is exact up to signs
    run(b, net, x)
    assert "agreement" not in b.stats
    b = make("pcgrad", mode="features", audit=1)
    for _ in range(3):
        run(b, net, x)
        assert -1.001 <= b.stats["agreement"] <= 1.001
    b, seen = make("mgda", mode="stale:3", audit=1), []
    for step in range(6):
        w = run(b, net, x * (1 + step))
        seen.append(b.stats.get("agreement"))
        if step == 2:
            j = rows(net, x * 3).numpy()
            d, e = (np.array([*v]) @ j for v in (w.values(), weights("mgda", j @ j.T)[0]))
            assert seen[2] == pytest.approx(d @ e / np.linalg.norm(d) / np.linalg.norm(e))
    assert seen[2] < 1 and [y is None for y in seen] == [True, False, False] * 2
    with pytest.raises(ConfigErrors, match="audit compares another mode with exact gradients"):
        make("mgda", audit=2)


def test_products_are_accumulated_precisely() -> None:
    wide = torch.randn(3, 300_001, generator=torch.Generator().manual_seed(0))
    exact = wide.double() @ wide.double().T
    assert float((product(wide, wide) - exact).abs().max() / exact.max()) < 1e-6
    w, out = np.array([0.5, -2.0, 1.0]), torch.empty(300_001)
    mix(w, wide, out)
    torch.testing.assert_close(out, (torch.tensor(w) @ wide.double()).float())


def test_three_batches(net: Net, x: Tensor) -> None:
    b = make("modo", gamma=0.5)
    xs = [x, x.flip(1), x * 0.5]
    parts = [net.losses(net.features(y)) for y in xs]
    w = b.backward(parts[0], net.partition(), (), parts[1:])
    third, one, two = (rows(net, y) for y in xs)
    grams = [(left @ right.T).numpy() for left, right in ((third, third), (one, two))]
    expected, _ = weights("modo", grams, gamma=0.5)
    assert [*w.values()] == pytest.approx(expected)
    torch.testing.assert_close(trunk(net), torch.tensor(expected) @ third)
    for name, head in net.heads.items():
        own = torch.stack([head_gradients(net, y)[name] for y in xs]).mean(0)
        torch.testing.assert_close(head.weight.grad, own)
    with pytest.raises(ConfigError, match="needs the losses of 3 independent batches, got 1"):
        b.backward(net.losses(net.features(x)), net.partition())


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_another_batch_that_is_not_a_number(net: Net, x: Tensor, which: int) -> None:
    parts = [net.losses(net.features(y)) for y in (x.flip(1), x * 0.5)]
    parts[which]["b"] = parts[which]["b"] + (0 * net.first.weight.sum()).sqrt()  # infinite slope
    b = make("sdmgrad")
    with pytest.raises(NonFiniteLossError, match="the gradient of task 'b' is not finite"):
        b.backward(net.losses(net.features(x)), net.partition(), (), parts)
    net.zero_grad()
    b, parts = make("sdmgrad", nonfinite="skip"), [net.losses(net.features(y)) for y in (x.flip(1), x * 0.5)]
    parts[which]["b"] = parts[which]["b"] + (0 * net.first.weight.sum()).sqrt()
    w = b.backward(net.losses(net.features(x)), net.partition(), (), parts)
    assert w["b"] == 0 < w["a"]
    assert torch.isfinite(trunk(net)).all()
    assert torch.isfinite(b.memory["w"]).all()


def test_draws_depend_on_seed_and_step(net: Net, x: Tensor) -> None:
    def draws(b: Any, steps: int = 3) -> list[tuple[float, ...]]:
        return [tuple(run(b, net, x).values()) for _ in range(steps)]

    one, other = make("rlw"), make("rlw")
    assert draws(one) == draws(other)
    assert len(set(draws(one))) == 3
    other.seed = 1
    resumed = make("rlw")
    resumed.load_state_dict(one.state_dict())
    after = draws(one)
    assert draws(resumed) == after
    assert draws(other) != after


@pytest.mark.parametrize("name", ["dwa", "gn", "moco", "db_mtl", "excessmtl", "gvac", "famo", "stch", "imtl"])
def test_resume_is_exact(net: Net, x: Tensor, name: str) -> None:
    def train(b: Any, net: Net, steps: range) -> None:
        for step in steps:
            run(b, net, x + step)
            with torch.no_grad():
                for p in net.parameters():
                    p -= 0.05 * p.grad if p.grad is not None else 0.0
                if b.looks_back:
                    b.after_step(net.losses(net.features(x + step)))
            b.epoch_end()

    whole, b = Net(), make(name)
    train(b, whole, range(6))
    first, again = Net(), make(name)
    train(again, first, range(3))
    resumed = make(name)
    resumed.load_state_dict({k: v.clone() for k, v in again.state_dict().items()})
    train(resumed, first, range(3, 6))
    for one, other in zip(whole.parameters(), first.parameters(), strict=True):
        assert torch.equal(one, other)


def test_streams() -> None:
    """Tasks with streams own parameters inside the backbone, which keep their own gradient."""
    model = build(model_spec(adapter={"type": "mtlora", "rank": 2, "task_rank": 2, "dropout": 0.0})).train()
    for parameter in model.parameters():  # branches that start at zero pass no gradient on
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    part = model.partition()
    generator = torch.Generator().manual_seed(0)
    batch = {
        "semseg": torch.randint(0, 3, (2, 1, 64, 64), generator=generator),
        "normals": nn.functional.normalize(torch.randn(2, 3, 64, 64, generator=generator), dim=1),
        "depth": 1 + torch.rand(2, 1, 64, 64, generator=generator),
    }

    def losses() -> dict[str, Tensor]:
        output = model(image())
        assert output.frontier == ()
        return TASKS.losses(output.logits, batch)

    b = GradientBalancer(make("upgrad").spec, tuple(TASKS))
    w = b.backward(losses(), part)
    shared, mine = list(part.shared.values()), {n: p.grad for n, p in part.trainable()}
    found = [torch.autograd.grad(y, shared, retain_graph=True, allow_unused=True) for y in losses().values()]
    for k, (name, parameter) in enumerate(part.shared.items()):
        gradients = [g[k] for g in found]
        if all(g is None for g in gradients):
            assert parameter.grad is None
        else:
            expected = sum(x * g for x, g in zip(w.values(), gradients, strict=True) if g is not None)
            torch.testing.assert_close(mine[name], expected, rtol=1e-3, atol=1e-6)
    for task, loss in losses().items():
        own = part.per_task[task]
        assert any(name.startswith("backbone.") for name in own)
        gradients = torch.autograd.grad(loss, list(own.values()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(own, gradients, strict=True):
            if gradient is not None:
                torch.testing.assert_close(mine[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("freeze", [False, True])
def test_frontier_of_a_model(freeze: bool) -> None:
    """The shared levels, where the neck belongs to tasks: the direction is then that of the exact rows."""
    model = build(model_spec(freeze_backbone=freeze)).train()
    output = model(image())
    assert any(z.requires_grad for z in output.frontier) is not freeze
    with torch.no_grad():
        assert model(image()).frontier == ()
    if freeze:
        return
    losses = {task: x.float().square().mean() for task, x in output.logits.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PolytaskWarning)
        b = GradientBalancer(make("mgda", mode="features").spec, tuple(TASKS))
    w = b.backward(losses, model.partition(), output.frontier)
    mine = {name: p.grad for name, p in model.partition().shared.items()}
    output = model(image())
    total = sum(w[task] * x.float().square().mean() for task, x in output.logits.items())
    shared = list(model.partition().shared.values())
    expected = torch.autograd.grad(total, shared, allow_unused=True)  # type: ignore[arg-type]
    for (name, gradient), other in zip(mine.items(), expected, strict=True):
        if other is not None:
            torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-6, msg=name)
