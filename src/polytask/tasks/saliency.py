"""One probability per pixel, and saliency: which pixels catch the eye."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from polytask.config import register
from polytask.data.maps import ClassMap
from polytask.errors import DataError
from polytask.losses import balanced_bce
from polytask.metrics.base import IGNORE, Metric, Total
from polytask.metrics.saliency import MaxF, SaliencyIoU
from polytask.tasks.base import Task, identity

_GREY_IGNORE = 128


class BinaryTask(Task):
    """A yes or no per pixel, trained with class-balanced cross entropy.

    Raw labels are 0, 1 or 255 = ignore.
    """

    @property
    @abstractmethod
    def balance(self) -> float | None:
        """Weight of positives in (0, 1); None takes the fraction of negatives in each batch."""

    @property
    def channels(self) -> int:
        return 1

    def encode(self, raw: Tensor) -> ClassMap:
        if raw.is_floating_point() or not 0 <= raw.min() <= raw.max() <= 1:  # else nothing to look for
            unknown = (raw != 0) & (raw != 1) & (raw != IGNORE)
            if unknown.any():
                got = raw[unknown][0].item()
                raise DataError("binary label map with another value", got=got, expected="0, 1 or 255")
        return ClassMap(raw[None])

    def loss(self, logits: Tensor, target: Tensor, total: Total = identity) -> Tensor | None:
        return balanced_bce(self._odds(logits), target, total, positive_weight=self.balance)

    def predict(self, logits: Tensor) -> Tensor:
        return self._odds(logits.float())[:, 0].sigmoid()

    def _odds(self, logits: Tensor) -> Tensor:
        """Of a softmax over no and yes, if there are two channels: ``[B, 1, H, W]``."""
        return logits if self.channels == 1 else logits[:, 1:] - logits[:, :1]

    def colorize(self, prediction: np.ndarray) -> np.ndarray:
        """Probabilities, or labels as integers, in shades of grey; ignored pixels are mid-grey."""
        values = prediction.reshape(prediction.shape[-2:])
        shades = np.rint(255 * np.clip(values, 0, 1)).astype(np.uint8)
        if np.issubdtype(values.dtype, np.integer):
            shades[values == IGNORE] = _GREY_IGNORE
        return np.repeat(shades[..., None], 3, axis=-1)


@register("task")
class Saliency(BinaryTask):
    """Saliency, scored by the best mean IoU over thresholds (headline) and by maxF."""

    type: Literal["saliency"] = "saliency"
    positive_weight: float | None = Field(
        default=None, gt=0.0, lt=1.0, description="loss weight of salient pixels; batch statistics if unset"
    )
    double_sigmoid: bool = Field(default=False, description="maxF as most published evaluators compute it")

    levels: int = Field(default=19, ge=1, description="thresholds of maxF")
    rowwise: bool = Field(default=False, description="mIoU per row of pixels, as AdaMTL's evaluator has it")
    two_channels: bool = Field(
        default=False, description="logits of both classes, as the InvPT line has them"
    )

    headline: ClassVar[str] = "mIoU"
    higher_is_better: ClassVar[bool] = True

    @property
    def channels(self) -> int:
        return 2 if self.two_channels else 1

    @property
    def balance(self) -> float | None:
        return self.positive_weight

    def metrics(self) -> tuple[Metric, ...]:
        published = MaxF(self.levels, double_sigmoid=self.double_sigmoid)
        return SaliencyIoU(rowwise=self.rowwise), published, MaxF(256, ends=True)
