"""The head of image-level tasks: a mean and a linear layer."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from polytask.config import register
from polytask.heads.base import HeadSpec


@register("head")
class PooledHead(HeadSpec):
    """Mean over the map, then one linear layer: image-level classes."""

    type: Literal["pooled"] = "pooled"
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    dense: ClassVar[bool] = False

    def build(self, channels: int, outputs: int) -> nn.Module:
        """Pool, drop, classify."""
        return Pooled(channels, outputs, self.dropout)


class Pooled(nn.Module):
    """See ``PooledHead``."""

    def __init__(self, channels: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.dropout, self.linear = nn.Dropout(dropout), nn.Linear(channels, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, h, w]`` -> ``[B, outputs]``."""
        logits: Tensor = self.linear(self.dropout(x.mean((2, 3))))
        return logits
