"""Official MLoRE checkpoints -> ours, and back. The only place that knows their key names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from polytask.convert.mlore_shapes import OURS, PATCH, PUBLISHED, grid_of, infer, outputs_of
from polytask.convert.official import (
    Draft,
    Settings,
    State,
    System,
    check_tasks,
    matched,
    refuse_unlike,
    renamed,
)
from polytask.errors import CheckpointError, ConfigError, PolytaskWarning
from polytask.heads import UpsampledHead
from polytask.model import MultiTaskModel
from polytask.necks.base import Size
from polytask.necks.mlore import ExpertNeck
from polytask.necks.routing import resized_places
from polytask.recipe import Recipe

DEAD = re.compile(r"aux_heads\.|backbone\.q_fuse\.|backbone\.classify_route_[12]\.")
"""What the official files hold and their networks never use."""

_POSITIONS, _PLACES = "backbone.pos_embed", ".0.convsp.weight"
_POINTWISE = re.compile(r"\.router_1\.\w+\.(0\.conv[23]|1)\.weight$")
"""1x1 convolutions there, linear layers here."""
_ROUTER = {
    "reduce": "0.conv1", "channel_norm": "0.ln", "channel": "0.conv3", "places": "0.convsp",
    "place_norm": "0.ln_sp", "place": "0.conv2", "gate": "1",
}  # fmt: skip
_PATH = {"enter": "conv1", "leave": "conv3", "norm": "bn", "expert_norm": "bn_all"}
_HEAD = {"0": "mt_proj.0", "1": "mt_proj.1", "3": "linear_pred"}
_RULES: tuple[tuple[str, str], ...] = (
    (r"^backbone\.net\.", "backbone."),
    (r"^neck\.projections\.", "backbone.fea_fuse."),
    (r"^neck\.mix\.", "backbone.task_mask."),
    (r"^neck\.first\.", "backbone.MLoRE_1."),
    (r"^neck\.second\.", "backbone.MLoRE_2."),
    (r"\.experts\.(\d+)\.down\.", r".lora_list_1.\1.W."),
    (r"\.experts\.(\d+)\.up\.", r".lora_list_1.\1.M."),
    (r"\.common\.", ".share_conv."),
    (r"\.tasks\.(\w+)\.own\.down\.", r".conv2.\1.W."),
    (r"\.tasks\.(\w+)\.own\.up\.", r".conv2.\1.M."),
    *((rf"\.tasks\.(\w+)\.router\.{ours}\.", rf".router_1.\1.{theirs}.") for ours, theirs in _ROUTER.items()),
    *((rf"\.tasks\.(\w+)\.{ours}\.", rf".{theirs}.\1.") for ours, theirs in _PATH.items()),
    *((rf"^heads\.(\w+)\.{ours}\.", rf"heads.\1.{theirs}.") for ours, theirs in _HEAD.items()),
)


def official_name(name: str) -> str:
    """The official key of one of our state-dict keys, without the prefix of the wrapper."""
    return renamed(name, _RULES, OURS)


def convert_state(state: Mapping[str, Tensor], model: MultiTaskModel) -> dict[str, Tensor]:
    """Official state dict -> a strict state dict of ``model``.

    The position of the class token, which the network has not, is dropped, as are tensors that are ``DEAD``.
    Where the neck takes ``any_size``, positions and maps of places are resized to the grid of the model.

    Raises:
        ConfigError: a model with another neck.
        TaskMismatchError: another task set.
        CheckpointError: another image size, missing or left-over keys, or other shapes.
    """
    given = {key.removeprefix("module."): value for key, value in state.items()}
    given = {key: value for key, value in given.items() if not DEAD.match(key)}
    check_tasks(outputs_of(given), [OURS.get(task, task) for task in model.tasks])
    if _POSITIONS in given:
        given = _on_grid(given, model)
    hint = "build the model with the checkpoint's width, ranks and backbone"
    return matched(given, model, official_name, "MLoRE", hint)


def _neck(model: MultiTaskModel) -> ExpertNeck:
    if not isinstance(model.neck, ExpertNeck):
        raise ConfigError("the official code has no such model", where="model.neck", expected="mlore")
    return model.neck


def _on_grid(state: State, model: MultiTaskModel) -> dict[str, Tensor]:
    """The state dict without the class token's position, its maps of places on the grid of the model."""
    neck, positions = _neck(model), state[_POSITIONS]
    if positions.dim() != 3:
        return {**state}  # refused with other shapes that do not fit
    positions = positions[:, 1:]
    count, new = positions.shape[1], neck.grid
    usual = grid_of(count)
    if count == new[0] * new[1]:
        if usual not in (None, new):
            warnings.warn(
                f"{count} patches are taken to be {_size(new)}, as stated, not {_size(usual)}",
                PolytaskWarning, stacklevel=5,
            )  # fmt: skip
        return {**state, _POSITIONS: positions}
    if usual is None or not neck.spec.any_size:
        other = ", or model.neck.any_size=true to resize maps of places" if usual else ""
        raise CheckpointError(
            f"the checkpoint is for {_size(usual) if usual else f'images of {count} patches'}, "
            f"the recipe for {_size(new)}",
            hint=f"set data.image_size to that size{other}",
        )
    warnings.warn(
        f"the checkpoint is for {_size(usual)}; positions and the routers' maps of places are resized to "
        f"{_size(new)} (published figures are for the former)",
        PolytaskWarning, stacklevel=5,
    )  # fmt: skip
    resized = resample_abs_pos_embed(positions, [*new], [*usual], num_prefix_tokens=0, antialias=False)
    places = {
        key: resized_places(value, usual, new)
        for key, value in state.items()
        if key.endswith(_PLACES) and value.numel() == count
    }
    return {**state, **places, _POSITIONS: resized}


def _size(grid: Size) -> str:
    return f"images of {PATCH * grid[0]}x{PATCH * grid[1]}"


def export_state(recipe: Recipe, model: MultiTaskModel) -> dict[str, Tensor]:
    """The official state dict of a model; the position of the class token, which nothing reads, is zero.

    Raises:
        ConfigError: the official code has no such model.
    """
    spec, tasks = recipe.model, recipe.task_set()
    net = model.backbone.net
    heads = [spec.head_of(name, task) for name, task in tasks.items()]
    like = {
        "model.backbone": isinstance(net, VisionTransformer) and net.cls_token is None
        and model.backbone.final_norm,
        "model.neck": isinstance(model.neck, ExpertNeck),
        "model.adapter": spec.adapter is None,
        "model.head": all(isinstance(head, UpsampledHead) and head.factor == 4 for head in heads),
    }  # fmt: skip
    refuse_unlike(like, "a ViT without class token and with final_norm, neck mlore, head upsampled")
    exported = {}
    for name, value in model.state_dict().items():
        key = official_name(name)
        if key == _POSITIONS:
            value = torch.cat([torch.zeros_like(value[:, :1]), value], 1)
        exported[key] = value[..., None, None] if _POINTWISE.search(key) else value
    return exported


class _Official(System):
    def from_settings(self, settings: Settings, tasks: Sequence[str] | None, where: str) -> Draft:  # noqa: ARG002
        shipped = ", ".join(
            f"{folder}/{name}" for folder, sizes in PUBLISHED.items() for name in sizes.values()
        )
        hint = f"their content is in the recipes {shipped}"
        raise ConfigError("settings files of MLoRE are not read", where=where, hint=hint)

    def from_state(self, state: State, settings: Settings | None, where: str, *, embedded: bool) -> Draft:
        if settings is not None and not embedded:
            return self.from_settings(settings, None, where)
        return infer(state, where)

    def fit(self, recipe: Recipe, state: State) -> Recipe:  # noqa: ARG002
        return recipe

    def convert(self, state: State, model: MultiTaskModel) -> dict[str, Tensor]:
        return convert_state(state, model)

    def export(self, recipe: Recipe, model: MultiTaskModel) -> dict[str, Tensor]:
        return export_state(recipe, model)


OFFICIAL = _Official()
