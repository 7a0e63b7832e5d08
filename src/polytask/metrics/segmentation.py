"""Intersection over union and accuracy of label maps, from one integer confusion matrix."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from polytask.errors import DataError
from polytask.metrics.base import IGNORE, Metric

Absent = Literal["skip", "zero", "nan"]
"""What a class without any true or predicted pixel does to the mean: left out, counted as 0, or NaN."""


def confusion(prediction: Tensor, target: Tensor, classes: int, ignore: int = IGNORE) -> Tensor:
    """Pixels per true class (rows) and predicted class (columns), int64 ``[C, C + 1]``.

    The last column takes predicted ids >= C: they miss their true class and are no false positive of any.

    Args:
        prediction: class ids, ``[B, H, W]``.
        target: class ids, ``[B, 1, H, W]`` or ``[B, H, W]``.
        classes: C.
        ignore: the target id of pixels that do not count.

    Raises:
        DataError: a target id is neither below ``classes`` nor ``ignore``.
    """
    truth = target.reshape(prediction.shape).long()
    cells = truth * (classes + 1) + prediction.long().clamp(max=classes) + 1
    cells = cells.masked_fill(truth == ignore, 0)  # a bin of their own: faster than leaving them out
    counts = torch.bincount(cells.flatten(), minlength=classes * (classes + 1) + 1)[1:]
    if counts.numel() > classes * (classes + 1):
        got = int(truth[truth != ignore].max())
        raise DataError(
            "label map with an unknown class id", got=got, expected=f"0 to {classes - 1} or {ignore}"
        )
    return counts.view(classes, classes + 1)


def class_iou(matrix: Tensor) -> Tensor:
    """Fraction TP / (TP + FP + FN) of each class, float64 ``[C]``; NaN where a class is absent."""
    hits, predicted, true = _marginals(matrix)
    return hits / (true + predicted - hits)


def class_accuracy(matrix: Tensor) -> Tensor:
    """Fraction of each class's true pixels that were found, float64 ``[C]``; NaN without true pixels."""
    hits, _, true = _marginals(matrix)
    return hits / true


def mean_iou(iou: Tensor, absent: Absent = "skip") -> float:
    """Mean of class fractions in which NaN marks an absent class; NaN if all are absent."""
    if iou.isnan().all():
        return float("nan")
    if absent == "skip":
        return float(iou.nanmean())
    return float((iou.nan_to_num(0.0) if absent == "zero" else iou).mean())


def _marginals(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    counts = matrix.double()
    return counts.diagonal(), counts[:, : len(counts)].sum(0), counts.sum(1)


class MeanIoU(Metric):
    """``mIoU``, ``pixel_accuracy`` and ``mean_accuracy`` over all pixels seen, in percent.

    If a class is called ``background``, ``mIoU_foreground`` is the mean over the others.
    The official evaluators of the ASTMT and InvPT families count an absent class as 0 (``absent="zero"``),
    those of the MTAN family let it make the mean NaN (``"nan"``).

    Args:
        classes: names, in the order of the ids.
        absent: see ``Absent``.
        ignore: the target id of pixels that do not count.
    """

    def __init__(self, classes: tuple[str, ...], absent: Absent = "skip", ignore: int = IGNORE) -> None:
        self.classes, self.absent, self.ignore = classes, absent, ignore
        super().__init__()

    def zeros(self) -> dict[str, Tensor]:
        size = len(self.classes)
        return {"confusion": torch.zeros(size, size + 1, dtype=torch.int64)}

    def counts(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"confusion": confusion(prediction, target, len(self.classes), self.ignore)}

    def compute(self) -> dict[str, float]:
        matrix = self.state["confusion"]
        hits, _, true = _marginals(matrix)
        iou, foreground = class_iou(matrix), [name != "background" for name in self.classes]
        scores = {
            "mIoU": 100 * mean_iou(iou, self.absent),
            "pixel_accuracy": 100 * float(hits.sum() / true.sum()),
            "mean_accuracy": 100 * float(class_accuracy(matrix).nanmean()),
        }
        if not all(foreground):
            scores["mIoU_foreground"] = 100 * mean_iou(iou[torch.tensor(foreground)], self.absent)
        return scores

    def per_class(self) -> dict[str, float]:
        """IoU of each class in percent; NaN where a class is absent."""
        return dict(zip(self.classes, (100 * class_iou(self.state["confusion"])).tolist(), strict=True))
