"""``swin_rooms``: a compact Swin with weights that come with the package, as a timm model.

Pretrained on image-level labels of rooms by ``recipes/rooms/pretrain.yaml``; ``weights/swin_rooms.json``
tells how. Once this module is imported, ``timm.create_model("swin_rooms", pretrained=True)`` works too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import SwinTransformer, checkpoint_filter_fn
from torch import nn

WEIGHTS = Path(__file__).parents[1] / "weights" / "swin_rooms.safetensors"

default_cfgs = generate_default_cfgs(
    {
        "swin_rooms": {
            "file": str(WEIGHTS),
            "num_classes": 0,
            "input_size": (3, 64, 96),
            "pool_size": None,
            "crop_pct": 1.0,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "patch_embed.proj",
            "classifier": "head.fc",
            "license": "mit",
        }
    }
)


@register_model
def swin_rooms(pretrained: bool = False, **options: Any) -> nn.Module:
    """Swin with patch 4, width 32, depths 2-2-2-1 and windows of 4: 1.5 M parameters."""
    settings: dict[str, Any] = {
        "img_size": (64, 96), "patch_size": 4, "embed_dim": 32, "depths": (2, 2, 2, 1),
        "num_heads": (2, 4, 8, 16), "window_size": 4, "num_classes": 0,
    }  # fmt: skip
    net: nn.Module = build_model_with_cfg(
        SwinTransformer, "swin_rooms", pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True, "out_indices": (0, 1, 2, 3)}, **(settings | options),
    )  # fmt: skip
    return net
