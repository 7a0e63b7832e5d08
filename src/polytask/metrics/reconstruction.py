"""Errors of reconstructed images."""

from __future__ import annotations

import torch
from torch import Tensor

from polytask.metrics.base import Metric


class ImageError(Metric):
    """``MAE`` of values in 0..1 and ``PSNR`` in decibels, at most 100, both averaged over images."""

    def zeros(self) -> dict[str, Tensor]:
        return {"sums": torch.zeros(2, dtype=torch.float64), "images": torch.zeros((), dtype=torch.int64)}

    def counts(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        apart = (prediction - target).flatten(1).double()
        psnr = -10 * apart.square().mean(1).clamp(min=1e-10).log10()
        sums = torch.stack([apart.abs().mean(1).sum(), psnr.sum()])
        return {"sums": sums, "images": torch.tensor(len(apart))}

    def compute(self) -> dict[str, float]:
        mae, psnr = (self.state["sums"] / self.state["images"]).tolist()
        return {"MAE": mae, "PSNR": psnr}
