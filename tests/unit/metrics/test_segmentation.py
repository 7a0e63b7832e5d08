from __future__ import annotations

import math

import pytest
import torch

from polytask.errors import DataError
from polytask.metrics.segmentation import MeanIoU, confusion

NAMES = ("a", "b", "c", "d")
TARGET = torch.tensor([[[[0, 0, 1], [1, 2, 255]]]])
PREDICTION = torch.tensor([[[0, 1, 1], [1, 0, 2]]])


def metric(absent: str = "skip") -> MeanIoU:
    made = MeanIoU(NAMES, absent)  # type: ignore[arg-type]
    made.update(PREDICTION, TARGET)
    return made


def test_by_hand() -> None:
    per_class = metric().per_class()
    assert per_class["a"] == pytest.approx(100 / 3)
    assert per_class["b"] == pytest.approx(200 / 3)
    assert per_class["c"] == 0
    assert math.isnan(per_class["d"])
    scores = metric().compute()
    assert scores["pixel_accuracy"] == pytest.approx(60)
    assert scores["mean_accuracy"] == pytest.approx(50)


def test_absent_classes() -> None:
    assert metric("skip").compute()["mIoU"] == pytest.approx(100 / 3)
    assert metric("zero").compute()["mIoU"] == pytest.approx(25)
    assert math.isnan(metric("nan").compute()["mIoU"])


def test_with_and_without_background() -> None:
    scores = MeanIoU(("a", "background", "c", "d")).of(PREDICTION, TARGET)
    assert scores["mIoU"] == metric().compute()["mIoU"]
    assert scores["mIoU_foreground"] == pytest.approx((100 / 3 + 0) / 2)
    zero = MeanIoU(("background", "b", "c", "d"), "zero").of(PREDICTION, TARGET)
    assert zero["mIoU_foreground"] == pytest.approx(200 / 3 / 3)
    assert "mIoU_foreground" not in metric().compute()


def test_unknown_predictions_are_misses_only() -> None:
    matrix = confusion(torch.tensor([[[3, 7]]]), torch.tensor([[[1, 1]]]), 3)
    assert matrix.tolist() == [[0, 0, 0, 0], [0, 0, 0, 2], [0, 0, 0, 0]]
    made = MeanIoU(("a", "b", "c"))
    made.update(torch.tensor([[[9, 1, 0]]]), torch.tensor([[[1, 1, 0]]]))
    assert made.per_class()["b"] == pytest.approx(50)
    assert made.compute()["mIoU"] == pytest.approx(75)


def test_unknown_label_is_an_error() -> None:
    with pytest.raises(DataError, match=r"expected 0 to 2 or 255, got 3"):
        confusion(torch.zeros(1, 1, 2), torch.tensor([[[3, 0]]]), 3)


def test_nothing_seen_is_nan() -> None:
    for absent in ("skip", "zero", "nan"):
        made = MeanIoU(NAMES, absent)  # type: ignore[arg-type]
        made.update(PREDICTION, torch.full_like(TARGET, 255))
        assert all(math.isnan(score) for score in made.compute().values())
