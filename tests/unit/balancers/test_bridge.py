"""Aggregators of torchjd."""

from __future__ import annotations

import sys

import pytest
import torch

from polytask.balancers import balancer
from polytask.errors import ConfigError, MissingDependencyError
from tests.unit.balancers.test_face import NAMES, Loop

torchjd = pytest.importorskip("torchjd")


def test_direction_is_that_of_the_aggregator() -> None:
    from torchjd.aggregation import AlignedMTL, PCGrad

    for name, other in (("AlignedMTL", AlignedMTL(scale_mode="rmse")), ("PCGrad", PCGrad())):
        loop = Loop()
        settings = {"scale_mode": "rmse"} if name == "AlignedMTL" else {}
        b = balancer("torchjd", NAMES, aggregator=name, settings=settings)
        outcome = b.step(loop.losses(), shared=loop.trunk)
        shared = list(loop.trunk.parameters())
        mine = torch.cat([p.grad.reshape(-1) for p in shared])  # type: ignore[union-attr]
        rows = torch.stack([
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(y, shared, retain_graph=True)])
            for y in loop.losses().values()
        ])  # fmt: skip
        torch.testing.assert_close(mine, other(rows))
        torch.testing.assert_close(torch.tensor([*outcome.weights.values()]).float() @ rows, mine)


def test_gradients_that_an_aggregator_refuses() -> None:
    loop = Loop()
    b = balancer("torchjd", NAMES, aggregator="Constant", settings={"weights": [1.0, 2.0]})
    assert b.step(loop.losses(), shared=loop.trunk).weights == pytest.approx({"depth": 1.0, "parts": 2.0})
    assert b.step({"parts": loop.losses()["parts"]}, shared=loop.trunk).weights == {"parts": 1.0}
    b = balancer("torchjd", NAMES, aggregator="Krum", settings={"n_byzantine": 1})
    with pytest.raises(ConfigError, match="Krum of torchjd refuses these gradients"):
        b.step(loop.losses(), shared=loop.trunk)


def test_bad_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="torchjd has no aggregator 'UPgrad'; did you mean 'UPGrad'"):
        balancer("torchjd", NAMES, aggregator="UPgrad")
    with pytest.raises(ConfigError, match="UPGrad refuses these settings"):
        balancer("torchjd", NAMES, aggregator="UPGrad", settings={"x": 1})
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(MissingDependencyError, match="torchjd is not installed; pip install"):
        balancer("torchjd", NAMES, aggregator="UPGrad")
