"""Small models that many tests share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polytask.backbones.timm import BackboneSpec
from polytask.config import decode
from polytask.errors import PolytaskWarning
from polytask.model import ModelSpec, MultiTaskModel
from polytask.tasks import Classification, Depth, Normals, Segmentation, TaskSet

SIZE = (64, 64)
TASKS = TaskSet({"semseg": Segmentation(classes=("a", "b", "c")), "normals": Normals(), "depth": Depth()})
SCENE = Classification(classes=("kitchen", "bath"))

SWIN: dict[str, Any] = {
    "name": "swin_tiny_patch4_window7_224",
    "options": {
        "patch_size": 4, "embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4,
        "drop_path_rate": 0.0,
    },
}  # fmt: skip
MERGED_SWIN: dict[str, Any] = {**SWIN, "feature_point": "after_merge"}
VIT: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "options": {"embed_dim": 16, "depth": 4, "num_heads": 2},
}


def backbone_spec(settings: Mapping[str, Any], **changes: Any) -> BackboneSpec:
    """A backbone spec out of one of the settings above."""
    return decode(BackboneSpec, {**settings, **changes})


def model_spec(backbone: Mapping[str, Any] = MERGED_SWIN, **parts: Any) -> ModelSpec:
    """A model spec with a small backbone and neck."""
    return decode(
        ModelSpec, {"backbone": backbone, "neck": {"type": "fuse", "channels": [3, 4, 5, 6]}, **parts}
    )


def build(
    spec: ModelSpec, tasks: TaskSet = TASKS, size: tuple[int, int] = SIZE, seed: int = 0
) -> MultiTaskModel:
    """The model from a fixed seed, without the warning about its random frozen part."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PolytaskWarning)
        return spec.build(tasks, size)


def image(batch: int = 2, size: tuple[int, int] = SIZE, seed: int = 0) -> Tensor:
    """A random image batch."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def shake(
    module: nn.Module, scale: float = 0.1, which: Callable[[str], bool] = lambda _: True, seed: int = 1
) -> None:
    """Add noise to parameters, so that branches and norms that start neutral take part."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if which(name):
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def gap(
    left: Mapping[str, Tensor] | Sequence[Tensor], right: Mapping[str, Tensor] | Sequence[Tensor]
) -> float:
    """Largest absolute difference of two equally keyed collections."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        assert left.keys() == right.keys()
        return max(float((left[key] - right[key]).detach().abs().max()) for key in left)
    return max(float((a - b).detach().abs().max()) for a, b in zip(left, right, strict=True))
