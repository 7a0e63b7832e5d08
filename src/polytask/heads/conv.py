"""The head of MTAN: two convolutions, or one."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from polytask.config import register
from polytask.heads.base import HeadSpec


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
