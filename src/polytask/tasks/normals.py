"""Surface normals: x to the right, y up, z to the camera."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from polytask.config import register
from polytask.data.maps import VectorMap
from polytask.errors import DataError
from polytask.losses import normals_cosine, normals_l1
from polytask.metrics.base import Metric, Total
from polytask.metrics.normals import AngularError, unit_vectors
from polytask.tasks.base import Task, finite, identity

_ZERO, _MEAN, _MOST = 0.02, (0.5, 1.5), 2.0
"""Length up to which a vector is zero (0.007 in 8-bit colors), bounds of the mean length, and the greatest.

Wide, as outputs of networks and interpolated vectors are some percent off, and holes that are black in a
picture of colors have 1.73.
"""


def about_unit(vectors: Tensor, where: str | None = None) -> Tensor:
    """The vectors ``[3, H, W]``; raises DataError if they cannot be meant to have unit length (or zero)."""
    x, y, z = vectors
    length = (x * x).addcmul_(y, y).addcmul_(z, z).sqrt_()
    present = (length > _ZERO).to(length)
    count, most = present.sum(), length.max()
    mean = (length * present).sum() / count.clamp_min(1)
    if count and not (_MEAN[0] <= mean <= _MEAN[1] and most <= _MOST):
        got = f"{mean:.3g} on average, up to {most:.3g}"
        expected = "vectors of length 1, or 0 where invalid"
        raise DataError("normals of another length", where=where, got=got, expected=expected)
    return vectors


@register("task")
class Normals(Task):
    """Surface normals, scored by the mean angular error.

    Raw labels are unit vectors ``[H, W, 3]``, (0, 0, 0) = invalid.
    """

    type: Literal["normals"] = "normals"
    distance: Literal["l1", "l1_sum", "cosine"] = Field(
        default="l1",
        description="the loss: absolute difference of components, their mean or their sum, or 1 - cosine",
    )
    normalize_target: bool = Field(
        default=True, description="off: angles as the early published evaluators compute them"
    )

    sum_test: bool = Field(
        default=False, description="on: scores lose the vectors that the evaluators of the MTAN family lose"
    )

    headline: ClassVar[str] = "mean"
    higher_is_better: ClassVar[bool] = False

    @property
    def channels(self) -> int:
        return 3

    def encode(self, raw: Tensor) -> VectorMap:
        return VectorMap(about_unit(finite(raw, 3).permute(2, 0, 1).contiguous()))

    def unknown(self, height: int, width: int) -> Tensor:
        return torch.zeros(height, width, 3)

    def loss(self, logits: Tensor, target: Tensor, total: Total = identity) -> Tensor | None:
        if self.distance == "cosine":
            return normals_cosine(logits, target, total)
        loss = normals_l1(logits, target, total)
        return loss if loss is None or self.distance == "l1" else 3 * loss

    def predict(self, logits: Tensor) -> Tensor:
        return unit_vectors(logits.float())

    def metrics(self) -> tuple[Metric, ...]:
        return (AngularError(normalize_target=self.normalize_target, sum_test=self.sum_test),)

    def colorize(self, prediction: np.ndarray) -> np.ndarray:
        """Vectors ``[3, H, W]`` as colors (n + 1) / 2; invalid pixels are black."""
        vectors = np.moveaxis(prediction, 0, -1)
        colors: np.ndarray = np.rint(255 * (np.clip(vectors, -1, 1) + 1) / 2).astype(np.uint8)
        colors[~vectors.any(-1)] = 0
        return colors
