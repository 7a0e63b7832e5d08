"""The head of HRNet: one hidden layer of 1x1 convolutions."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from polytask.config import register
from polytask.heads.base import HeadSpec
from polytask.parallel import BatchNorm2d


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
