"""A vector per image that is close for images of one identity: metric learning."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from polytask.config import register
from polytask.errors import DataError
from polytask.losses import supervised_contrastive
from polytask.metrics.base import Metric, Total
from polytask.metrics.normals import unit_vectors
from polytask.metrics.retrieval import Retrieval
from polytask.tasks.base import Task, identity


@register("task")
class Embedding(Task):
    """A unit vector per image, scored by retrieval. A raw label is the number of an identity, or -1."""

    type: Literal["embedding"] = "embedding"
    dimension: int = Field(default=128, ge=2, description="length of the vector")
    temperature: float = Field(default=0.1, gt=0.0, description="of the contrastive loss")

    dense: ClassVar[bool] = False
    headline: ClassVar[str] = "recall_1"
    higher_is_better: ClassVar[bool] = True

    @property
    def channels(self) -> int:
        return self.dimension

    def encode(self, raw: Tensor) -> Tensor:
        if int(raw) < -1:
            raise DataError("image with an unknown identity", got=int(raw), expected="0 or more, or -1")
        return raw.long()

    def loss(self, logits: Tensor, target: Tensor, total: Total = identity) -> Tensor | None:
        return supervised_contrastive(logits, target, total, temperature=self.temperature)

    def predict(self, logits: Tensor) -> Tensor:
        return unit_vectors(logits)

    def metrics(self) -> tuple[Metric, ...]:
        return (Retrieval(self.dimension),)

    def colorize(self, prediction: np.ndarray) -> np.ndarray:
        """One shade of grey per number, which lies in -1..1; the number of an identity is black or white."""
        shades: np.ndarray = np.rint(127.5 * (1 + prediction.clip(-1, 1))).astype(np.uint8)
        return shades.reshape(1, -1, 1).repeat(3, axis=2)

    def caption(self, prediction: np.ndarray) -> str:
        """The number of an identity, or the first numbers of a vector."""
        return f"{prediction}" if not prediction.ndim else " ".join(f"{x:.2f}" for x in prediction[:4]) + " …"
