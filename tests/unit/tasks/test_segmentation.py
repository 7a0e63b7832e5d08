from __future__ import annotations

import numpy as np
import pytest
import torch

from polytask.config import decode, encode
from polytask.errors import ConfigErrors, DataError
from polytask.tasks.segmentation import Segmentation, bit_palette

TASK = Segmentation(classes=("background", "cat", "dog"))


def test_palette_is_that_of_pascal_voc() -> None:
    colors = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        8: (64, 0, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
    }
    palette = bit_palette(256)
    assert {i: tuple(palette[i].tolist()) for i in colors} == colors
    assert tuple(palette[255].tolist()) == (224, 224, 192)
    assert len(np.unique(palette, axis=0)) == 256


def test_own_palette() -> None:
    task = Segmentation(classes=("a", "b"), palette=((1, 2, 3), (4, 5, 6)))
    picture = task.colorize(np.array([[0, 1, 255]]))
    assert picture.tolist() == [[[1, 2, 3], [4, 5, 6], [0, 0, 0]]]
    with pytest.raises(ConfigErrors, match="palette has 1 colors for 2 classes"):
        decode(Segmentation, {"classes": ["a", "b"], "palette": [[1, 2, 3]]})
    with pytest.raises(ConfigErrors, match=r"palette\.0\.1"):
        decode(Segmentation, {"classes": ["a", "b"], "palette": [[1, 256, 3], [4, 5, 6]]})


def test_a_class_is_never_enough() -> None:
    with pytest.raises(ConfigErrors, match="classes"):
        decode(Segmentation, {"classes": ["a"]})


def test_encode_refuses_unknown_ids() -> None:
    with pytest.raises(DataError, match="expected 0 to 2, or 255 where unlabeled, got 7"):
        TASK.encode(torch.tensor([[0, 7]], dtype=torch.uint8))
    with pytest.raises(DataError, match="got -1"):
        TASK.encode(torch.tensor([[0, -1]]))


def test_parts_say_nothing_without_a_person() -> None:
    raw = torch.zeros(4, 4, dtype=torch.uint8)
    parts = Segmentation(classes=TASK.classes, empty_is_ignored=True)
    assert parts.encode(raw).empty_is_ignored
    assert not TASK.encode(raw).empty_is_ignored


def test_absent_reaches_the_metric() -> None:
    (metric,) = Segmentation(classes=("a", "b"), absent="zero").metrics()
    metric.update(torch.zeros(1, 2, 2, dtype=torch.long), torch.zeros(1, 1, 2, 2, dtype=torch.long))
    assert metric.compute()["mIoU"] == 50


def test_round_trip() -> None:
    task = Segmentation(classes=("a", "b"), palette=((1, 2, 3), (4, 5, 6)), weight=2.0)
    assert decode(Segmentation, encode(task)) == task


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf")])
def test_values_between_classes_are_refused(value: float) -> None:
    raw = torch.tensor([[0.0, 1.0], [255.0, value]])
    with pytest.raises(DataError, match=r"a value that is no integer, got (0\.5|nan|inf)"):
        Segmentation(classes=("a", "b")).encode(raw)
    raw[1, 1] = 0
    assert Segmentation(classes=("a", "b")).encode(raw).tolist() == [[[0, 1], [255, 0]]]
