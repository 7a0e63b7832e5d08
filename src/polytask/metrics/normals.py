"""Angular error of surface normals, in degrees."""

from __future__ import annotations

import torch
from torch import Tensor

from polytask.metrics.base import Metric


def unit_vectors(vectors: Tensor, dim: int = 1) -> Tensor:
    """Vectors divided by (length + 1e-12); zero stays zero and passes on a gradient of ordinary size."""
    square = vectors.square().sum(dim, keepdim=True)  # on CPU far faster than a norm over three elements
    return vectors / (torch.where(square > 0, square, 1.0).sqrt() + 1e-12)


def angles(
    prediction: Tensor, target: Tensor, *, normalize_target: bool = True, sum_test: bool = False
) -> Tensor:
    """Angle between prediction and target, degrees, float64 ``[B, H, W]``; NaN where the target is invalid.

    By atan2(|p x g|, p . g), which stays accurate at 0 and 180 degrees; a zero prediction is 90 off.

    Args:
        prediction: ``[B, 3, H, W]``, any length.
        target: ``[B, 3, H, W]``, (0, 0, 0) = invalid.
        normalize_target: if off, a target shorter than 1 makes the angle larger (see ``AngularError``).
        sum_test: a target is valid if its components do not add up to 0 (see ``AngularError``).
    """
    valid = target.sum(1) != 0 if sum_test else (target != 0).any(1)  # [B, H, W]
    if not normalize_target:
        cosine = (unit_vectors(prediction.float()) * target).sum(1)
        return torch.rad2deg(torch.acos(cosine.double().clamp(-1, 1))).where(valid, float("nan"))
    (x, y, z), (u, v, w) = prediction.float().unbind(1), target.float().unbind(1)  # [B, H, W] each
    along = x * u + y * v + z * w
    across = ((y * w - z * v) ** 2 + (z * u - x * w) ** 2 + (x * v - y * u) ** 2).sqrt()
    # In float32 the last bit would depend on the batch: torch's atan2 treats the ends of arrays differently.
    theta = torch.atan2(across.double(), along.double())
    theta = theta.masked_fill((across == 0) & (along == 0), torch.pi / 2)
    return torch.rad2deg(theta).where(valid, float("nan"))


class AngularError(Metric):
    """``mean``, ``median`` and ``rmse`` in degrees and ``within_11.25 / 22.5 / 30`` in percent of the pixels.

    The median is read from a histogram that adds up over batches: it is exact to 0.005 degrees.

    Args: for comparison with published numbers only
        normalize_target: the early evaluators of the ASTMT family do not.
        sum_test: those of the MTAN family lose the vectors whose components add up to 0.
        rmse_as_published: what tables of the ASTMT family call "rmse" is the mean.
    """

    limits = (11.25, 22.5, 30.0)
    bins_per_degree = 100

    def __init__(
        self, *, normalize_target: bool = True, sum_test: bool = False, rmse_as_published: bool = False
    ) -> None:
        self.normalize_target, self.sum_test = normalize_target, sum_test
        self.rmse_as_published = rmse_as_published
        super().__init__()

    def zeros(self) -> dict[str, Tensor]:
        return {
            "sums": torch.zeros(2, dtype=torch.float64),
            "histogram": torch.zeros(180 * self.bins_per_degree, dtype=torch.int64),
        }

    def counts(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        modes = {"normalize_target": self.normalize_target, "sum_test": self.sum_test}
        theta = angles(prediction, target, **modes)
        unknown, bins = theta.isnan(), 180 * self.bins_per_degree
        wide = theta.masked_fill(unknown, 0)
        place = (wide * self.bins_per_degree).long().clamp(max=bins - 1).masked_fill(unknown, bins)
        return {
            "sums": torch.stack([wide.sum(), (wide * wide).sum()]),
            "histogram": torch.bincount(place.flatten(), minlength=bins + 1)[:bins],
        }

    def compute(self) -> dict[str, float]:
        pixels = self.state["histogram"].sum()
        mean, square = (self.state["sums"] / pixels).tolist()
        below = [self.state["histogram"][: int(limit * self.bins_per_degree)].sum() for limit in self.limits]
        within = [100 * float(count / pixels.double()) for count in below]
        rmse = mean if self.rmse_as_published else square**0.5
        scores = {"mean": mean, "median": self._median(int(pixels)), "rmse": rmse}
        return scores | {f"within_{limit:g}": share for limit, share in zip(self.limits, within, strict=True)}

    def _median(self, pixels: int) -> float:
        if pixels == 0:
            return float("nan")
        middle = torch.tensor([(pixels - 1) // 2, pixels // 2])  # ranks from 0; the same one if odd
        bins = torch.searchsorted(self.state["histogram"].cumsum(0), middle, right=True)
        return float((bins + 0.5).mean()) / self.bins_per_degree
