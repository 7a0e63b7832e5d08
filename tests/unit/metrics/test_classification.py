from __future__ import annotations

import math

import pytest
import torch

from polytask.metrics.classification import Accuracy


def test_unknown_images_do_not_count() -> None:
    metric = Accuracy()
    metric.update(torch.tensor([0, 1, 2, 1]), torch.tensor([0, 2, 2, -1]))
    assert metric.compute()["accuracy"] == pytest.approx(200 / 3)


def test_nothing_seen_is_nan() -> None:
    metric = Accuracy()
    metric.update(torch.tensor([1]), torch.tensor([-1]))
    assert math.isnan(metric.compute()["accuracy"])
