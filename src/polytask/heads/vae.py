"""The head of `reconstruction`: a variational autoencoder behind the backbone."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from polytask.config import register
from polytask.heads.base import HeadSpec
from polytask.types import Drainable


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
