"""One class per pixel: semantic segmentation, and human parts as a segmentation of another name."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from polytask.config import register
from polytask.data.maps import ClassMap
from polytask.errors import DataError
from polytask.losses import cross_entropy
from polytask.metrics.base import IGNORE, Metric, Total
from polytask.metrics.segmentation import Absent, MeanIoU
from polytask.tasks.base import Task, identity

Intensity = Annotated[int, Field(ge=0, le=255)]
Color = tuple[Intensity, Intensity, Intensity]


def bit_palette(size: int) -> np.ndarray:
    """The PASCAL VOC colors by formula, uint8 ``[size, 3]``: the bits of an id, dealt to r, g and b in turn.

    Bit 3k of the id becomes bit 7 - k of red, bit 3k + 1 of green, bit 3k + 2 of blue.
    """
    ids = np.arange(size)[:, None] >> np.arange(3)  # [size, 3]
    bits = [((ids >> 3 * k) & 1) << (7 - k) for k in range(8)]
    palette: np.ndarray = np.sum(bits, axis=0).astype(np.uint8)
    return palette


@register("task")
class Segmentation(Task):
    """Semantic segmentation or human parts, scored by the mean intersection over union.

    Raw labels are ids below the number of classes, or 255 where a pixel is not labeled.
    """

    type: Literal["segmentation"] = "segmentation"
    classes: tuple[str, ...] = Field(
        min_length=2, max_length=IGNORE, description="names in the order of the ids"
    )
    palette: tuple[Color, ...] | None = Field(
        default=None, description="color per class; the VOC colors if unset"
    )
    absent: Absent = Field(
        default="skip", description="a class that never occurs: skip it, count 0, or make NaN"
    )
    empty_is_ignored: bool = Field(
        default=False,
        description="a map with nothing but class 0 says nothing, as human parts without a person",
    )

    headline: ClassVar[str] = "mIoU"
    higher_is_better: ClassVar[bool] = True

    @model_validator(mode="after")
    def _one_color_per_class(self) -> Self:
        if self.palette is not None and len(self.palette) != len(self.classes):
            raise ValueError(f"palette has {len(self.palette)} colors for {len(self.classes)} classes")
        return self

    @property
    def channels(self) -> int:
        return len(self.classes)

    def encode(self, raw: Tensor) -> ClassMap:
        if raw.is_floating_point() and (raw.frac() != 0).any():  # NaN and infinity have a fraction
            got = float(raw[raw.frac() != 0][0])
            raise DataError("label map with a value that is no integer", got=got)
        if not 0 <= raw.min() <= raw.max() < len(self.classes):  # else there is nothing to look for
            unknown = ((raw < 0) | (raw >= len(self.classes))) & (raw != IGNORE)
            if unknown.any():
                expected = f"0 to {len(self.classes) - 1}, or {IGNORE} where unlabeled"
                got = int(raw[unknown][0])
                raise DataError("label map with an unknown class id", got=got, expected=expected)
        return ClassMap(raw[None], empty_is_ignored=self.empty_is_ignored)

    def loss(self, logits: Tensor, target: Tensor, total: Total = identity) -> Tensor | None:
        return cross_entropy(logits, target, total)

    def predict(self, logits: Tensor) -> Tensor:
        return logits.argmax(1)

    def metrics(self) -> tuple[Metric, ...]:
        return (MeanIoU(self.classes, self.absent),)

    def colorize(self, prediction: np.ndarray) -> np.ndarray:
        """Class ids ``[H, W]`` or ``[1, H, W]`` in the colors of the palette; 255 is black."""
        colors: np.ndarray = np.zeros((IGNORE + 1, 3), np.uint8)
        chosen = bit_palette(self.channels) if self.palette is None else np.array(self.palette, np.uint8)
        colors[: self.channels] = chosen
        picture: np.ndarray = colors[prediction.reshape(prediction.shape[-2:])]
        return picture
