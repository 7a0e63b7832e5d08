"""What names and shapes of tensors tell about the settings of an official MTLoRA checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from polytask.convert.mtlora_settings import ROLES, canonical, short
from polytask.convert.official import State
from polytask.errors import CheckpointError

_LAST_LAYERS = {"segformer": "linear_pred", "updecoder": "9", "aspp": "4", "hrnet": "3"}
"""Kind of head -> its layer with one output per class; of several that are there, the first counts."""
Shapes = Mapping[str, tuple[int, ...]]


def outputs_of(state: State) -> dict[str, int]:
    """Official task names in a checkpoint, and their channels."""
    heads = _heads_of(state)
    prefix = "decoders.decoders."
    return {
        task: len(state[f"{prefix}{task}.last_layer.{_LAST_LAYERS[kind]}.weight"])
        for task, kind in heads.items()
    }


def _heads_of(state: State) -> dict[str, str]:
    found: dict[str, str] = {}
    for kind, layer in reversed(_LAST_LAYERS.items()):
        for key in state:
            if match := re.fullmatch(rf"decoders\.decoders\.(\w+)\.last_layer\.{layer}\.weight", key):
                found[match[1]] = kind
    return found


def infer(state: State) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Official settings out of the names and shapes of a state dict, and notes on what they cannot tell.

    Raises:
        CheckpointError: no Swin in it.
    """
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    swin = _swin_of(shapes)
    size, notes = _image_size(shapes, swin)
    lora = _lora_of(shapes, len(swin["DEPTHS"]))
    projections = [shape[0] for key, shape in sorted(shapes.items()) if key.startswith("downsampler.")]
    fused = [shape[0] for key, shape in shapes.items() if key.endswith("linear_fuse.conv.weight")]
    model: dict[str, Any] = {
        "SWIN": swin, "MTLORA": lora, "DROP_PATH_RATE": 0.2, "DECODER_HEAD": _heads_of(state),
        "DECODER_DOWNSAMPLER": bool(projections),
    }  # fmt: skip
    if projections:
        model["DECODER_CHANNELS"] = projections[: len(swin["DEPTHS"])]
    if fused:
        model["SEGFORMER_CHANNELS"] = fused[0]
    told = [f"embedding {swin['EMBED_DIM']}, depths {swin['DEPTHS']}, heads {swin['NUM_HEADS']}"]
    if lora["ENABLED"]:
        ranks = ", ".join(f"{task} {short(tuple(r))}" for task, r in lora["R_PER_TASK"].items())
        told.append(f"ranks {ranks}, mode {lora['SHARED_MODE']}")
        notes.append("assumed, since no settings came along: scale 4 (which outputs depend on)")
        if lora["SHARED_MODE"] == "matrix":
            notes.append("assumed: mode matrix, which has the same tensors as matrixv2")
    told.append(f"heads {', '.join(f'{t} {k}' for t, k in _heads_of(state).items())}, image size {size}")
    return {"DATA": {"IMG_SIZE": size}, "MODEL": model}, (f"read off the tensors: {'; '.join(told)}", *notes)


def _swin_of(shapes: Shapes) -> dict[str, Any]:
    places = [m for key in shapes if (m := re.match(r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.", key))]
    stages = sorted({int(place[1]) for place in places})
    depths = [1 + max(int(place[2]) for place in places if int(place[1]) == stage) for stage in stages]
    try:
        embedding = shapes["backbone.patch_embed.proj.weight"]
        tables = [shapes[f"backbone.layers.{s}.blocks.0.attn.relative_position_bias_table"] for s in stages]
    except KeyError as error:
        raise CheckpointError("no Swin with an official name", got=f"no key {error.args[0]}") from None
    wide = next(shape for key, shape in shapes.items() if re.search(r"\.fc1\.(linear\.)?weight", key))
    return {
        "PATCH_SIZE": embedding[2], "EMBED_DIM": embedding[0], "DEPTHS": depths,
        "NUM_HEADS": [table[1] for table in tables], "WINDOW_SIZE": max(_window(t) for t in tables),
        "MLP_RATIO": wide[0] / wide[1],
        "QKV_BIAS": any(re.search(r"\.qkv\.(linear\.)?bias", key) for key in shapes),
    }  # fmt: skip


def _window(table: tuple[int, ...]) -> int:
    return (math.isqrt(table[0]) + 1) // 2


def _image_size(shapes: Shapes, swin: Mapping[str, Any]) -> tuple[int, list[str]]:
    """From the masks of shifted windows, which cover the map of their stage."""
    for key, shape in shapes.items():
        if match := re.fullmatch(r"backbone\.layers\.(\d+)\.blocks\.\d+\.attn_mask", key):
            side = math.isqrt(shape[0]) * math.isqrt(shape[1])
            return side * swin["PATCH_SIZE"] * 2 ** int(match[1]), []
    return 448, ["assumed, since there is no attention mask in it: image size 448"]


def _lora_of(shapes: Shapes, stages: int) -> dict[str, Any]:
    adapted = {role for role in (*ROLES, "reduction") if any(f".{role}.linear.weight" in k for k in shapes)}
    tasks = {m[1] for key in shapes if (m := re.search(r"\.lora_tasks_A\.(\w+)$", key))}

    def ranks(suffix: str) -> list[int]:
        found = {int(k.split(".")[2]): shape[0] for k, shape in shapes.items() if k.endswith(suffix)}
        return [found.get(stage, 1) for stage in range(stages)]

    mode = "matrix" if tasks else "lora_only"
    switches = {f"{role.upper()}_ENABLED": role in adapted for role in ROLES}
    return {
        "ENABLED": bool(adapted), **switches, "DOWNSAMPLER_ENABLED": "reduction" in adapted,
        "SHARED_MODE": "addition" if any(".lora_norm." in key for key in shapes) else mode,
        "R_PER_TASK": {
            "shared": ranks(".lora_shared_A"),
            **{task: ranks(f".lora_tasks_A.{task}") for task in canonical(tasks or _tasks(shapes))},
        },
        "SHARED_SCALE": 4.0,
        "TRAINABLE_SCALE_SHARED": any(key.endswith(".lora_shared_scale") for key in shapes),
        "TRAINABLE_SCALE_PER_TASK": any(".lora_task_scale." in key for key in shapes),
    }  # fmt: skip


def _tasks(shapes: Shapes) -> set[str]:
    return {m[1] for key in shapes if (m := re.match(r"decoders\.decoders\.(\w+)\.", key))}
