"""Per-task output layers."""

from polytask.heads.aspp import ASPPHead
from polytask.heads.base import HeadSpec
from polytask.heads.conv import ConvHead
from polytask.heads.hrnet import HRNetHead
from polytask.heads.pooled import PooledHead
from polytask.heads.segformer import SegFormerHead
from polytask.heads.updecoder import UpDecoderHead
from polytask.heads.upsampled import UpsampledHead
from polytask.heads.vae import VAE, VAEHead

__all__ = [
    "VAE",
    "ASPPHead",
    "ConvHead",
    "HRNetHead",
    "HeadSpec",
    "PooledHead",
    "SegFormerHead",
    "UpDecoderHead",
    "UpsampledHead",
    "VAEHead",
]
