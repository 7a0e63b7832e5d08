"""Official MTLoRA checkpoints -> ours, and back. The only place that knows their key names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping, Sequence

from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from polytask.adapters.mtlora import MTLoRA
from polytask.convert.mtlora_settings import (
    TASK_NAMES,
    USUAL,
    canonical,
    from_settings,
    known_settings,
    passed_over,
)
from polytask.convert.mtlora_shapes import infer, outputs_of
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
from polytask.errors import CheckpointError, PolytaskWarning
from polytask.model import MultiTaskModel
from polytask.necks.fuse import FuseSpec
from polytask.recipe import Recipe

_OURS = {v: k for k, v in TASK_NAMES.items()}
# what each piece of our names is called there; wrappers leave no trace in official names
_RULES: tuple[tuple[str, str], ...] = (
    (r"^backbone\.net\.", "backbone."),
    (r"^heads\.(\w+)\.", r"decoders.decoders.\1.last_layer."),
    (r"^neck\.projections\.(\w+)\.(\d+)\.", r"downsampler.\1.downsample_\2."),
    (r"\.(block|layer)\.", "."),
    (r"\.(qkv|proj|fc1|fc2|reduction)\.base\.", r".\1.linear."),
    (r"\.shared\.([AB])$", r".lora_shared_\1"),
    (r"\.tasks\.(\w+)\.([AB])$", r".lora_tasks_\2.\1"),
    (r"\.shared\.scale$", ".lora_shared_scale"),
    (r"\.tasks\.(\w+)\.scale$", r".lora_task_scale.\1"),
    (r"\.(proj|fc1|fc2)\.norm\.", r".\1.lora_norm."),
)
_DERIVED = ("attn_mask", "relative_position_index")
"""Buffers that follow from window and image size; the official files hold them, ours do not."""
_UNREAD = re.compile(r"\.conv_seg\.")
_BLOCK = re.compile(r"\.layers\.(\d+)\.blocks\.(\d+)\.")
_HINT = "build the model with the checkpoint's tasks, ranks, mode and backbone size"


def official_name(name: str, adapted: Collection[str] = ()) -> str:
    """The official key of one of our state-dict keys.

    Args:
        name: ours.
        adapted: roles of layers that are wrapped in the official code, where ours may be plain.
    """
    name = renamed(name, _RULES, _OURS)
    # timm merges patches at the start of a stage, the official code at the end of the one before
    name = re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
    plain = re.fullmatch(r"(backbone\.layers\..*\.(qkv|proj|fc1|fc2|reduction))\.(weight|bias)", name)
    return f"{plain[1]}.linear.{plain[3]}" if plain and plain[2] in adapted else name


def convert_state(state: Mapping[str, Tensor], model: MultiTaskModel) -> dict[str, Tensor]:
    """Official state dict -> a strict state dict of ``model``.

    Attention masks and position indices, which the network derives itself, are dropped, and so are task
    branches in blocks other than the last of a stage, whose outputs the official code discards.

    Raises:
        TaskMismatchError: another task set.
        CheckpointError: missing or left-over keys, or other shapes (another rank, mode or network).
    """
    if theirs := outputs_of(state):
        check_tasks(theirs, [_OURS.get(task, task) for task in model.tasks])
    dead = _dead_branches(state)
    given = {k: v for k, v in state.items() if not k.endswith(_DERIVED) and k not in dead}

    def key_of(name: str) -> str:
        key = official_name(name)
        wrapped = re.sub(r"\.(\w+)$", r".linear.\1", key)  # a plain layer of ours may be wrapped there
        return wrapped if key not in given and wrapped in given else key

    return matched(given, model, key_of, "MTLoRA", _HINT)


def _dead_branches(state: State) -> set[str]:
    """Keys that the official code saves, but that no output depends on."""
    last = _last_blocks(state)
    found = {key for key in state if ".lora_tasks_" in key or ".lora_task_scale." in key}
    outside = {key for key in found if (place := _BLOCK.search(key)) and int(place[2]) != last[place[1]]}
    return outside | {key for key in state if _UNREAD.search(key)}


def _last_blocks(state: State) -> dict[str, int]:
    """Stage -> index of its last block."""
    last: dict[str, int] = {}
    for key in state:
        if place := _BLOCK.search(key):
            last[place[1]] = max(last.get(place[1], 0), int(place[2]))
    return last


def shared_in_last_blocks_only(state: State) -> bool:
    """Whether a file is from before June 2024, when other blocks than the last had no branches."""
    places = [_BLOCK.search(key) for key in state if ".lora_shared_" in key]
    last = _last_blocks(state)
    blocks = {(place[1], int(place[2])) for place in places if place}
    return bool(blocks) and any(last.values()) and all(last[stage] == index for stage, index in blocks)


def export_state(recipe: Recipe, model: MultiTaskModel) -> dict[str, Tensor]:
    """The official state dict of a model: their keys, with the attention masks and position indices.

    Raises:
        ConfigError: the official code has no such model.
    """
    _refuse_foreign(recipe, model)
    adapter = recipe.model.adapter
    adapted = adapter.layers if isinstance(adapter, MTLoRA) else ()
    derived = {  # masked pairs have -100 there, and minus infinity here
        name: value.clamp(min=-100) for name, value in model.named_buffers() if name.endswith(_DERIVED)
    }
    exported: dict[str, Tensor] = {}
    for name, value in {**model.state_dict(), **derived}.items():
        projects = name.startswith("neck.projections.")  # 1x1 convolutions there
        exported[official_name(name, adapted)] = value[..., None, None] if projects else value
    return exported


def _refuse_foreign(recipe: Recipe, model: MultiTaskModel) -> None:
    spec = recipe.model
    unlike = {
        "model.backbone": isinstance(model.backbone.net, SwinTransformer)
        and spec.backbone.feature_point == "after_merge",
        "model.adapter": spec.adapter is None or isinstance(spec.adapter, MTLoRA),
        "model.neck": isinstance(spec.neck, FuseSpec),
        "tasks": all(task.dense for task in recipe.task_set().values()),
    }
    refuse_unlike(
        unlike, "a Swin with features after merging, adapter mtlora or none, neck fuse, dense tasks"
    )


class _Official(System):
    def from_settings(self, settings: Settings, tasks: Sequence[str] | None, where: str) -> Draft:
        draft = from_settings(known_settings(settings, where), tuple(tasks or USUAL), {}, where)
        return Draft(draft.recipe, (*draft.notes, *passed_over(settings)))

    def from_state(self, state: State, settings: Settings | None, where: str, *, embedded: bool) -> Draft:
        outputs = outputs_of(state)
        notes: tuple[str, ...] = ()
        if not outputs:
            expected = "keys decoders.decoders.TASK.last_layer.…"
            raise CheckpointError("this is no MTLoRA checkpoint", where=where, expected=expected)
        if settings is None:
            settings, notes = infer(state)
        elif embedded:
            settings = _without_rates(settings)
        draft = from_settings(known_settings(settings, where), canonical(outputs), outputs, where)
        return Draft(draft.recipe, (*notes, *draft.notes, *passed_over(settings)))

    def fit(self, recipe: Recipe, state: State) -> Recipe:
        adapter = recipe.model.adapter
        if not isinstance(adapter, MTLoRA):
            return recipe
        if dead := _dead_branches(state):
            warnings.warn(
                f"{len(dead)} tensors that no output of the official code depends on are left out, "
                f"first {min(dead)}",
                PolytaskWarning, stacklevel=4,
            )  # fmt: skip
        if adapter.blocks == "last" or not shared_in_last_blocks_only(state):
            return recipe
        warnings.warn(
            "the checkpoint is from before June 2024: blocks other than the last of each stage have no "
            "shared branches, so that they get rank 0 (model.adapter.blocks: last)",
            PolytaskWarning, stacklevel=4,
        )  # fmt: skip
        old = adapter.model_copy(update={"blocks": "last"})
        return recipe.model_copy(update={"model": recipe.model.model_copy(update={"adapter": old})})

    def convert(self, state: State, model: MultiTaskModel) -> dict[str, Tensor]:
        return convert_state(state, model)

    def export(self, recipe: Recipe, model: MultiTaskModel) -> dict[str, Tensor]:
        return export_state(recipe, model)


def _without_rates(settings: Settings) -> Settings:
    """The official loop multiplies its learning rates by the batch before it saves its settings."""
    train = settings.get("TRAIN")
    if not isinstance(train, Mapping):
        return settings
    return {**settings, "TRAIN": {k: v for k, v in train.items() if not str(k).endswith("_LR")}}


OFFICIAL = _Official()
