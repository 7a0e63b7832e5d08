"""Official MTLoRA checkpoints -> ours. The only place that knows their key names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from polytask.errors import CheckpointError
from polytask.model import MultiTaskModel

TASK_NAMES = {"sal": "saliency"}
"""Official task names that differ from ours."""

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


def official_name(name: str) -> str:
    """The official key of one of our state-dict keys."""
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    # timm merges patches at the start of a stage, the official code at the end of the one before
    name = re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
    for ours, theirs in _OURS.items():
        name = re.sub(rf"\b{ours}\b", theirs, name)
    return name


def convert_state(state: Mapping[str, Tensor], model: MultiTaskModel) -> dict[str, Tensor]:
    """Official state dict -> a strict state dict of ``model``.

    Attention masks and position indices, which the network derives itself, are dropped.

    Raises:
        CheckpointError: missing or left-over keys, or other shapes (another task set, rank or network).
    """
    given = {k: v for k, v in state.items() if not k.endswith(("attn_mask", "relative_position_index"))}
    converted: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, own in model.state_dict().items():
        key = official_name(name)
        value = given.pop(key, None)
        if value is None:
            problems.append(f"missing {key}")
        elif value.shape not in (own.shape, (*own.shape, 1, 1)):  # projections are 1x1 convolutions there
            problems.append(f"{key} has shape {tuple(value.shape)}, expected {tuple(own.shape)}")
        else:
            converted[name] = value.reshape(own.shape).to(own.dtype)
    problems += [f"left over {key}" for key in given]
    if problems:
        raise CheckpointError(
            f"MTLoRA checkpoint does not fit the model: {len(problems)} problems, "
            f"first: {'; '.join(problems[:3])}",
            hint="build the model with the checkpoint's tasks, ranks, mode and backbone size",
        )
    return converted
