"""What names and shapes of tensors tell about an official MLoRE checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polytask.convert.official import Draft, State
from polytask.errors import CheckpointError, TaskMismatchError
from polytask.files import load_yaml
from polytask.recipe import find_recipe, load_recipe

TASK_NAMES = {"sal": "saliency"}
"""Official task names that differ from ours."""
OURS = {ours: theirs for theirs, ours in TASK_NAMES.items()}
PATCH = 16
PUBLISHED = {
    "pascal": {384: "mlore_vit_small", 768: "mlore_vit_base", 1024: "mlore_vit_large"},
    "nyud": {1024: "mlore_vit_large"},
}
"""Recipes of the published models, by folder and width of the ViT."""
_DEPTHS = {"small": 12, "base": 12, "large": 24}
_SIZES = {384: "small", 768: "base", 1024: "large"}
_GATES = (
    "no checkpoint tells whether the softmax over all experts comes first, or the choice of the best, and a "
    "wrong order goes unnoticed: published models have softmax_first (PASCAL-Context) or top_first (NYUD-v2)"
)
Shapes = Mapping[str, tuple[int, ...]]


def outputs_of(state: State) -> dict[str, int]:
    """Official task names in a checkpoint, and their channels."""
    found = {}
    for key, value in state.items():
        if match := re.fullmatch(r"heads\.(\w+)\.linear_pred\.weight", key):
            found[match[1]] = [*value.shape, 0][0]
    return found


def grid_of(places: int) -> tuple[int, int] | None:
    """Rows and columns of that many places: a square, or what the published canvas of NYUD-v2 has."""
    side = math.isqrt(places)
    return (side, side) if side * side == places else {1008: (28, 36)}.get(places)


def infer(state: State, where: str) -> Draft:
    """The recipe of a checkpoint; how it was trained is taken from the nearest published one.

    Raises:
        CheckpointError: no MLoRE checkpoint. TaskMismatchError: heads that no published model has.
    """
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    outputs = outputs_of(state)
    if not outputs:
        expected = "keys heads.TASK.linear_pred.weight"
        raise CheckpointError("this is no MLoRE checkpoint", where=where, expected=expected)
    folder = _folder(outputs, where)
    neck, depth = _neck(shapes, next(iter(outputs)), where), _depth(shapes, where)
    places = _shape(shapes, "backbone.pos_embed", 3, where)[1] - 1
    width = _shape(shapes, "backbone.patch_embed.proj.weight", 4, where)[0]
    names = PUBLISHED[folder]
    name = f"{folder}/{names.get(width, next(iter(names.values())))}"
    recipe = load_yaml(find_recipe(Path(name)))
    asked = {"model.neck.gates": _GATES}
    backbone = recipe["model"]["backbone"] | _network(width, depth)
    backbone["options"] = recipe["model"]["backbone"]["options"] | backbone["options"]
    if width not in _SIZES:
        asked["model.backbone.options.num_heads"] = f"no tensor tells the heads of a ViT of width {width}"
    grid = grid_of(places)
    if grid is None:
        asked["data.image_size"] = f"no tensor tells height and width of a canvas of {places} patches"
    size = None if grid is None else [PATCH * side for side in grid]
    tasks = {ours: changes for ours, changes in recipe["tasks"].items() if OURS.get(ours, ours) in outputs}
    changed = {
        "data": recipe["data"] | {"image_size": size}, "tasks": tasks,
        "model": recipe["model"] | {"backbone": backbone, "neck": neck},
    }  # fmt: skip
    del recipe["name"]
    told = f"ViT of width {width} and depth {depth}, decoder of width {neck['width']}, " + (
        f"experts of ranks {neck['ranks']}, task rank {neck['task_rank']}, {places} patches"
    )
    notes = (f"read off the tensors: {told}", f"assumed: 9 experts act, trained as recipe {name} is")
    return Draft(recipe | changed, notes, asked)


def _folder(outputs: Mapping[str, int], where: str) -> str:
    """Of the recipes whose tasks have these names and channels."""
    known = {}
    for folder, names in PUBLISHED.items():
        tasks = load_recipe(f"{folder}/{next(iter(names.values()))}").task_set()
        known[folder] = {OURS.get(name, name): task.channels for name, task in tasks.items()}
        if outputs.items() <= known[folder].items():
            return folder
    expected = " or ".join(f"some of {_listed(channels)}" for channels in known.values())
    raise TaskMismatchError("heads of no known dataset", where=where, got=_listed(outputs), expected=expected)


def _listed(outputs: Mapping[str, int]) -> str:
    return ", ".join(f"{task} {channels}" for task, channels in outputs.items())


def _shape(shapes: Shapes, key: str, dimensions: int, where: str) -> tuple[int, ...]:
    """Of a tensor that has to be there."""
    found = shapes.get(key, ())
    if len(found) != dimensions or 0 in found:
        got = "/".join(map(str, found)) if key in shapes else None
        expected = f"a tensor {key} of {dimensions} dimensions"
        raise CheckpointError("this is no MLoRE checkpoint", where=where, got=got, expected=expected)
    return found


def _depth(shapes: Shapes, where: str) -> int:
    """Number of blocks, which have to be numbered without gaps."""
    blocks = {int(m[1]) for key in shapes if (m := re.match(r"backbone\.blocks\.(\d+)\.", key))}
    if not blocks or max(blocks) >= len(blocks):
        got = f"{len(blocks)}, the last of them {max(blocks, default=None)}"
        expected = "blocks numbered from 0 without gaps"
        raise CheckpointError("this is no MLoRE checkpoint", where=where, got=got, expected=expected)
    return len(blocks)


def _network(width: int, depth: int) -> dict[str, Any]:
    """Name of the timm network, and how it differs."""
    size = _SIZES.get(width, "small")
    options = {} if width in _SIZES else {"embed_dim": width}
    if depth != _DEPTHS[size]:
        options["depth"] = depth
    return {"name": f"vit_{size}_patch16_384", "options": options}


def _neck(shapes: Shapes, task: str, where: str) -> dict[str, Any]:
    module = "backbone.MLoRE_1.0"
    count = sum(re.fullmatch(rf"{module}\.lora_list_1\.\d+\.W\.weight", key) is not None for key in shapes)

    def first(key: str) -> int:
        return _shape(shapes, key, 4, where)[0]

    return {
        "type": "mlore", "width": first("backbone.fea_fuse.0.weight"), "chosen": 9,
        "ranks": [first(f"{module}.lora_list_1.{expert}.W.weight") for expert in range(count)],
        "task_rank": first(f"{module}.conv2.{task}.W.weight"),
    }  # fmt: skip
