"""Errors of depth maps, pooled over all valid pixels of the set."""

from __future__ import annotations

import torch
from torch import Tensor

from polytask.metrics.base import Metric

_TINY = 1e-9
"""Lower bound of depths, for the sake of logarithms and ratios."""


class DepthError(Metric):
    """``rmse`` and ``abs_err`` in meters, ``log_rmse``, ``abs_rel``, ``sq_rel``, ``delta1/2/3`` in percent.

    Eigen et al., NeurIPS 2014: delta_k is the share of pixels with max(p / g, g / p) < 1.25^k. Predictions
    below 1e-9 are raised to it first, as all published evaluators do.

    Args:
        cap: pixels whose true depth is not below it (meters) are left out.
    """

    def __init__(self, cap: float | None = None) -> None:
        self.cap = cap
        super().__init__()

    def zeros(self) -> dict[str, Tensor]:
        return {"sums": torch.zeros(5, dtype=torch.float64), "pixels": torch.zeros(4, dtype=torch.int64)}

    def counts(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        true = target.reshape(prediction.shape)
        valid = (true > 0) & (true < (float("inf") if self.cap is None else self.cap))
        p, g = (maps.float().clamp(min=_TINY).where(valid, 1.0) for maps in (prediction, true))
        error, ratio = (p - g).abs(), p / g
        sums = (error**2, ratio.log() ** 2, error, error / g, error**2 / g)
        larger = torch.maximum(ratio, g / p).where(valid, float("inf"))
        near = [(larger < 1.25**k).sum() for k in (1, 2, 3)]
        return {
            "sums": torch.stack([values.sum(dtype=torch.float64) for values in sums]),
            "pixels": torch.stack([valid.sum(), *near]),
        }

    def compute(self) -> dict[str, float]:
        pixels = self.state["pixels"].double()
        square, log_square, absolute, relative, square_relative = (self.state["sums"] / pixels[0]).tolist()
        shares = (100 * pixels[1:] / pixels[0]).tolist()
        return {
            "rmse": square**0.5,
            "log_rmse": log_square**0.5,
            "abs_err": absolute,
            "abs_rel": relative,
            "sq_rel": square_relative,
            **{f"delta{k}": share for k, share in enumerate(shares, 1)},
        }
