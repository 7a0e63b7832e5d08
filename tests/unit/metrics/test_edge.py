from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.metrics.edge import BoundaryF


def line(column: int) -> Tensor:
    image = torch.zeros(1, 1, 8, 8)
    image[..., column] = 1
    return image


def score(prediction: Tensor, target: Tensor) -> float:
    metric = BoundaryF()
    metric.update(prediction, target)
    return metric.compute()["F_tol"]


def test_one_pixel_of_tolerance() -> None:
    target = line(3).long()
    assert [score(line(3 + shift)[:, 0], target) for shift in (0, 1, 2)] == [100, 100, 0]


def test_thick_boundaries_lose_precision() -> None:
    wide = sum(line(c) for c in range(1, 6))[:, 0]  # type: ignore[union-attr]
    assert score(wide, line(3).long()) == pytest.approx(100 * 2 * 0.6 / 1.6)


def test_is_that_of_a_loop() -> None:
    g = torch.Generator().manual_seed(0)
    target = (torch.rand(3, 1, 12, 10, generator=g) < 0.15).long()
    prediction = (0.35 * target[:, 0] + 0.65 * torch.rand(3, 12, 10, generator=g)).clamp(0, 1)
    target[torch.rand(target.shape, generator=g) < 0.1] = 255
    valid, true = target[:, 0] != 255, target[:, 0] == 1
    best = 0.0
    for t in (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95):
        positive = (prediction >= t) & valid
        near = [F.max_pool2d(x.float(), 3, 1, 1).bool() for x in (positive, true)]
        precision = float((positive & near[1]).sum()) / max(1, int(positive.sum()))
        recall = float((true & near[0]).sum()) / float(true.sum())
        best = max(best, 2 * precision * recall / max(1e-12, precision + recall))
    assert score(prediction, target) == pytest.approx(100 * best, rel=1e-9)


def test_predictions_where_nothing_is_labeled_do_not_count() -> None:
    target = line(3).long()
    target[..., 5:] = 255
    assert score((line(3) + line(6))[:, 0], target) == 100
    beside = line(3).long()
    beside[..., 4] = 255
    assert score(line(4)[:, 0], beside) == 0


def test_empty_maps() -> None:
    nothing = torch.zeros(1, 1, 8, 8, dtype=torch.long)
    assert score(torch.zeros(1, 8, 8), nothing) == 100
    assert score(torch.zeros(1, 8, 8), line(3).long()) == 0
    assert score(0.9 * line(3)[:, 0], nothing) == 100  # at the highest threshold nothing is predicted
    assert score(line(3)[:, 0], nothing) == 0
    assert math.isnan(score(torch.zeros(1, 8, 8), torch.full((1, 1, 8, 8), 255)))
