"""Scores of image-level attributes."""

from __future__ import annotations

import torch
from torch import Tensor

from polytask.metrics.base import Metric


class AttributeF1(Metric):
    """``F1``, ``accuracy`` and ``error``, in percent, averaged over attributes; unknown (-1) does not count.

    F1 of one attribute is 2 TP / (2 TP + FP + FN) over the whole set, 0 without any positive (Liu et al.,
    FAMO, NeurIPS 2023, as used for CelebA); the error is 100 - accuracy (Sener & Koltun, NeurIPS 2018).
    """

    def __init__(self, attributes: int) -> None:
        self.attributes = attributes
        super().__init__()

    def zeros(self) -> dict[str, Tensor]:
        return {"table": torch.zeros(4, self.attributes, dtype=torch.int64)}

    def counts(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        positive, yes, no = prediction > 0, target == 1, target == 0
        cells = (positive & yes, positive & no, ~positive & yes, ~positive & no)
        return {"table": torch.stack([cell.sum(0) for cell in cells])}

    def per_attribute(self) -> tuple[Tensor, Tensor]:
        """F1 and accuracy of each attribute as fractions, ``[K]``."""
        tp, fp, fn, tn = self.state["table"].double()
        known = tp + fp + fn + tn  # without any, both are NaN
        f1 = 2 * tp / (2 * tp + fp + fn).clamp(min=1) + 0 / known
        return f1, (tp + tn) / known

    def compute(self) -> dict[str, float]:
        f1, accuracy = self.per_attribute()
        right = 100 * float(accuracy.nanmean())
        return {"F1": 100 * float(f1.nanmean()), "accuracy": right, "error": 100 - right}
