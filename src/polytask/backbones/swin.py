"""timm's Swin blocks, with the same outputs in less time.

A block of timm pads by nothing (a copy), rolls (a copy) and cuts windows (a copy), and undoes all that; here
one gather does it. Its mask adds -100 to pairs that must not meet, and exp(-100) is a subnormal number, on
which processors multiply up to ten times as slowly; minus infinity gives the exact zero instead.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, WindowAttention, window_partition
from torch import Tensor, nn


def quicken(net: nn.Module) -> None:
    """Put the faster forms into the Swin blocks of a network; others stay as they are."""
    for module in net.modules():
        if isinstance(module, PatchMerging):
            module.forward = Merging(module)  # type: ignore[method-assign]  # keeps all names
    for block in net.modules():
        if not isinstance(block, SwinTransformerBlock) or block.dynamic_mask:
            continue
        if isinstance(block.attn_mask, Tensor):
            block.attn_mask.masked_fill_(block.attn_mask < 0, -torch.inf)
        (h, w), (down, right) = block.input_resolution, block.shift_size  # type: ignore[misc]
        if h % block.window_size[0] or w % block.window_size[1]:
            continue  # timm pads, and its order of tokens is no permutation
        places = torch.arange(h * w).view(1, h, w, 1).roll((-down, -right), (1, 2))
        order = window_partition(places, block.window_size).flatten()
        block.register_buffer("window_order", order, persistent=False)
        block.register_buffer("window_inverse", order.argsort(), persistent=False)
        block.forward = Windowed(block)  # type: ignore[method-assign]


def fuse_attention(net: nn.Module) -> None:
    """Let window attention run as one operation. In training that is slower, as its bias has a gradient."""
    for module in net.modules():
        if isinstance(module, WindowAttention):
            module.fused_attn = True


class Windowed:
    """``forward`` of a Swin block: one gather shifts and cuts windows; residuals need no product apart."""

    def __init__(self, block: SwinTransformerBlock) -> None:
        self.block: Any = block

    def __call__(self, x: Tensor) -> Tensor:
        """``[S * B, H, W, C]`` -> the same; ``norm1`` may narrow it to B, then the projection widens it."""
        block, (_, h, w, c) = self.block, x.shape
        if (h, w) != tuple(block.input_resolution):
            return SwinTransformerBlock.forward(block, x)
        order, inverse = block.window_order, block.window_inverse
        windows = reorder(block.norm1(x).reshape(-1, h * w, c), order, inverse)
        y = block.attn(windows.view(-1, block.window_area, c), mask=block.attn_mask)
        x = residual(x.reshape(-1, h * w, c), reorder(y.view(-1, h * w, c), inverse, order), block.drop_path1)
        return residual(x, block.mlp(block.norm2(x)), block.drop_path2).view(-1, h, w, c)


def residual(x: Tensor, y: Tensor, drop: nn.Module) -> Tensor:
    """``x + drop(y)``, where stochastic depth needs no tensor of its own; ``[B, L, C]``."""
    if not isinstance(drop, DropPath) or not drop.training or not drop.scale_by_keep:
        return x + drop(y)  # type: ignore[no-any-return]
    keep = 1 - drop.drop_prob
    return torch.addcmul(x, y, y.new_empty(len(y), 1, 1).bernoulli_(keep).div_(keep))


class Merging:
    """``forward`` of patch merging, without timm's padding (a copy) where there is nothing to pad."""

    def __init__(self, module: PatchMerging) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` -> ``[B, H / 2, W / 2, C_out]``."""
        b, h, w, c = x.shape
        if h % 2 or w % 2:
            return PatchMerging.forward(self.module, x)
        phases = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.module.reduction(self.module.norm(phases))  # type: ignore[no-any-return]


def reorder(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """``x[:, order]`` of a permutation and its inverse, whose backward pass is a gather too."""
    y: Tensor = _Reorder.apply(x, order, inverse)
    return y


class _Reorder(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # noqa: ARG004
        return x.index_select(1, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        order, inverse = ctx.saved_tensors
        return _Reorder.apply(gradient, inverse, order), None, None
