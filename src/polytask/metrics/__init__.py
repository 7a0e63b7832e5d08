"""Metrics, for recipes and for loops of one's own: ``update`` with batches, then ``compute``.

``metric.of(prediction, target)`` is a metric's pure function: the scores of one batch, with nothing kept. The
functions of ``polytask.metrics.functional`` are the same without an object.
"""

from __future__ import annotations

from polytask.metrics.attributes import AttributeF1
from polytask.metrics.base import MeanOfBatches, Metric
from polytask.metrics.boundary import BoundaryScore, boundary_counts
from polytask.metrics.classification import Accuracy
from polytask.metrics.delta import delta_m, delta_m_per_task
from polytask.metrics.depth import DepthError
from polytask.metrics.edge import BoundaryF
from polytask.metrics.functional import (
    accuracy,
    angular_error,
    attribute_f1,
    boundary_f,
    boundary_score,
    depth_error,
    image_error,
    max_f,
    retrieval_scores,
    saliency_iou,
    segmentation_scores,
)
from polytask.metrics.matching import largest_matching
from polytask.metrics.normals import AngularError, angles
from polytask.metrics.reconstruction import ImageError
from polytask.metrics.retrieval import Retrieval, nearest
from polytask.metrics.saliency import MaxF, SaliencyIoU, f_score, passed
from polytask.metrics.segmentation import MeanIoU, class_accuracy, class_iou, confusion, mean_iou

__all__ = [
    "Accuracy", "AngularError", "AttributeF1", "BoundaryF", "BoundaryScore", "DepthError", "ImageError",
    "MaxF", "MeanIoU", "MeanOfBatches", "Metric", "Retrieval", "SaliencyIoU", "accuracy", "angles",
    "angular_error", "attribute_f1", "boundary_counts", "boundary_f", "boundary_score", "class_accuracy",
    "class_iou", "confusion", "delta_m", "delta_m_per_task", "depth_error", "f_score", "image_error",
    "largest_matching", "max_f", "mean_iou", "nearest", "passed", "retrieval_scores", "saliency_iou",
    "segmentation_scores",
]  # fmt: skip
