"""Distance to the camera plane, in meters, or its inverse."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from polytask.config import register
from polytask.data.maps import ValueMap
from polytask.errors import DataError
from polytask.losses import masked_l1
from polytask.metrics.base import Metric, Total
from polytask.metrics.depth import DepthError
from polytask.tasks.base import Task, finite, identity

_VIRIDIS = np.array(
    [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=np.float64
)
"""Five evenly spaced colors, ordered by lightness (viridis; van der Walt & Smith, 2015)."""


@register("task")
class Depth(Task):
    """Depth, scored by the root mean square error.

    Raw labels are meters (or inverse depth) ``[H, W]``, 0 = invalid.
    """

    type: Literal["depth"] = "depth"
    inverse: bool = Field(
        default=False, description="labels are inverse depth or disparity: a zoom multiplies them"
    )
    max_depth: float | None = Field(
        default=None, gt=0.0, description="pixels at or beyond this true depth (meters) are not scored"
    )

    headline: ClassVar[str] = "rmse"
    higher_is_better: ClassVar[bool] = False

    @property
    def channels(self) -> int:
        return 1

    def encode(self, raw: Tensor) -> ValueMap:
        depth = finite(raw)
        if depth.min() < 0:
            what = f"depth map with {int((depth < 0).sum())} negative values"
            raise DataError(what, got=f"{float(depth.min()):g}", expected="0 where invalid")
        return ValueMap(depth[None], zoom_power=1 if self.inverse else -1)

    def unknown(self, height: int, width: int) -> Tensor:
        return torch.zeros(height, width)

    def loss(self, logits: Tensor, target: Tensor, total: Total = identity) -> Tensor | None:
        return masked_l1(logits, target, total)

    def predict(self, logits: Tensor) -> Tensor:
        return logits[:, 0].float()

    def metrics(self) -> tuple[Metric, ...]:
        return (DepthError(self.max_depth),)

    def colorize(self, prediction: np.ndarray) -> np.ndarray:
        """Depths from dark (0) to bright (``max_depth``, or the farthest pixel); invalid pixels are black."""
        depth = prediction.reshape(prediction.shape[-2:])
        valid = depth > 0
        farthest = self.max_depth or max(float(depth.max(initial=0.0)), 1e-9)
        position, knots = depth / farthest, np.linspace(0, 1, len(_VIRIDIS))
        shades = np.stack([np.interp(position, knots, channel) for channel in _VIRIDIS.T], axis=-1)
        colors: np.ndarray = np.rint(shades * valid[..., None]).astype(np.uint8)
        return colors
