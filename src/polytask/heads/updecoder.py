"""A head that doubles its map until it has the size of the image."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from polytask.config import register
from polytask.heads.base import HeadSpec
from polytask.parallel import BatchNorm2d


@register("head")
class UpDecoderHead(HeadSpec):
    """Transposed convolutions that double the map, then a 3x3 convolution with batch norm.

    As published (``legacy``) a ReLU follows, so that no output is negative, and the map is stretched to
    four times the size of the image, to be shrunk again. Both forms have the same parameters, numbered in
    order with every layer counted: transposed convolutions ``0 3 6``, their batch norms ``1 4 7``, the
    convolution ``9`` and its batch norm ``10``.
    """

    type: Literal["updecoder"] = "updecoder"
    width: int = Field(default=32, ge=1, description="channels while doubling")
    doublings: int = Field(default=3, ge=1, description="3 takes the map from an eighth of the image to all")
    legacy: bool = Field(default=False, description="as published, for old checkpoints: ReLU on the output")
    dense: ClassVar[bool] = True

    def build(self, channels: int, outputs: int) -> nn.Module:
        """A chain of layers."""
        head = nn.Sequential()
        for step in range(self.doublings):
            wide = self.width if step else channels
            head.extend((nn.ConvTranspose2d(wide, self.width, 2, stride=2), BatchNorm2d(self.width)))
            head.append(nn.ReLU(inplace=True))
        head.extend((nn.Conv2d(self.width, outputs, 3, padding=1), BatchNorm2d(outputs)))
        if self.legacy:
            twice = [nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False) for _ in range(2)]
            head.extend((nn.ReLU(inplace=True), *twice))
        return head
