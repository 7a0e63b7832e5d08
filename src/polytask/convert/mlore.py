"""Official MLoRE checkpoints -> ours. The only place that knows their key names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from polytask.errors import CheckpointError
from polytask.model import MultiTaskModel

TASK_NAMES = {"sal": "saliency"}
"""Official task names that differ from ours."""

DEAD = re.compile(r"aux_heads\.|backbone\.q_fuse\.|backbone\.classify_route_[12]\.")
"""What the official files hold and their networks never use."""

_OURS = {v: k for k, v in TASK_NAMES.items()}
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
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    for ours, theirs in _OURS.items():
        name = re.sub(rf"\b{ours}\b", theirs, name)
    return name


def convert_state(state: Mapping[str, Tensor], model: MultiTaskModel) -> dict[str, Tensor]:
    """Official state dict -> a strict state dict of ``model``.

    The position of the class token, which the network has not, is dropped, as are tensors that are ``DEAD``.

    Raises:
        CheckpointError: missing or left-over keys, or other shapes (another task set, width or canvas).
    """
    given = {key.removeprefix("module."): value for key, value in state.items()}
    given = {key: value for key, value in given.items() if not DEAD.match(key)}
    converted: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, own in model.state_dict().items():
        key = official_name(name)
        value = given.pop(key, None)
        if value is None:
            problems.append(f"missing {key}")
            continue
        value = value[:, 1:] if key == "backbone.pos_embed" else value
        if value.shape not in (own.shape, (*own.shape, 1, 1)):  # vectors go through 1x1 convolutions there
            problems.append(f"{key} has shape {tuple(value.shape)}, expected {tuple(own.shape)}")
        else:
            converted[name] = value.reshape(own.shape).to(own.dtype)
    problems += [f"left over {key}" for key in given]
    if problems:
        raise CheckpointError(
            f"MLoRE checkpoint does not fit the model: {len(problems)} problems, "
            f"first: {'; '.join(problems[:3])}",
            hint="build the model with the checkpoint's tasks, width, ranks, backbone and image size",
        )
    return converted
