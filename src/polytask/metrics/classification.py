"""Accuracy of image-level classes."""

from __future__ import annotations

import torch
from torch import Tensor

from polytask.metrics.base import Metric


class Accuracy(Metric):
    """``accuracy``: share of images whose class is right, in percent; unknown targets (-1) do not count."""

    def zeros(self) -> dict[str, Tensor]:
        return {"images": torch.zeros(2, dtype=torch.int64)}

    def counts(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        known = target >= 0
        return {"images": torch.stack([(known & (prediction == target)).sum(), known.sum()])}

    def compute(self) -> dict[str, float]:
        right, known = self.state["images"].double()
        return {"accuracy": 100 * float(right / known)}
