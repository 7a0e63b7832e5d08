from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.metrics.normals import AngularError, angles, unit_vectors


def tilted(degrees: Tensor) -> Tensor:
    """Vectors at the given angles to the x axis, ``[1, 3, 1, n]``."""
    radians = torch.deg2rad(degrees.double())
    return torch.stack([radians.cos(), radians.sin(), torch.zeros_like(radians)])[None, :, None].float()


def axis(n: int) -> Tensor:
    return tilted(torch.zeros(n))


def test_angles_are_accurate_where_acos_is_not() -> None:
    degrees = torch.tensor([0.0, 0.001, 0.01, 45.0, 90.0, 179.99, 179.999, 180.0])
    found = angles(3 * tilted(degrees), axis(8))[0, 0]
    torch.testing.assert_close(found, degrees.double(), atol=2e-5, rtol=0)


def test_zero_prediction_is_a_right_angle_off() -> None:
    assert angles(torch.zeros(1, 3, 1, 1), axis(1)).item() == pytest.approx(90.0)


def test_invalid_pixels_do_not_count() -> None:
    target = axis(3)
    target[..., 1] = 0
    target[..., 2] = torch.tensor([0.5, -0.5, 0.0]).view(1, 3, 1)  # components sum to zero, yet valid
    assert angles(axis(3), target).isnan().tolist() == [[[False, True, False]]]


def test_short_targets_without_normalizing() -> None:
    theta = angles(axis(1), 0.5 * axis(1), normalize_target=False)
    assert theta.item() == pytest.approx(60.0, abs=1e-4)
    assert angles(axis(1), 0.5 * axis(1)).item() == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("n", [7, 8])
def test_scores(n: int) -> None:
    degrees = torch.linspace(5.003, 80.7, n)
    metric = AngularError()
    metric.update(tilted(degrees), axis(n))
    scores, true = metric.compute(), degrees.double().numpy()
    assert scores["mean"] == pytest.approx(true.mean(), abs=1e-4)
    assert scores["rmse"] == pytest.approx(float(np.sqrt((true**2).mean())), abs=1e-4)
    assert scores["median"] == pytest.approx(float(np.median(true)), abs=0.00502)
    for limit in ("11.25", "22.5", "30"):
        assert scores[f"within_{limit}"] == pytest.approx(100 * (true < float(limit)).mean())


def test_opposite_falls_into_the_last_bin() -> None:
    metric = AngularError()
    metric.update(-axis(1), axis(1))
    assert metric.compute()["median"] == pytest.approx(180, abs=0.0051)


def test_nothing_seen_is_nan() -> None:
    metric = AngularError()
    metric.update(axis(2), torch.zeros(1, 3, 1, 2))
    assert all(math.isnan(score) for score in metric.compute().values())


def test_unit_vectors() -> None:
    vectors = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(unit_vectors(vectors), F.normalize(vectors, dim=1))
    assert not unit_vectors(torch.zeros(1, 3, 1, 1)).any()
