"""Per-task output layers."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from polytask.config import Spec, register
from polytask.parallel import BatchNorm2d
from polytask.types import Drainable


class HeadSpec(Spec):
    """Builds the output layer of one task from the neck's map."""

    type: str
    dense: ClassVar[bool]
    """Whether the output is a map (else one vector per image)."""

    @abstractmethod
    def build(self, channels: int, outputs: int) -> nn.Module:
        """``[B, channels, h, w]`` -> ``[B, outputs, h, w]`` (dense) or ``[B, outputs]``."""


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


@register("head")
class PooledHead(HeadSpec):
    """Mean over the map, then one linear layer: image-level classes."""

    type: Literal["pooled"] = "pooled"
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    dense: ClassVar[bool] = False

    def build(self, channels: int, outputs: int) -> nn.Module:
        """Pool, drop, classify."""
        return Pooled(channels, outputs, self.dropout)


class Pooled(nn.Module):
    """See ``PooledHead``."""

    def __init__(self, channels: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.dropout, self.linear = nn.Dropout(dropout), nn.Linear(channels, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, h, w]`` -> ``[B, outputs]``."""
        logits: Tensor = self.linear(self.dropout(x.mean((2, 3))))
        return logits


@register("head")
class VAEHead(HeadSpec):
    """For `reconstruction`: a variational bottleneck and the decoder of Burgess et al. (beta-VAE, 2018).

    The penalty ``kl`` is KL(q(z|x) || N(0, 1)) in nats per image (Kingma & Welling, ICLR 2014). As the loss
    is a mean over 3 H W values, beta is the factor beta * 2 / (3 H W) of the penalty in the objective. The
    statistic ``active_units`` counts numbers of the code whose mean varies over the batch by more than 0.01
    (Burda et al., ICLR 2016). In evaluation the code is its mean.
    """

    type: Literal["vae"] = "vae"
    latent: int = Field(default=32, ge=1, description="length of the latent code")
    doublings: int = Field(default=4, ge=1, description="how often 4x4 cells double, to 64x64 by default")
    dense: ClassVar[bool] = True
    PENALTIES: ClassVar[tuple[str, ...]] = ("kl",)

    def build(self, channels: int, outputs: int) -> nn.Module:
        """4x4 cells of the map, a code, a picture of ``4 * 2**doublings`` pixels."""
        return VAE(channels, outputs, self.latent, self.doublings)


class VAE(Drainable):
    """See ``VAEHead``."""

    def __init__(self, channels: int, outputs: int, latent: int, doublings: int) -> None:
        super().__init__()
        cells, inner = nn.AdaptiveAvgPool2d(4), nn.Linear(16 * channels, 256)
        self.encode = nn.Sequential(cells, nn.Flatten(), inner, nn.ReLU(), nn.Linear(256, 2 * latent))
        self.decode = nn.Sequential(nn.Linear(latent, 256), nn.ReLU(), nn.Linear(256, 16 * 32))
        self.decode.append(nn.Unflatten(1, (32, 4, 4)))
        for step in range(doublings):
            width = outputs if step == doublings - 1 else 32
            self.decode.extend((nn.ReLU(), nn.ConvTranspose2d(32, width, 4, stride=2, padding=1)))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, h, w]`` -> ``[B, outputs, 4 * 2**doublings, 4 * 2**doublings]``."""
        code, log_variance = self.encode(x).float().chunk(2, dim=1)
        if self.training:
            kl = (code.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2
            self.recorded_penalties["kl"] = kl.mean()
            self.recorded_stats["active_units"] = (code.detach().var(0, correction=0) > 0.01).sum()
            code = code + (log_variance / 2).exp() * torch.randn_like(code)
        image: Tensor = self.decode(code)
        return image
