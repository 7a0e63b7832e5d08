"""Bare timm networks: made for an image size, loaded strictly from a file, and fingerprinted."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_simple
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from polytask.errors import CheckpointError, ConfigError, did_you_mean
from polytask.pickles import read_checkpoint, state_dict

if TYPE_CHECKING:
    from polytask.backbones.timm import BackboneSpec


def create(spec: BackboneSpec, image_size: tuple[int, int]) -> nn.Module:
    """The bare timm network with its weights, without classifier."""
    if spec.pretrained and spec.options.get("class_token") is False:
        return _without_class_token(spec, image_size)
    where = f"model.backbone.name {spec.name}"
    if spec.name.split(".")[0] not in timm.list_models():
        raise ConfigError(
            "no such timm model", where=where, hint=did_you_mean(spec.name.split(".")[0], timm.list_models())
        )
    options: dict[str, Any] = {"num_classes": 0, **spec.options}
    try:
        net = timm.create_model(spec.name, pretrained=spec.pretrained, img_size=image_size, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise ConfigError(f"timm refuses an option ({error})", where="model.backbone.options") from None
        net = _create_sizeless(spec, options)
    except (AssertionError, ValueError, ArithmeticError) as error:
        raise _unsuitable(spec, image_size, error) from None
    except (OSError, RuntimeError) as error:
        raise (
            _unreachable(spec, error) if spec.pretrained else _unsuitable(spec, image_size, error)
        ) from None
    _refuse_uncovered_pixels(net, spec, image_size)
    if spec.weights:
        load_weights(net, spec.weights)
    return net


def _without_class_token(spec: BackboneSpec, image_size: tuple[int, int]) -> nn.Module:
    """With the published weights of the network that has a class token; there are no others."""
    net = create(spec.model_copy(update={"pretrained": False}), image_size)
    whole = spec.model_copy(update={"options": {**spec.options, "class_token": True}})
    state = create(whole, image_size).state_dict()
    _drop_class_token(net, state)
    net.load_state_dict(state)
    return net


def _refuse_uncovered_pixels(net: nn.Module, spec: BackboneSpec, image_size: tuple[int, int]) -> None:
    """timm's patch embedding drops the rows and columns that do not fill a patch."""
    embedding = getattr(net, "patch_embed", None)
    patches = getattr(embedding, "proj", None)
    if not isinstance(patches, nn.Conv2d) or patches.kernel_size != patches.stride or any(patches.padding):
        return
    fits = all(size % patch == 0 for size, patch in zip(image_size, patches.stride, strict=True))
    if not fits and not getattr(embedding, "dynamic_img_pad", False):
        height, width = patches.stride
        raise ConfigError(
            f"{spec.name} has patches of {height}x{width}, which do not cover the image",
            where="data.image_size", got=f"{image_size[0]}x{image_size[1]}",
            hint="use a multiple of the backbone's patch size and total stride",
        )  # fmt: skip


def _create_sizeless(spec: BackboneSpec, options: dict[str, Any]) -> nn.Module:
    """Convolutional nets take any size and no ``img_size``."""
    try:
        return timm.create_model(spec.name, pretrained=spec.pretrained, **options)
    except TypeError as error:
        raise ConfigError(f"timm refuses an option ({error})", where="model.backbone.options") from None
    except (OSError, RuntimeError) as error:
        raise _unreachable(spec, error) from None


def _unreachable(spec: BackboneSpec, error: Exception) -> CheckpointError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return CheckpointError(
        f"pretrained weights of {spec.name} cannot be loaded ({reason})",
        where="model.backbone.pretrained",
        hint="go online once, or name a local file in model.backbone.weights, or set pretrained: false",
    )


def _unsuitable(spec: BackboneSpec, image_size: tuple[int, int], error: Exception) -> ConfigError:
    height, width = image_size
    return ConfigError(
        f"{spec.name} cannot be built for images of {height}x{width} ({error})",
        where="model.backbone",
        hint="check model.backbone.options, and that data.image_size is a multiple of patch size and stride",
    )


def load_weights(net: nn.Module, path: Path) -> None:
    """Load a local file through the network's own timm filter, strictly but for the classifier.

    Raises:
        CheckpointError: file missing or damaged, or keys or shapes that do not fit.
    """
    where = f"model.backbone.weights {path}"
    if not path.is_file():
        raise CheckpointError("no such weight file", where=where)
    try:
        state = state_dict(read_checkpoint(path), str(path))
    except CheckpointError as error:
        raise CheckpointError(f"weight file cannot be read ({error.what})", where=where) from None
    _resize_bias_tables(net, state)
    _drop_class_token(net, state)
    adapt = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    if adapt is not None:
        try:
            state = adapt(state, net)
        except (ValueError, RuntimeError, KeyError, AssertionError) as error:
            reason = f"timm cannot fit the weights to this network and image size ({error})"
            raise CheckpointError(reason, where=where) from None
    head = net.pretrained_cfg.get("classifier") or "head"  # type: ignore[union-attr,operator]
    heads = tuple(f"{name}." for name in ([head] if isinstance(head, str) else head))
    state = {key: value for key, value in state.items() if not key.startswith(heads)}
    try:
        missing, unexpected = net.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"weights have other shapes ({str(error).splitlines()[1].strip()})", where=where
        ) from None
    missing = [key for key in missing if not key.startswith(heads)]
    if missing or unexpected:
        raise CheckpointError(
            f"weights are of another network: {len(missing)} keys missing (first {missing[:2]}), "
            f"{len(unexpected)} unexpected (first {unexpected[:2]})",
            where=where,
        )


def _drop_class_token(net: nn.Module, state: dict[str, Tensor]) -> None:
    """The class token and its position, which is the first, if the network has none."""
    if "cls_token" in state and getattr(net, "cls_token", state) is None:
        del state["cls_token"]
        if not net.no_embed_class:
            state["pos_embed"] = state["pos_embed"][:, 1:]


def _resize_bias_tables(net: nn.Module, state: dict[str, Tensor]) -> None:
    """Swin's tables for windows of another size, bicubically; timm's own way depends on SciPy being there."""
    for name, module in net.named_modules():
        key = f"{name}.relative_position_bias_table"
        rows = len(state.get(key, ()))
        if isinstance(module, WindowAttention) and rows and math.isqrt(rows) ** 2 == rows:
            own = module.relative_position_bias_table.shape
            state[key] = resize_rel_pos_bias_table_simple(state[key], module.window_size, own)


def digest(module: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of a module's parameters."""
    return digest_of(dict(module.named_parameters()))


@torch.no_grad()
def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes of tensors, in the order of their names."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()
