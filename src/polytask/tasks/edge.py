"""Boundaries of objects."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from polytask.config import register
from polytask.metrics.base import Metric
from polytask.metrics.edge import BoundaryF
from polytask.tasks.saliency import BinaryTask


@register("task")
class Edge(BinaryTask):
    """Boundary detection, scored during training by an F with one pixel of tolerance."""

    type: Literal["edge"] = "edge"
    positive_weight: float | None = Field(
        default=0.95, gt=0.0, lt=1.0, description="loss weight of edge pixels; batch statistics if null"
    )

    headline: ClassVar[str] = "F_tol"
    higher_is_better: ClassVar[bool] = True

    @property
    def balance(self) -> float | None:
        return self.positive_weight

    def metrics(self) -> tuple[Metric, ...]:
        return (BoundaryF(),)
