"""The head of the ATRC line: 3x3 convolution of enlarged features, batch norm, GELU, 1x1 convolution."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.config import register
from polytask.heads.base import HeadSpec
from polytask.parallel import BatchNorm2d


@register("head")
class UpsampledHead(HeadSpec):
    """3x3 convolution on the enlarged map, batch norm, GELU, 1x1 convolution (Ye and Xu, ECCV 2022)."""

    type: Literal["upsampled"] = "upsampled"
    factor: int = Field(default=4, ge=1, description="how often larger the map is made, bilinear")
    dense: ClassVar[bool] = True

    def build(self, channels: int, outputs: int) -> nn.Module:
        """Four layers, the first of which enlarges."""
        head = nn.Sequential(
            UpsampledConv2d(channels, self.factor), BatchNorm2d(channels), nn.GELU(),
            nn.Conv2d(channels, outputs, 1),
        )  # fmt: skip
        assert isinstance(head[3], nn.Conv2d) and head[3].bias is not None
        nn.init.normal_(head[3].bias, std=0.02)
        return head


class UpsampledConv2d(nn.Conv2d):
    """A 3x3 convolution of a map enlarged bilinearly, with most of the work done before it is enlarged.

    Mixing channels commutes with interpolation: each of the nine taps is a 1x1 convolution of the small
    map, and its shift goes into the interpolation, rows and columns apart. Exact, also at the borders (a row
    that a shift moves outside the enlarged map is zero there).
    """

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.factor = factor
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, h, w]`` -> ``[B, C, factor h, factor w]``."""
        n, channels, height, width = x.shape
        rows, columns = (_shifted(size, self.factor, x) for size in (height, width))
        # the bias goes to the middle tap, which nothing shifts outside: enlarged, a constant is itself
        bias = None if self.bias is None else F.pad(self.bias, (4 * channels, 4 * channels))
        taps = F.conv2d(x, self.weight.permute(2, 3, 0, 1).reshape(9 * channels, channels, 1, 1), bias)
        # [B, 3 (row), 3 (column), C, h, w] -> columns enlarged and summed over their taps
        taps = taps.view(n, 3, 3, channels, height, width).permute(0, 3, 1, 4, 2, 5)
        wide = taps.reshape(-1, 3 * width) @ columns.reshape(3 * width, -1)  # [B C 3 h, factor w]
        return rows.reshape(3 * height, -1).t() @ wide.view(n, channels, 3 * height, -1)


def _shifted(size: int, factor: int, like: Tensor) -> Tensor:
    """Bilinear interpolation as matrices ``[3, size, factor size]``, shifted for each tap of a 3x3 kernel.

    Made anew in each pass, which costs next to nothing: tensors kept from inference mode or an export would
    be of no use outside of it.
    """
    one = torch.eye(size, device=like.device)[:, None]
    one = F.interpolate(one, size * factor, mode="linear", align_corners=False)[:, 0]
    padded = F.pad(one, (1, 1))
    return torch.stack([padded[:, k : k + size * factor] for k in range(3)]).to(like.dtype)
