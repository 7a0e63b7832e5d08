"""The image itself, as an autoencoder gives it back."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from polytask.config import register
from polytask.data.maps import Mirror
from polytask.metrics.base import Metric, Total
from polytask.metrics.reconstruction import ImageError
from polytask.tasks.base import Task, identity


@register("task")
class Reconstruction(Task):
    """The image as the model sees it, in 0..1: mean squared error, scored by the mean absolute error."""

    type: Literal["reconstruction"] = "reconstruction"

    of_image: ClassVar[bool] = True
    headline: ClassVar[str] = "MAE"
    higher_is_better: ClassVar[bool] = False

    @property
    def channels(self) -> int:
        return 3

    def encode(self, raw: Tensor) -> Mirror:
        return Mirror(raw)

    def loss(self, logits: Tensor, target: Tensor, total: Total = identity) -> Tensor | None:
        values = total(torch.tensor(target.numel(), device=target.device))
        return (logits.float() - target).square().sum() / values

    def predict(self, logits: Tensor) -> Tensor:
        return logits.clamp(0, 1)

    def metrics(self) -> tuple[Metric, ...]:
        return (ImageError(),)

    def colorize(self, prediction: np.ndarray) -> np.ndarray:
        colors: np.ndarray = np.rint(255 * np.moveaxis(prediction, 0, -1)).astype(np.uint8)
        return colors
