"""The head of SegFormer: linear maps of the levels, fused by another."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.adapters.base import Mergeable
from polytask.config import register
from polytask.heads.base import HeadSpec
from polytask.parallel import BatchNorm2d


@register("head")
class SegFormerHead(HeadSpec):
    """A linear layer per level, a fusing 1x1 convolution, 1x1 convolution (Xie et al., NeurIPS 2021, eq. 4).

    Parameters are named as in official checkpoints: ``linear_c{1..4}.proj`` from fine to coarse,
    ``linear_fuse.conv`` (its inputs from coarse to fine), ``linear_fuse.bn``, ``linear_pred``. Their
    ``conv_seg``, which takes no part in the output, is not here.
    """

    type: Literal["segformer"] = "segformer"
    width: int = Field(default=256, ge=1, description="channels of every level after its linear layer")
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0, description="of whole channels before the last layer")
    dense: ClassVar[bool] = True

    def build(self, channels: int, outputs: int) -> nn.Module:
        """The head of a single level."""
        return self.build_on((channels,), outputs)

    def build_on(self, levels: Sequence[int], outputs: int) -> nn.Module:
        """One linear layer per level."""
        return SegFormer(levels, outputs, self.width, self.dropout)


class SegFormer(Mergeable):
    """See ``SegFormerHead``.

    The linear layers and the fusing convolution have nothing nonlinear between them, and resizing commutes
    with linear maps of channels (its weights sum to 1). So both become one small matrix, which is applied
    to the neck's map at once: equal outputs and gradients, a quarter of the products.
    """

    def __init__(self, levels: Sequence[int], outputs: int, width: int, dropout: float) -> None:
        super().__init__()
        self.projections = [f"linear_c{number}" for number in range(1, len(levels) + 1)]
        for name, channels in zip(self.projections, levels, strict=True):
            self.add_module(name, nn.Sequential(OrderedDict(proj=nn.Linear(channels, width))))
        fuse = nn.Conv2d(len(levels) * width, width, 1, bias=False)
        self.linear_fuse = nn.Sequential(OrderedDict(conv=fuse, bn=BatchNorm2d(width)))
        self.dropout = nn.Dropout2d(dropout)
        self.linear_pred = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, h, w]`` -> ``[B, outputs, h, w]``."""
        weight, bias = self.composed()
        _, norm = self.linear_fuse
        fused = F.relu(norm(F.conv2d(x, weight[..., None, None], bias)), inplace=True)
        logits: Tensor = self.linear_pred(self.dropout(fused))
        return logits

    def composed(self) -> tuple[Tensor, Tensor]:
        """Weight ``[width, C]`` and bias ``[width]`` of the linear layers and the fusing convolution."""
        fusing = self.get_parameter("linear_fuse.conv.weight").flatten(1).chunk(len(self.projections), dim=1)
        pairs = list(zip(self.projections, reversed(fusing), strict=True))  # blocks are coarse to fine
        weights = [block @ self.get_parameter(f"{name}.proj.weight") for name, block in pairs]
        biases = [block @ self.get_parameter(f"{name}.proj.bias") for name, block in pairs]
        return torch.cat(weights, 1), torch.stack(biases).sum(0)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The same as a chain of two convolutions."""
        weight, bias = self.composed()
        first = nn.Conv2d(weight.shape[1], weight.shape[0], 1).to(weight)
        first.weight.copy_(weight[..., None, None])
        first.bias.copy_(bias)  # type: ignore[union-attr]
        _, norm = self.linear_fuse
        return nn.Sequential(first, norm, nn.ReLU(inplace=True), self.linear_pred).eval()
