"""Per-task output layers."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from polytask.config import Spec, register
from polytask.parallel import BatchNorm2d


class HeadSpec(Spec):
    """Builds the output layer of one task from the neck's map."""

    type: str
    dense: ClassVar[bool]
    """Whether the output is a map (else one vector per image)."""

    @abstractmethod
    def build(self, channels: int, outputs: int) -> nn.Module:
        """``[B, channels, h, w]`` -> ``[B, outputs, h, w]`` (dense) or ``[B, outputs]``."""


@register("head")
class HRNetHead(HeadSpec):
    """1x1 convolution, batch norm, ReLU, 1x1 convolution (Wang et al., HRNet, TPAMI 2020)."""

    type: Literal["hrnet"] = "hrnet"
    width: int = Field(default=4, ge=1, description="hidden channels over input channels")
    dense: ClassVar[bool] = True

    def build(self, channels: int, outputs: int) -> nn.Module:
        """Four layers, numbered as in the official checkpoints."""
        hidden = channels * self.width
        return nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, outputs, 1),
        )


@register("head")
class ConvHead(HeadSpec):
    """3x3 convolution, then 1x1, with nothing between (Liu, Johns, Davison, MTAN, CVPR 2019)."""

    type: Literal["conv"] = "conv"
    width: int = Field(default=64, ge=0, description="hidden channels; 0 for the 1x1 convolution alone")
    dense: ClassVar[bool] = True

    def build(self, channels: int, outputs: int) -> nn.Module:
        """One or two layers."""
        last = nn.Conv2d(self.width or channels, outputs, 1)
        return nn.Sequential(nn.Conv2d(channels, self.width, 3, padding=1), last) if self.width else last


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
