"""The head of DeepLab v3: atrous spatial pyramid pooling."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from polytask.config import register
from polytask.errors import ConfigError
from polytask.heads.base import HeadSpec
from polytask.parallel import BatchNorm2d, world


@register("head")
class ASPPHead(HeadSpec):
    """Atrous spatial pyramid pooling, 3x3 convolution, 1x1 convolution (Chen et al., DeepLab v3, 2017).

    256 channels everywhere. Parameters are named as in torchvision and in official checkpoints:
    ``0.convs.{0..3}.{0,1}``, ``0.convs.4.{1,2}``, ``0.project.{0,1}``, ``1``, ``2``, ``4``.
    """

    type: Literal["aspp"] = "aspp"
    rates: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(12, 24, 36), description="dilations of the 3x3 branches, in cells of the neck's map"
    )
    dense: ClassVar[bool] = True

    def build(self, channels: int, outputs: int) -> nn.Module:
        """torchvision's layers, with batch norms over the batch of all processes."""
        return ASPP(channels, outputs, self.rates)


class ASPP(DeepLabHead):  # type: ignore[misc]
    """See ``ASPPHead``."""

    def __init__(self, channels: int, outputs: int, rates: tuple[int, ...]) -> None:
        super().__init__(channels, outputs, rates)
        for name, module in list(self.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                self.set_submodule(name, BatchNorm2d(module.num_features))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, h, w]`` -> ``[B, outputs, h, w]``.

        Raises:
            ConfigError: one image in training; the pooled branch would normalize a single value.
        """
        if self.training and len(x) * world() < 2:
            raise ConfigError(
                "the image pooling of head 'aspp' has a batch norm, which needs more than one image to train",
                where="data.batch_size", got=1, expected="at least 2",
            )  # fmt: skip
        logits: Tensor = super().forward(x)
        return logits
