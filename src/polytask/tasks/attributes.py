"""Several yes-or-no facts per image."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from polytask.config import register
from polytask.errors import DataError
from polytask.losses import attribute_bce
from polytask.metrics.attributes import AttributeF1
from polytask.metrics.base import Metric, Total
from polytask.tasks.base import Task, identity


@register("task")
class Attributes(Task):
    """Image-level attributes, scored by mean F1. A raw label holds 0, 1 or -1 (unknown) per attribute."""

    type: Literal["attributes"] = "attributes"
    names: tuple[str, ...] = Field(min_length=1)

    dense: ClassVar[bool] = False
    headline: ClassVar[str] = "F1"
    higher_is_better: ClassVar[bool] = True

    @property
    def channels(self) -> int:
        return len(self.names)

    def encode(self, raw: Tensor) -> Tensor:
        values = raw.long()
        if values.shape != (len(self.names),) or not ((values >= -1) & (values <= 1)).all():
            expected = f"{len(self.names)} values of 0, 1 or -1"
            raise DataError("image with unknown attribute values", got=values.tolist(), expected=expected)
        return values

    def unknown(self, height: int, width: int) -> Tensor:  # noqa: ARG002 - not a map
        return torch.full((len(self.names),), -1)

    def loss(self, logits: Tensor, target: Tensor, total: Total = identity) -> Tensor | None:
        return attribute_bce(logits, target, total)

    def predict(self, logits: Tensor) -> Tensor:
        """0 or 1 per attribute, ``[B, K]``."""
        return (logits > 0).long()

    def metrics(self) -> tuple[Metric, ...]:
        return (AttributeF1(len(self.names)),)

    def colorize(self, prediction: np.ndarray) -> np.ndarray:
        """One pixel per attribute, white where it holds; the words are in ``caption``."""
        strip: np.ndarray = np.repeat((prediction.reshape(1, -1, 1) > 0) * np.uint8(255), 3, axis=2)
        return strip

    def caption(self, prediction: np.ndarray) -> str:
        return (
            ", ".join(name for name, value in zip(self.names, prediction, strict=True) if value > 0) or "none"
        )
