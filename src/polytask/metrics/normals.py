"""Angular error of surface normals, in degrees."""

from __future__ import annotations

import torch
from torch import Tensor

from polytask.metrics.base import Metric


def unit_vectors(vectors: Tensor, dim: int = 1) -> Tensor:
    """Vectors divided by (length + 1e-12); zero stays zero and passes on a gradient of ordinary size."""
    square = vectors.square().sum(dim, keepdim=True)  # on CPU far faster than a norm over three elements
    return vectors / (torch.where(square > 0, square, 1.0).sqrt() + 1e-12)


def angles(prediction: Tensor, target: Tensor, *, normalize_target: bool = True) -> Tensor:
    """Angle between prediction and target at every valid pixel, degrees ``[n]``.

    By 2 atan2(|p - g|, |p + g|), which stays accurate at 0 and 180 degrees; a zero prediction is 90 off.

    Args:
        prediction: ``[B, 3, H, W]``, any length.
        target: ``[B, 3, H, W]``, (0, 0, 0) = invalid.
        normalize_target: if off, a target shorter than 1 makes the angle larger (see ``AngularError``).
    """
    valid = (target != 0).any(1)  # [B, H, W]
    p = unit_vectors(prediction.movedim(1, 0)[:, valid].float(), dim=0)  # [3, n]
    g = target.movedim(1, 0)[:, valid].float()
    if not normalize_target:
        return torch.rad2deg(torch.acos((p * g).sum(0).clamp(-1, 1)))
    g = unit_vectors(g, dim=0)
    apart, along = (p - g).square().sum(0).sqrt(), (p + g).square().sum(0).sqrt()
    return torch.rad2deg(2 * torch.atan2(apart, along))


class AngularError(Metric):
    """``mean``, ``median`` and ``rmse`` in degrees and ``within_11.25 / 22.5 / 30`` in percent of the pixels.

    The median is read from a histogram that adds up over batches: it is exact to 0.005 degrees. What tables
    of the ASTMT family call "rmse" is their mean error.

    Args:
        normalize_target: the early evaluators of the ASTMT family did not; for comparison with their numbers.
    """

    limits = (11.25, 22.5, 30.0)
    bins_per_degree = 100

    def __init__(self, *, normalize_target: bool = True) -> None:
        self.normalize_target = normalize_target
        super().__init__()

    def zeros(self) -> dict[str, Tensor]:
        return {
            "sums": torch.zeros(2, dtype=torch.float64),
            "within": torch.zeros(len(self.limits), dtype=torch.int64),
            "histogram": torch.zeros(180 * self.bins_per_degree, dtype=torch.int64),
        }

    def counts(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        theta = angles(prediction, target, normalize_target=self.normalize_target)
        wide, bins = theta.double(), 180 * self.bins_per_degree
        return {
            "sums": torch.stack([wide.sum(), (wide * wide).sum()]),
            "within": torch.stack([(theta < limit).sum() for limit in self.limits]),
            "histogram": torch.bincount(
                (wide * self.bins_per_degree).long().clamp(max=bins - 1), minlength=bins
            ),
        }

    def compute(self) -> dict[str, float]:
        pixels = self.state["histogram"].sum()
        mean, square = (self.state["sums"] / pixels).tolist()
        within = (100 * self.state["within"].double() / pixels).tolist()
        scores = {"mean": mean, "median": self._median(int(pixels)), "rmse": square**0.5}
        return scores | {f"within_{limit:g}": share for limit, share in zip(self.limits, within, strict=True)}

    def _median(self, pixels: int) -> float:
        if pixels == 0:
            return float("nan")
        middle = torch.tensor([(pixels - 1) // 2, pixels // 2])  # ranks from 0; the same one if odd
        bins = torch.searchsorted(self.state["histogram"].cumsum(0), middle, right=True)
        return float((bins + 0.5).mean()) / self.bins_per_degree
