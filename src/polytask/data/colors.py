"""Random changes of color, on images ``[3, H, W]`` in 0..255; exact in HSV, without its conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from polytask.data.pipelines import chance, uniform

_PRIMARIES = torch.tensor([0.0, 2.0, 4.0])[:, None, None]  # hues of red, green and blue in sixths of a turn


def distort(image: Tensor) -> Tensor:
    """Photometric distortion (Liu et al., SSD, 2016), each step with probability 0.5, clipped after each.

    Brightness by up to 32, contrast by 0.5 to 1.5, before or after saturation by 0.5 to 1.5 and a hue
    turned by up to 36 degrees.
    """
    brightness = uniform(-32, 32) if chance(0.5) else 0.0
    contrast, saturation = (uniform(0.5, 1.5) if chance(0.5) else 1.0 for _ in range(2))
    turn, late = uniform(-0.6, 0.6) if chance(0.5) else 0.0, chance(0.5)
    image = (image + brightness).clamp_(0, 255)
    if not late:
        image = (image * contrast).clamp_(0, 255)
    if (saturation, turn) != (1.0, 0.0):
        image = shift(image, saturation, turn)
    return (image * (contrast if late else 1.0)).clamp_(0, 255)


def in_unit_range(recolor: Callable[[Any], Any], image: Tensor) -> Any:
    """What a torchvision transform makes of an image of 0..255, which it takes for 0..1 where it is float."""
    if not image.is_floating_point():
        return recolor(image)
    return recolor(image / 255) * 255


def shift(image: Tensor, saturation: float, turn: float) -> Tensor:
    """Multiply the saturation of HSV (up to 1) and turn the hue, by sixths of a full turn (-1..1)."""
    red, green, blue = image
    value = torch.maximum(red, green).maximum(blue)
    chroma = (value - torch.minimum(red, green).minimum(blue)).clamp_min_(1e-6)
    if turn == 0.0:
        return value - (value - image) * (value / chroma).clamp_max_(saturation)
    hue = torch.where(green == value, (blue - red) / chroma + 2, (red - green) / chroma + 4)
    hue = torch.where(red == value, (green - blue) / chroma, hue).add_(turn)
    lacking = hue.sub(_PRIMARIES).abs_().sub_(3).abs_().neg_().add_(2).clamp_(0, 1)  # share of the chroma
    return value - lacking * torch.minimum(chroma * saturation, value)
