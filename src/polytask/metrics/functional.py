"""The scores of one batch as pure functions; each is ``Metric.of`` of the class it names, with its settings.

Predictions are as ``Task.predict`` returns them, targets as in the batch, results as from ``Metric.compute``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from polytask.metrics.attributes import AttributeF1
from polytask.metrics.boundary import THRESHOLDS, BoundaryScore, Truth
from polytask.metrics.classification import Accuracy
from polytask.metrics.depth import DepthError
from polytask.metrics.edge import BoundaryF
from polytask.metrics.normals import AngularError
from polytask.metrics.reconstruction import ImageError
from polytask.metrics.retrieval import Retrieval
from polytask.metrics.saliency import MaxF, SaliencyIoU
from polytask.metrics.segmentation import Absent, MeanIoU

Scores = dict[str, float]


def segmentation_scores(
    prediction: Tensor, target: Tensor, classes: Sequence[str], absent: Absent = "skip"
) -> Scores:
    """``MeanIoU`` of class ids ``[B, H, W]``."""
    return MeanIoU(tuple(classes), absent).of(prediction, target)


def saliency_iou(prediction: Tensor, target: Tensor, *, rowwise: bool = False) -> Scores:
    """``SaliencyIoU`` of probabilities ``[B, H, W]``."""
    return SaliencyIoU(rowwise=rowwise).of(prediction, target)


def max_f(
    prediction: Tensor, target: Tensor, levels: int = 19, *, ends: bool = False, double_sigmoid: bool = False
) -> Scores:
    """``MaxF`` of probabilities ``[B, H, W]``."""
    return MaxF(levels, ends=ends, double_sigmoid=double_sigmoid).of(prediction, target)


def boundary_f(prediction: Tensor, target: Tensor) -> Scores:
    """``BoundaryF`` of probabilities ``[B, H, W]``."""
    return BoundaryF().of(prediction, target)


def boundary_score(
    prediction: Tensor,
    target: Tensor,
    max_dist: float = 0.0075,
    truth: Truth = "lines",
    thresholds: Sequence[float] = THRESHOLDS,
) -> Scores:
    """``BoundaryScore`` of probabilities ``[B, H, W]``."""
    return BoundaryScore(max_dist, truth, thresholds).of(prediction, target)


def angular_error(
    prediction: Tensor,
    target: Tensor,
    *,
    normalize_target: bool = True,
    sum_test: bool = False,
    rmse_as_published: bool = False,
) -> Scores:
    """``AngularError`` of vectors ``[B, 3, H, W]``."""
    metric = AngularError(
        normalize_target=normalize_target, sum_test=sum_test, rmse_as_published=rmse_as_published
    )
    return metric.of(prediction, target)


def depth_error(prediction: Tensor, target: Tensor, cap: float | None = None) -> Scores:
    """``DepthError`` of meters ``[B, H, W]``."""
    return DepthError(cap).of(prediction, target)


def accuracy(prediction: Tensor, target: Tensor) -> Scores:
    """``Accuracy`` of classes ``[B]``."""
    return Accuracy().of(prediction, target)


def attribute_f1(prediction: Tensor, target: Tensor) -> Scores:
    """``AttributeF1`` of attributes ``[B, K]``."""
    return AttributeF1(target.shape[1]).of(prediction, target)


def retrieval_scores(prediction: Tensor, target: Tensor) -> Scores:
    """``Retrieval`` of embeddings ``[B, D]``."""
    return Retrieval(prediction.shape[1]).of(prediction, target)


def image_error(prediction: Tensor, target: Tensor) -> Scores:
    """``ImageError`` of images ``[B, 3, H, W]``."""
    return ImageError().of(prediction, target)
