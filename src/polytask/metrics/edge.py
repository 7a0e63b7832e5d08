"""A cheap score of boundary maps for use during training; the published odsF needs exact matching."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.metrics.base import IGNORE, Metric
from polytask.metrics.saliency import f_score, passed


class BoundaryF(Metric):
    """``F_tol``: best F over the thresholds .05, .15 … .95 with a tolerance of one pixel, in percent.

    A predicted pixel is right if a true one lies in its 3x3 neighborhood, a true pixel is found if a
    predicted one lies in its. Counts are pooled over the set. Unlike in odsF, matches are not one to one and
    predictions are not thinned: a thick boundary costs nothing within the tolerance.
    """

    thresholds = torch.arange(0.5, 10) / 10

    def zeros(self) -> dict[str, Tensor]:
        size = len(self.thresholds) + 1
        return {
            "predicted": torch.zeros(2, size, dtype=torch.int64),
            "true": torch.zeros(size, dtype=torch.int64),
        }

    def counts(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        truth = target.reshape(prediction.shape)  # [B, H, W]
        valid, edge = truth != IGNORE, truth == 1
        values = prediction.float() * valid
        near_edge = _dilate(edge.float()) > 0
        # The dilation of a thresholded map is the thresholded dilation, so one pass serves all thresholds.
        found = passed(
            _dilate(values)[edge], edge.new_zeros(int(edge.sum()), dtype=torch.long), 1, self.thresholds
        )
        return {
            "predicted": passed(values, near_edge.long().where(valid, 2), 2, self.thresholds),
            "true": found[0],
        }

    def compute(self) -> dict[str, float]:
        far, near = self.state["predicted"].double()
        if far[0] + near[0] == 0:
            return {"F_tol": float("nan")}
        precision = (near / (near + far))[1:].nan_to_num(1.0)  # nothing predicted: no mistake
        true = self.state["true"].double()
        recall = (true / true[0])[1:].nan_to_num(1.0)
        return {"F_tol": 100 * float(f_score(precision, recall).max())}


def _dilate(maps: Tensor) -> Tensor:
    """Maximum over each 3x3 neighborhood, ``[B, H, W]``."""
    return F.max_pool2d(maps, 3, stride=1, padding=1)
