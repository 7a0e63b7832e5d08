"""Which experts act on an image, and the convolution that they make together."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.errors import PolytaskWarning
from polytask.necks.base import Size

Gates = Literal["softmax_first", "top_first"]


class Router(nn.Module):
    """Gates of the experts and the factor of the task's own path, from features.

    Args:
        width: C of the features, a multiple of 4.
        experts: N.
        chosen: experts whose gates are not zero.
        order: softmax over all experts, then the best (gates sum to less than 1); or the best, then softmax.
        grid: size of the maps.
    """

    def __init__(self, width: int, experts: int, chosen: int, order: Gates, grid: Size) -> None:
        super().__init__()
        quarter = width // 4
        self.chosen, self.order, self.grid = chosen, order, grid
        self.reduce, self.channel_norm = nn.Conv2d(width, quarter, 1), nn.LayerNorm(quarter)
        self.channel = nn.Linear(quarter, quarter)
        self.places, self.place_norm = nn.Linear(grid[0] * grid[1], 1), nn.LayerNorm(width)
        self.place = nn.Linear(width, quarter)
        self.gate = nn.Linear(2 * quarter, 2 * experts + 1)
        nn.init.trunc_normal_(self.places.weight, std=0.02)
        nn.init.zeros_(self.places.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, C, h, w]`` -> gates ``[B, N]`` and factors ``[B]``; in training with noise on the gates.

        In the precision of the weights, float32 as a rule, so that the choice is stable under autocast.
        """
        with torch.autocast(x.device.type, enabled=False):
            logits = self.logits(x.to(self.gate.weight.dtype))
        gates, spread, factor = torch.split(logits, [self.gate.out_features // 2] * 2 + [1], 1)
        if self.training:
            gates = gates + spread * torch.randn_like(spread)
        best = torch.zeros_like(gates, dtype=torch.bool).scatter(
            1, gates.topk(self.chosen, 1).indices, value=True
        )
        if self.order == "top_first":
            return gates.masked_fill(~best, -torch.inf).softmax(1), factor[:, 0]
        return gates.softmax(1) * best, factor[:, 0]

    def logits(self, x: Tensor) -> Tensor:
        """``[B, C, h, w]`` -> ``[B, 2 N + 1]``: gates, spread of their noise, factor."""
        channels = F.gelu(self.channel_norm(self.reduce(x).flatten(2).transpose(1, 2)))  # [B, P, C / 4]
        weight = self._places(x.shape[-2], x.shape[-1])
        places = F.gelu(self.place_norm(F.linear(x.flatten(2), weight, self.places.bias)[..., 0]))  # [B, C]
        both = self.channel(channels.mean(1)), self.place(places)  # a linear map of the mean is cheaper
        logits: Tensor = self.gate(torch.cat(both, 1))
        return logits

    def _places(self, height: int, width: int) -> Tensor:
        """The weight of each place ``[1, P]``, resized for another grid."""
        if (height, width) == self.grid:
            return self.places.weight
        warnings.warn(
            "an image of another size than the router was made for: its map of places is resized (published "
            "figures are for one size)",
            PolytaskWarning, stacklevel=2,
        )  # fmt: skip
        return resized_places(self.places.weight, self.grid, (height, width))


def resized_places(weight: Tensor, old: Size, new: Size) -> Tensor:
    """The weight of each place of a grid ``[1, P]`` for another grid, bilinear."""
    image = weight.view(1, 1, *old)
    return F.interpolate(image, new, mode="bilinear", align_corners=False).flatten(1)


def mixed_convolution(x: Tensor, gates: Tensor, kernels: Tensor, biases: Tensor) -> Tensor:
    """Each map convolved with its own mixture of kernels, zero-padded.

    Args:
        x: ``[G, C, h, w]``.
        gates: ``[G, N]``.
        kernels: ``[N, C, 9 C]``.
        biases: ``[N, C]``.
    """
    mixed = gates @ kernels.flatten(1)  # [G, 9 C C]
    return convolve_each(x, mixed.view(len(x), *kernels.shape[1:]), gates @ biases)


def convolve_each(x: Tensor, kernels: Tensor, biases: Tensor) -> Tensor:
    """Each map ``[G, C, h, w]`` convolved with its own kernel ``[G, C, 9 C]``, zero-padded.

    One grouped convolution, or one batched matrix product where C is no multiple of 16, for which grouped
    convolutions on CPU take twice as long.
    """
    groups, channels, height, width = x.shape
    kernels, biases = kernels.to(x.dtype), biases.to(x.dtype)
    if channels % 16:
        return torch.baddbmm(biases[..., None], kernels, F.unfold(x, 3, padding=1)).view_as(x)
    stacked = kernels.reshape(groups * channels, channels, 3, 3)
    joined = x.reshape(1, groups * channels, height, width)
    return F.conv2d(joined, stacked, biases.flatten(), padding=1, groups=groups).view_as(x)


def to_grid(x: Tensor, size: Size) -> Tensor:
    """``[B, C, H, W]`` at another size: means of finer maps, bilinear coarser ones."""
    if x.shape[-2:] == size:
        return x
    if x.shape[-2] > size[0]:
        return F.adaptive_avg_pool2d(x, size)
    return F.interpolate(x, size, mode="bilinear", align_corners=False)
