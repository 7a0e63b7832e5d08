"""Scores of image-level attributes."""

from __future__ import annotations

import torch
from torch import Tensor

from polytask.metrics.base import Metric


class AttributeF1(Metric):
    """``F1`` and ``accuracy``, in percent, averaged over attributes; unknown targets (-1) do not count.

    F1 of one attribute is 2 TP / (2 TP + FP + FN) over the whole set, 0 without any positive (Liu et al.,
    FAMO, NeurIPS 2023, as used for CelebA).
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
        f1 = torch.where(tp + fp + fn > 0, 2 * tp / (2 * tp + fp + fn).clamp(min=1), 0.0)
        return f1, (tp + tn) / (tp + fp + fn + tn)

    def compute(self) -> dict[str, float]:
        f1, accuracy = self.per_attribute()
        return {"F1": 100 * float(f1.mean()), "accuracy": 100 * float(accuracy.mean())}
