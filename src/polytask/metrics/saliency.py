"""Scores of probability maps at many thresholds, from one histogram of the probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from polytask.metrics.base import IGNORE, Metric


def passed(values: Tensor, groups: Tensor, size: int, thresholds: Tensor, *, strict: bool = False) -> Tensor:
    """How many values of each group reach each threshold, int64 ``[size, K + 1]``; column 0 counts all.

    Exact: a value's bin is the number of thresholds it reaches, found by comparison.

    Args:
        values: of any shape.
        groups: group of each value, integers of the same shape; ``size`` for values that do not count.
        size: number of groups.
        thresholds: ascending, ``[K]``.
        strict: test ``value > t`` instead of ``value >= t``.
    """
    bins = len(thresholds) + 1
    places = groups.int().flatten() * bins + _reached(values.flatten(), thresholds.to(values), strict=strict)
    histogram = torch.bincount(places, minlength=(size + 1) * bins)
    return histogram.view(size + 1, bins)[:size].flip(1).cumsum(1).flip(1)


def _reached(values: Tensor, thresholds: Tensor, *, strict: bool) -> Tensor:
    """How many thresholds ``[K]`` each value ``[n]`` reaches, int32, NaN all; as ``bucketize``.

    Of even thresholds, division tells that up to one, and two comparisons the rest: several times as fast.
    """
    last = len(thresholds) - 1
    step = (thresholds[-1] - thresholds[0]) / max(last, 1)
    even = thresholds[0] + step * torch.arange(last + 1).to(thresholds)
    if not last or (thresholds - even).abs().max() > step / 8:
        return torch.bucketize(values, thresholds, right=not strict, out_int32=True)
    about = ((values - thresholds[0]) / step + 1).clamp_(0, last + 1).nan_to_num_(last + 1).int()
    infinite = thresholds.new_full((1,), float("inf"))
    below, above = torch.cat([-infinite, thresholds]), torch.cat([thresholds, infinite])
    low, high = below[about], above[about]
    up, down = (values > high, values <= low) if strict else (values >= high, values < low)
    return about.add_(up.int()).sub_(down.int()).clamp_(0, last + 1)  # at infinity a step too far


def f_score(precision: Tensor, recall: Tensor, beta2: float = 1.0) -> Tensor:
    """Weighted harmonic mean of precision and recall; 0 where it is undefined."""
    return ((1 + beta2) * precision * recall / (beta2 * precision + recall)).nan_to_num(0.0)


class MaxF(Metric):
    """``maxF``: best F (beta² = 0.3) over evenly spaced thresholds, counts pooled over the set, percent.

    Achanta et al., CVPR 2009; a pixel is salient if p >= t.

    Args:
        levels: number of thresholds, 19 (.05, .10 … .95) in the InvPT family of evaluators.
        ends: thresholds from 0 to 1, both included; the score is then called ``maxF_<levels>``. 256 of them
            are the bytes of a picture, as in work on saliency alone.
        double_sigmoid: pass the probability through a second sigmoid, as most of those evaluators do by
            mistake; for comparison with published numbers.
    """

    beta2 = 0.3

    def __init__(self, levels: int = 19, *, ends: bool = False, double_sigmoid: bool = False) -> None:
        within = torch.arange(levels) / (levels - 1) if ends else torch.arange(1, levels + 1) / (levels + 1)
        self.name = f"maxF_{levels}" if ends else "maxF"
        self.double_sigmoid, self.thresholds = double_sigmoid, within
        super().__init__()

    def zeros(self) -> dict[str, Tensor]:
        return {"passed": torch.zeros(2, len(self.thresholds) + 1, dtype=torch.int64)}

    def counts(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        truth = target.reshape(prediction.shape).int()
        values = prediction.float().sigmoid() if self.double_sigmoid else prediction.float()
        return {"passed": passed(values, truth.masked_fill(truth == IGNORE, 2), 2, self.thresholds)}

    def compute(self) -> dict[str, float]:
        negatives, positives = self.state["passed"].double()
        if negatives[0] + positives[0] == 0:
            return {self.name: float("nan")}
        hits = positives[1:]
        f = f_score(hits / (hits + negatives[1:]), hits / positives[0], self.beta2)
        return {self.name: 100 * float(f.max())}


class SaliencyIoU(Metric):
    """``mIoU`` and ``maxF1`` in percent: best over 15 thresholds of scores averaged over images.

    The saliency protocol of the ASTMT family of evaluators: thresholds .20, .25 … .90, a pixel is salient if
    p > t, IoU is 1 where truth and prediction are both empty, F1 comes from mean precision and mean recall.
    Images without any valid pixel are left out.

    Args:
        rowwise: take every row of pixels for an image, as those evaluators do by mistake at batch size 1
            (AdaMTL); for comparison with published numbers.
    """

    thresholds = torch.linspace(0.2, 0.9, 15, dtype=torch.float64)

    def __init__(self, *, rowwise: bool = False) -> None:
        self.rowwise = rowwise
        super().__init__()

    def zeros(self) -> dict[str, Tensor]:
        names = ("iou", "precision", "recall")
        sums = {name: torch.zeros(len(self.thresholds), dtype=torch.float64) for name in names}
        return {**sums, "images": torch.zeros((), dtype=torch.int64)}

    def counts(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        if self.rowwise:
            prediction = prediction.flatten(0, 1)[:, None]  # [B H, 1, W]
        truth = target.reshape(prediction.shape).int()  # [B, H, W]
        valid, size = truth != IGNORE, 2 * len(truth)
        groups = torch.arange(0, size, 2).to(truth).view(-1, 1, 1) + truth
        above = passed(prediction.float(), groups.where(valid, size), size, self.thresholds, strict=True)
        seen = valid.flatten(1).any(1)
        negatives, positives = (
            above.view(-1, 2, above.shape[1])[seen].double().unbind(1)
        )  # [seen, K + 1] each
        hits, predicted, true = positives[:, 1:], (negatives + positives)[:, 1:], positives[:, :1]
        union = predicted + true - hits
        return {
            "iou": torch.where(union > 0, hits / union, 1.0).sum(0),
            "precision": (hits / predicted.clamp(min=1)).sum(0),
            "recall": (hits / true.clamp(min=1)).sum(0),
            "images": seen.sum(),
        }

    def compute(self) -> dict[str, float]:
        images = self.state["images"].double()
        iou, precision, recall = (self.state[name] / images for name in ("iou", "precision", "recall"))
        f1 = f_score(precision, recall) if images else iou
        return {"mIoU": 100 * float(iou.max()), "maxF1": 100 * float(f1.max())}
