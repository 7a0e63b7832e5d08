from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from polytask.metrics.depth import DepthError

TARGET = torch.tensor([[[[1.0, 2.0, 4.0], [0.0, 10.0, 100.0]]]])
PREDICTION = torch.tensor([[[1.2, 2.0, 7.0], [5.0, -3.0, 90.0]]])


def test_by_formula() -> None:
    metric = DepthError(cap=50.0)
    metric.update(PREDICTION, TARGET)
    p, g = np.array([1.2, 2.0, 7.0, 1e-9]), np.array([1.0, 2.0, 4.0, 10.0])
    ratio = np.maximum(p / g, g / p)
    expected = {
        "rmse": np.sqrt(((p - g) ** 2).mean()),
        "log_rmse": np.sqrt(((np.log(p) - np.log(g)) ** 2).mean()),
        "abs_err": np.abs(p - g).mean(),
        "abs_rel": (np.abs(p - g) / g).mean(),
        "sq_rel": ((p - g) ** 2 / g).mean(),
        **{f"delta{k}": 100 * (ratio < 1.25**k).mean() for k in (1, 2, 3)},
    }
    assert metric.compute() == pytest.approx(expected, rel=1e-6)


def test_cap() -> None:
    metric = DepthError()
    metric.update(PREDICTION, TARGET)
    assert int(metric.state["pixels"][0]) == 5
    capped = DepthError(cap=10.0)  # the cap itself is out
    capped.update(PREDICTION, TARGET)
    assert int(capped.state["pixels"][0]) == 3


def test_nothing_seen_is_nan() -> None:
    metric = DepthError()
    metric.update(PREDICTION, torch.zeros_like(TARGET))
    assert all(math.isnan(score) for score in metric.compute().values())
