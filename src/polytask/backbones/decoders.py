"""Networks with a decoder back to full resolution, as timm models: ``unet`` and ``segnet``.

Both have two levels: the decoder's map at full resolution, and the bottleneck between encoder and decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.parallel import BatchNorm2d

default_cfgs = generate_default_cfgs({"unet": {}, "segnet": {}})


def convolutions(*channels: int) -> nn.Sequential:
    """3x3 convolutions from each number of channels to the next, each with batch norm and ReLU."""
    layers = nn.Sequential()
    for c, d in pairwise(channels):
        layers.extend((nn.Conv2d(c, d, 3, padding=1), BatchNorm2d(d), nn.ReLU(inplace=True)))
    return layers


class EncoderDecoder(nn.Module):
    """What timm's users ask of a network. ``forward`` returns both levels, ``[B, C, H, W]``."""

    def __init__(
        self, encoder: Sequence[nn.Module], decoder: Sequence[nn.Module], channels: tuple[int, int]
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.ModuleList(encoder), nn.ModuleList(decoder)
        levels = zip(channels, (1, 1 << len(decoder)), ("decoder", "encoder"), strict=True)
        self.feature_info = [{"num_chs": c, "reduction": r, "module": name} for c, r, name in levels]

    def forward_intermediates(self, x: Tensor, indices: Sequence[int], **_: Any) -> list[Tensor]:
        """The chosen levels."""
        levels = self(x)
        return [levels[i] for i in indices]

    def prune_intermediate_layers(self, indices: Sequence[int], **_: Any) -> None:
        """Without the level of full resolution no decoder is needed."""
        if 0 not in indices:
            self.decoder = nn.ModuleList()


class Up(nn.Module):
    """Doubles the resolution, puts the encoder's map before the result and convolves."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, out, 2, stride=2)
        self.convolutions = convolutions(2 * out, out, out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """``[B, channels, h, w]`` and ``[B, out, H, W]`` -> ``[B, out, H, W]``."""
        up = self.up(x, output_size=skip.shape[-2:])
        return self.convolutions(torch.cat([skip, up], 1))  # type: ignore[no-any-return]


class UNet(EncoderDecoder):
    """Ronneberger, Fischer, Brox (MICCAI 2015), with padded convolutions and batch norm."""

    def __init__(self, width: int = 64) -> None:
        c = [width << k for k in range(5)]
        down = [convolutions(a, b, b) for a, b in zip((3, *c), c, strict=False)]
        super().__init__(down, [Up(c[k + 1], c[k]) for k in (3, 2, 1, 0)], (c[0], c[4]))

    def forward(self, x: Tensor) -> list[Tensor]:
        """``[B, 3, H, W]`` -> ``[B, width, H, W]`` and ``[B, 16 width, H / 16, W / 16]``."""
        maps: list[Tensor] = []
        for block in self.encoder:
            maps.append(block(F.max_pool2d(maps[-1], 2) if maps else x))
        x = maps[-1]
        for block, skip in zip(self.decoder, maps[-2::-1], strict=False):
            x = block(x, skip)
        return [x, maps[-1]]


class SegNet(EncoderDecoder):
    """Badrinarayanan, Kendall, Cipolla (TPAMI 2017), as MTAN has it: 2, 2, 3, 3, 3 convolutions."""

    def __init__(self, width: int = 64) -> None:
        c, counts = [width << k for k in (0, 1, 2, 3, 3)], (2, 2, 3, 3, 3)
        down = [convolutions(a, *[b] * n) for a, b, n in zip((3, *c), c, counts, strict=False)]
        up = [convolutions(b, *[a] * n) for a, b, n in zip((c[0], *c), c, counts, strict=False)]
        super().__init__(down, up[::-1], (c[0], c[4]))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> list[Tensor]:
        """``[B, 3, H, W]`` -> ``[B, width, H, W]`` and ``[B, 8 width, H / 32, W / 32]``."""
        pooled = []
        for block in self.encoder:
            fine = block(x)
            x, places = F.max_pool2d_with_indices(fine, (2, 2))
            pooled.append((places, fine.shape[-2:]))
        bottleneck = x
        for block, (places, size) in zip(self.decoder, pooled[::-1], strict=False):
            x = block(F.max_unpool2d(x, places, (2, 2), output_size=size))
        return [x, bottleneck]


def _build(cls: type[nn.Module], name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    unknown: Any = ("num_classes", "global_pool", "in_chans")
    net: nn.Module = build_model_with_cfg(cls, name, pretrained, kwargs_filter=unknown, **options)
    return net


@register_model
def unet(pretrained: bool = False, **options: Any) -> nn.Module:
    """31.0 M weights; ``width`` is that of the finest level."""
    return _build(UNet, "unet", pretrained, options)


@register_model
def segnet(pretrained: bool = False, **options: Any) -> nn.Module:
    """24.9 M parameters; ``width`` is that of the finest level."""
    return _build(SegNet, "segnet", pretrained, options)
