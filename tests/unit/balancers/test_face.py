"""Balancers in a loop of one's own."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from polytask.balancers import balancer, weights
from polytask.balancers.base import PATIENCE
from polytask.errors import ConfigError, ConfigErrors, NonFiniteLossError, PolytaskWarning

NAMES = ["depth", "parts"]


class Loop:
    """What a stranger has: a trunk, heads, data."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.heads = nn.ModuleDict({name: nn.Linear(8, 1) for name in NAMES})
        self.x = torch.randn(5, 4)
        self.parameters = [*self.trunk.parameters(), *self.heads.parameters()]

    def losses(self, z: Tensor | None = None) -> dict[str, Tensor]:
        z = self.trunk(self.x) if z is None else z
        return {name: (head(z) - k).square().mean() for k, (name, head) in enumerate(self.heads.items())}

    def gradients(self) -> list[Tensor | None]:
        found = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        return found


@pytest.fixture
def loop() -> Loop:
    return Loop()


def test_five_lines(loop: Loop) -> None:
    b = balancer("cagrad", tasks=NAMES, c=0.4)
    optimizer = torch.optim.SGD(loop.parameters, lr=0.1)
    first = None
    for _ in range(30):
        optimizer.zero_grad()
        outcome = b.step(loop.losses(), shared=loop.trunk)
        optimizer.step()
        first = first or outcome
    assert first is not None
    assert sum(outcome.losses.values()) < sum(first.losses.values())
    assert list(outcome.weights) == NAMES
    assert outcome.cosines is not None
    assert outcome.norms is not None
    assert outcome.cosines.shape == (2, 2)
    assert np.diag(outcome.cosines) == pytest.approx(np.ones(2))
    assert outcome.stats["conflict"] == float(outcome.cosines[0, 1] < 0)
    assert outcome.stats["norm_ratio"] == pytest.approx(outcome.norms.max() / outcome.norms.min())
    assert b.cost() == "cagrad: 2 backward passes of what is shared per step, 0.0 MB of gradients and memory"


@pytest.mark.parametrize("name", ["cagrad", "uw", "upgrad", "db_mtl"])
def test_all_ways_to_say_what_is_shared(loop: Loop, name: str) -> None:
    ways = (loop.trunk, list(loop.trunk.parameters()), loop.trunk.parameters(), None)
    results = [
        (balancer(name, NAMES).step(loop.losses(), shared=shared).weights, loop.gradients())
        for shared in ways
    ]
    z = loop.trunk(loop.x)
    results.append((balancer(name, NAMES).step(loop.losses(z), features=z).weights, loop.gradients()))
    for found, gradients in results[1:]:
        assert found == pytest.approx(results[0][0])
        for one, other in zip(gradients, results[0][1], strict=True):
            assert one is not None
            assert other is not None
            torch.testing.assert_close(one, other)


def test_features(loop: Loop) -> None:
    with pytest.warns(PolytaskWarning, match="goes by angles"):
        b = balancer("mgda", NAMES, mode="features")
    z = loop.trunk(loop.x)
    outcome = b.step(loop.losses(z), features=z)
    total = sum(outcome.weights[name] * loss for name, loss in loop.losses().items())
    expected = torch.autograd.grad(total, list(loop.trunk.parameters()))  # type: ignore[arg-type]
    for mine, other in zip(loop.gradients(), expected, strict=False):
        assert mine is not None
        torch.testing.assert_close(mine, other)


def test_absent_tasks_and_parameters_that_freeze(loop: Loop) -> None:
    b = balancer("upgrad", NAMES)
    assert list(b.step(loop.losses()).weights) == NAMES
    losses = loop.losses()
    assert b.step({"parts": losses["parts"]}, shared=loop.trunk).weights == {"parts": 1.0}
    loop.trunk[0].bias.requires_grad_(False)
    loop.gradients()
    b.step(loop.losses())
    assert loop.gradients()[1] is None


def test_what_is_shared_may_change(loop: Loop) -> None:
    b = balancer("mgda", NAMES)
    loop.trunk.requires_grad_(False)
    assert b.step(loop.losses(), shared=loop.trunk).weights == {"depth": 1.0, "parts": 1.0}
    assert b.step(loop.losses(), shared=loop.trunk, features=loop.trunk(loop.x)).weights["depth"] == 1.0
    loop.trunk[0].bias.requires_grad_(True)
    b.step(loop.losses(), shared=loop.trunk)
    loop.trunk.requires_grad_(True)
    loop.gradients()
    weights = b.step(loop.losses(), shared=loop.trunk).weights
    mixed = sum(weights[name] * loss for name, loss in loop.losses().items())
    expected = torch.autograd.grad(mixed, list(loop.trunk.parameters()))  # type: ignore[arg-type]
    for mine, other in zip(loop.gradients(), expected, strict=False):
        assert mine is not None
        torch.testing.assert_close(mine, other)


def test_shared_parameters_that_are_not_named(loop: Loop) -> None:
    neck = nn.Linear(8, 8)
    with pytest.warns(PolytaskWarning, match="2 parameters that several tasks depend on are not among"):
        balancer("mgda", NAMES).step(loop.losses(neck(loop.trunk(loop.x))), shared=loop.trunk)
    assert neck.weight.grad is not None


@pytest.mark.parametrize("way", ["module", "graph", "features"])
def test_last_layer_is_the_last_however_it_is_found(loop: Loop, way: str) -> None:
    loop.trunk.extend([nn.Linear(8, 8), nn.LayerNorm(8)])
    z = loop.trunk(loop.x)
    more: dict[str, Any] = {"module": {"shared": loop.trunk}, "graph": {}, "features": {"features": {"z": z}}}
    outcome = balancer("gn", NAMES).step(loop.losses(z), **more[way])
    losses = loop.losses().values()
    rows = [torch.autograd.grad(y, [loop.trunk[2].weight], retain_graph=True)[0] for y in losses]  # type: ignore[list-item]
    assert outcome.norms == pytest.approx([float(row.norm()) for row in rows])


def test_conflicts_are_counted(loop: Loop) -> None:
    b = balancer("recon", NAMES, method="cagrad")
    b.step(loop.losses(), shared=loop.trunk)
    assert list(b.conflicts().layers) == ["0"]  # type: ignore[operator]
    sentence = "balancer 'recon': conflicts are counted by layer, and no shared parameter has one in its name"
    refused(b, loop.losses(), sentence)
    loop.trunk.requires_grad_(False)
    b.step(loop.losses(), shared=loop.trunk)


def test_looking_back(loop: Loop) -> None:
    b = balancer("famo", NAMES)
    optimizer = torch.optim.SGD(loop.parameters, lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        b.step(loop.losses())
        optimizer.step()
        with torch.no_grad():
            b.after_step(loop.losses())
    assert b.memory["logits"].abs().max() > 0
    kept = {name: value.clone() for name, value in b.memory.items()}
    b.step({"parts": loop.losses()["parts"]})
    b.after_step(loop.losses())  # more tasks than took part in the step
    assert torch.isfinite(b.memory["logits"]).all()
    assert b.memory["logits"][0] == kept["logits"][0]
    for other, sentence in ((b, "losses: 'x' is not a task"), (balancer("famo", NAMES), "there was none")):
        with pytest.raises(ConfigError, match=sentence):
            other.after_step({"x" if other is b else "parts": torch.ones(())})
    assert "one more forward pass" in b.cost()


def test_pure_function(loop: Loop) -> None:
    j = np.random.default_rng(0).standard_normal((3, 9))
    w, state = weights("gradvac", j @ j.T)
    again, _ = weights("gvac", j @ j.T, state, seed=3)
    assert w.shape == again.shape == (3,)


@pytest.mark.parametrize(
    ("name", "gramian", "more", "sentence"),
    [
        (
            "moco",
            np.eye(2),
            {},
            "balancer 'moco' needs the gradients themselves, a Gramian is not enough",
        ),
        ("cagard", np.eye(2), {}, "unknown balancer 'cagard'; did you mean 'cagrad'?"),
        ("cagrad", "x", {}, "gramian: is not numeric, expected finite numbers"),
        ("cagrad", [[1], [1, 2]], {}, "gramian: is not numeric"),
        ("cagrad", np.zeros((0, 0)), {}, "gramian: is empty or not finite"),
        ("cagrad", np.ones((2, 3)), {}, "not a Gramian, expected J @ J.T, [T, T], got 'shape (2, 3)'"),
        ("cagrad", [[1, 0.5], [-0.5, 1]], {}, "not a Gramian"),
        ("cagrad", [[1, 5], [5, 1]], {}, "not a Gramian"),
        ("uw", np.eye(2), {"losses": [1, float("nan")]}, "losses: is empty or not finite"),
        ("uw", np.eye(2), {"losses": [1]}, "Gramian, losses and state are of different tasks, got '2 rows"),
        ("uw", np.eye(2), {"state": {"s": np.zeros(3)}}, "Gramian, losses and state are of different tasks"),
        ("pcgrad", np.eye(6), {"order": "expected"}, "order 'expected' is for at most 5 tasks, got 6; use"),
    ],
)
def test_pure_function_refuses(name: str, gramian: Any, more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)) as caught:
        weights(name, gramian, **more)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("cagard", {}, "unknown balancer 'cagard'; did you mean 'cagrad'?"),
        ("grad_norm", {}, "unknown balancer 'grad_norm'; did you mean 'gradnorm'?"),
        (
            "pivrg",
            {"gaps": {"part": 1}},
            "balancer.gaps: 'part' is not a task of this run; did you mean 'parts'?",
        ),
        ("cagrad", {"rescal": 1}, "rescal: unknown key; did you mean 'rescale'? (cagrad takes"),
        ("cagrad", {"c": -1}, "c: input should be greater than or equal to 0, got -1"),
        ("cagrad", {"mode": "stale"}, "stale:K"),
    ],
)
def test_wrong_settings(name: str, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises((ConfigError, ConfigErrors), match=re.escape(sentence)) as caught:
        balancer(name, NAMES, **settings)
    assert "\n" not in str(caught.value)


def test_tasks_that_are_no_names() -> None:
    with pytest.raises(ConfigError, match="tasks are a list of names, expected text, got 1"):
        balancer("uw", [1, 2])  # type: ignore[list-item]


def test_another_network(loop: Loop) -> None:
    """Without ``shared``, what is shared is found again when the losses come from another network."""
    b = balancer("cagrad", NAMES)
    b.step(loop.losses())
    other = Loop()
    assert set(b.step(other.losses()).weights) == set(NAMES)
    assert all(p.grad is not None for p in other.trunk.parameters())


def test_losses_below_zero_have_no_logarithm(loop: Loop) -> None:
    losses = {name: loss - 100 for name, loss in loop.losses().items()}
    with pytest.raises(NonFiniteLossError, match="divides by losses, and that of task"):
        balancer("db_mtl", NAMES).step(losses)


def test_one_task(loop: Loop) -> None:
    with pytest.warns(PolytaskWarning, match="'nash' has one task, whose gradient it leaves as it is"):
        b = balancer("nash", ["depth"])
    balancer("fixed", ["depth"])
    assert b.step({"depth": loop.losses()["depth"]}).weights == {"depth": 1.0}
    with pytest.raises(ConfigError, match="at least one task is needed"):
        balancer("nash", [])
    with pytest.raises(ConfigError, match="tasks: tasks are a list of names, expected"):
        balancer("nash", "depth")


def refused(b: Any, losses: dict[str, Tensor], sentence: str, **more: Any) -> None:
    with pytest.raises((ConfigError, NonFiniteLossError), match=re.escape(sentence)) as caught:
        b.step(losses, **more)
    assert "\n" not in str(caught.value)


def test_what_is_no_loss_no_feature_and_not_shared(loop: Loop) -> None:
    b, losses = balancer("mgda", NAMES), loop.losses()
    wrong: Any = [*losses.values()]
    refused(b, wrong, "losses: losses go by task, expected {task: scalar, ...}, got 'list'")
    refused(b, {}, "losses: losses go by task, expected {task: scalar, ...}, got 'none'")
    wrong = {**losses, "parts": 1.0}
    refused(b, wrong, "losses: the loss of task 'parts' is no scalar, got 'float'")
    refused(b, losses, "features: features are tensors, got 'int'", features=[1])
    for shared in (loop.trunk[0].weight, loop.trunk.named_parameters(), [loop.trunk(loop.x)], [], 3):
        if shared is not loop.trunk[0].weight:
            refused(b, losses, "shared: is a module or its parameters, got ", shared=shared)
    sentence = "parts[1]: 'x' is not a task"
    modo = balancer("modo", NAMES)
    refused(modo, losses, sentence, parts=[loop.losses(), {"x": losses["depth"]}])
    bad = [loop.losses(), {name: loss * float("inf") for name, loss in loop.losses().items()}]
    refused(modo, losses, "the loss of task 'depth' is inf", parts=bad)
    assert "w" not in modo.memory


def test_what_does_not_belong_together(loop: Loop) -> None:
    z, losses = loop.trunk(loop.x), loop.losses()
    bad = {**losses, "parts": losses["parts"].detach()}
    refused(balancer("mgda", NAMES), bad, "the loss of task 'parts' does not depend on parameters that train")
    bad = {**losses, "parts": z}
    refused(balancer("mgda", NAMES), bad, "the loss of task 'parts' is no scalar, got 'shape [5, 8]'")
    bad = {**losses, "dept": losses["parts"]}
    refused(balancer("mgda", NAMES), bad, "losses: 'dept' is not a task of this run; did you mean 'depth'?")
    other = nn.Linear(3, 3)
    refused(
        balancer("mgda", NAMES), losses, "the loss of task 'depth' does not depend on any shared parameter",
        shared=other,
    )  # fmt: skip
    bad = {**losses, "parts": loop.heads["parts"](loop.x.repeat(1, 2)).mean()}
    sentence = "the loss of task 'parts' does not depend on any shared parameter"
    refused(balancer("mgda", NAMES), bad, sentence, shared=loop.trunk)
    sentence = "the features are not a function of the shared parameters"
    cut = z.detach().requires_grad_()
    refused(balancer("mgda", NAMES), loop.losses(cut), sentence, shared=loop.trunk, features=cut)
    sentence = "the loss of task 'depth' does not depend on the features"
    refused(balancer("mgda", NAMES), losses, sentence, features=loop.trunk(loop.x))
    sentence = "a loss depends on shared parameters past the features"
    mixed = {name: loss + loop.trunk[0].bias.sum() for name, loss in loop.losses(z).items()}
    refused(balancer("mgda", NAMES), mixed, sentence, shared=loop.trunk, features=z)
    sentence = "features[1]: depends on another one; give the heads `z.view_as(z)` of each"
    z = loop.trunk(loop.x)
    further = 2 * z
    refused(balancer("mgda", NAMES), loop.losses(z + further), sentence, features=[z, further])
    with pytest.warns(PolytaskWarning):
        b = balancer("mgda", NAMES, mode="features")
    refused(b, loop.losses(), "mode 'features' needs tensors that all tasks share")


@pytest.mark.parametrize("name", ["uw", "upgrad", "moco"])
def test_losses_that_are_not_numbers(loop: Loop, name: str) -> None:
    def losses() -> dict[str, Tensor]:
        return {"depth": loop.losses()["depth"] * float("nan"), "parts": loop.losses()["parts"]}

    refused(balancer(name, NAMES), losses(), "the loss of task 'depth' is nan, expected a finite loss")
    b = balancer(name, NAMES, nonfinite="skip")
    for _ in range(PATIENCE - 1):
        outcome = b.step(losses(), shared=loop.trunk)
        assert list(outcome.weights) == ["parts"]
    assert all(g is None or torch.isfinite(g).all() for g in loop.gradients())
    refused(b, losses(), "the loss of task 'depth' is nan", shared=loop.trunk)
