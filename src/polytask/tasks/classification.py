"""One class per image."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from polytask.config import register
from polytask.errors import DataError
from polytask.losses import cross_entropy
from polytask.metrics.base import Metric, Total
from polytask.metrics.classification import Accuracy
from polytask.tasks.base import Task, identity
from polytask.tasks.segmentation import bit_palette

UNKNOWN = -1
"""The id of images without a label."""


@register("task")
class Classification(Task):
    """Image classification, scored by top-1 accuracy. A raw label is an id, or -1 where unknown."""

    type: Literal["classification"] = "classification"
    classes: tuple[str, ...] = Field(min_length=2, description="names in the order of the ids")

    dense: ClassVar[bool] = False
    headline: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    @property
    def channels(self) -> int:
        return len(self.classes)

    def encode(self, raw: Tensor) -> Tensor:
        if not UNKNOWN <= int(raw) < len(self.classes):
            expected = f"0 to {len(self.classes) - 1}, or {UNKNOWN} where unknown"
            raise DataError("image with an unknown class id", got=int(raw), expected=expected)
        return raw.long()

    def loss(self, logits: Tensor, target: Tensor, total: Total = identity) -> Tensor | None:
        return cross_entropy(logits, target, total, ignore=UNKNOWN)

    def predict(self, logits: Tensor) -> Tensor:
        return logits.argmax(1)

    def metrics(self) -> tuple[Metric, ...]:
        return (Accuracy(),)

    def colorize(self, prediction: np.ndarray) -> np.ndarray:
        """A swatch of one pixel; the words are in ``caption``."""
        swatch: np.ndarray = bit_palette(self.channels + 1)[int(prediction) + 1].reshape(1, 1, 3)
        return swatch

    def caption(self, prediction: np.ndarray) -> str:
        return self.classes[int(prediction)] if int(prediction) >= 0 else "unknown"
