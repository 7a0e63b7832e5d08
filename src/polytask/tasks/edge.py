"""Boundaries of objects."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from polytask.config import Spec, register
from polytask.metrics.base import Metric
from polytask.metrics.boundary import BoundaryScore, Truth
from polytask.metrics.edge import BoundaryF
from polytask.tasks.saliency import BinaryTask


class Boundary(Spec):
    """How the published score of boundaries is computed."""

    max_dist: float = Field(default=0.0075, gt=0.0, le=1.0, description="fraction of the diagonal")
    truth: Truth = Field(default="lines", description="the true lines: those of the map, or their contours")


@register("task")
class Edge(BinaryTask):
    """Boundary detection, scored by an F with one pixel of tolerance, and by odsF in ``polytask eval``."""

    type: Literal["edge"] = "edge"
    positive_weight: float | None = Field(
        default=0.95, gt=0.0, lt=1.0, description="loss weight of edge pixels; batch statistics if null"
    )
    boundary: Boundary | None = Field(
        default=Boundary(), description="odsF, oisF and AP in `polytask eval`; none if null"
    )

    headline: ClassVar[str] = "F_tol"
    higher_is_better: ClassVar[bool] = True

    @property
    def balance(self) -> float | None:
        return self.positive_weight

    def metrics(self) -> tuple[Metric, ...]:
        exact = self.boundary
        return (BoundaryF(), *([BoundaryScore(exact.max_dist, exact.truth)] if exact else []))
