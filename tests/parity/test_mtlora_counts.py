"""Parameter counts of every shipped MTLoRA recipe and of every setting that changes what trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polytask.convert.mtlora import official_name
from polytask.model import MultiTaskModel
from polytask.recipe import Recipe, load_recipe, shipped_recipes
from polytask.types import count
from tests.helpers import build
from tests.parity.test_mtlora import LAYERS, counts

PLUS = [*LAYERS, "reduction"]
DECODER, EXTRA, EXTRA_PLUS = 1_946_624, 1_599_546, 51_258
PASCAL = {
    "pascal/mtlora_r16": (30_871_418, 4_953_146, 1_406_976, DECODER, EXTRA),
    "pascal/mtlora_r32": (32_001_914, 6_083_642, 2_537_472, DECODER, EXTRA),
    "pascal/mtlora_r64": (34_262_906, 8_344_634, 4_798_464, DECODER, EXTRA),
    "pascal/mtlora_plus_r4": (30_039_674, 2_573_114, 575_232, DECODER, EXTRA_PLUS),
    "pascal/mtlora_plus_r8": (30_614_906, 3_148_346, 1_150_464, DECODER, EXTRA_PLUS),
    "pascal/mtlora_plus_r16": (31_765_370, 4_298_810, 2_300_928, DECODER, EXTRA_PLUS),
    "pascal/mtlora_plus_r16_pertask": (30_935_930, 3_469_370, 1_471_488, DECODER, EXTRA_PLUS),
    "pascal/mtlora_plus_r32_pertask": (32_130_938, 4_664_378, 2_666_496, DECODER, EXTRA_PLUS),
    "pascal/mtlora_plus_r64_pertask": (34_520_954, 7_054_394, 5_056_512, DECODER, EXTRA_PLUS),
    "pascal/hard_sharing": (29_464_442, 29_464_442, 0, DECODER, 29_464_442 - DECODER),
}
"""Measured with the official code: total, trainable, branches, neck and heads, rest."""
SWINS = {  # channels of the first stage, blocks per stage, attention heads of the first stage
    "swin_tiny": (96, (2, 2, 6, 2), 3),
    "swin_small": (96, (2, 2, 18, 2), 3),
    "swin_base": (128, (2, 2, 18, 2), 4),
    "swin_large": (192, (2, 2, 18, 2), 6),
}
RECIPES = [name for name in shipped_recipes() if name.startswith(("pascal/mtlora", "nyud/mtlora"))]


def on_paper(recipe: Recipe, **adapter: Any) -> MultiTaskModel:
    """The model of a recipe without memory for its weights, with changed settings of its adapter."""
    spec = recipe.model
    if adapter:
        assert spec.adapter is not None
        spec = spec.model_copy(update={"adapter": spec.adapter.model_copy(update=adapter)})
    with torch.device("meta"):
        return build(spec, recipe.task_set(), recipe.data.image_size)


def closed(recipe: Recipe) -> tuple[int, int, int, int, int]:
    """The same five figures of a Swin, by the formulas."""
    name = recipe.model.backbone.name
    width, depths, heads = next(SWINS[known] for known in SWINS if name.startswith(known))
    adapter: Any = recipe.model.adapter
    tasks, rank, plus = recipe.task_set(), adapter.rank, "reduction" in adapter.layers
    widths = [width * 2**stage for stage in range(4)]
    blocks = [(c, heads * 2**stage) for stage, c in enumerate(widths) for _ in range(depths[stage])]
    merges = widths[:3]
    shared = 16 * rank * sum(c for c, _ in blocks) + plus * 6 * rank * sum(merges)
    of_tasks = 12 * sum(widths) * adapter.task_rank * len(tasks)
    reductions = sum(4 * c * 2 * c for c in merges)
    norms = sum(4 * c for c, _ in blocks) + sum(8 * c for c in merges)
    tables = sum(169 * h for _, h in blocks)
    extra = (48 + 1 + 2) * width + norms + tables + (not plus) * reductions
    frozen = sum(12 * c * c + 9 * c for c, _ in blocks) + plus * reductions
    levels = zip((18, 36, 72, 144), (*widths[1:], widths[3]), strict=True)
    neck = len(tasks) * sum(to * c for to, c in levels)
    decoder = neck + sum(294_840 + 1_081 * task.channels for task in tasks.values())
    trainable = shared + of_tasks + decoder + extra
    return trainable + frozen, trainable, shared + of_tasks, decoder, extra


@pytest.mark.parametrize("name", PASCAL)
def test_published_counts(name: str) -> None:
    assert counts(on_paper(load_recipe(name))) == PASCAL[name]


@pytest.mark.parametrize("name", [name for name in RECIPES if "vit" not in name and "hiera" not in name])
def test_recipes_by_the_formulas(name: str) -> None:
    recipe = load_recipe(name)
    expected = closed(recipe)
    assert counts(on_paper(recipe)) == expected
    assert PASCAL.get(name, expected) == expected


@pytest.mark.parametrize(("size", "width"), [("small", 384), ("base", 768)])
def test_vit(size: str, width: int) -> None:
    _, _, branches, decoder, extra = counts(on_paper(load_recipe(f"pascal/mtlora_vit_{size}_r64")))
    assert branches == 16 * width * 12 * 64 + 12 * width * 4 * (4 * 4)
    assert decoder == 4 * width * 270 + 4 * 294_840 + 1_081 * 32
    assert extra == (3 * 16 * 16 + 1) * width + 12 * 4 * width  # patch embedding, norms


def test_hiera() -> None:
    _, _, branches, decoder, _ = counts(on_paper(load_recipe("pascal/mtlora_hiera_small_r64")))
    assert branches > 0 and decoder == 4 * 96 * (18 + 72 + 288 + 1152) + 4 * 294_840 + 1_081 * 32


# --- settings that change what trains --------------------------------------------------------------

R64 = "pascal/mtlora_r64"
TRAINABLE, FROZEN = PASCAL[R64][1], PASCAL[R64][0] - PASCAL[R64][1]
SCALES = {"train_scale": True, "train_task_scale": True}
WIDTHS = (96, 192, 384, 768)
BLOCK_WIDTHS = (192, 384, 2304, 1536)  # times blocks, per stage
PARTS = {
    "patch_embed": "patch_embed", "norm": "norm", "tables": "relative_position_bias_table",
    "reduction": "downsample.reduction",
}  # fmt: skip


@pytest.mark.parametrize(
    ("adapter", "trainable"),
    [
        ({"mode": "addition"}, 7_255_994),
        ({"mode": "lora_only"}, 8_068_154),
        ({"mode": "matrixv2"}, TRAINABLE),
        ({"train_biases": True}, 8_384_378),
        ({"train_biases": "adapted"}, 8_384_378),  # those of norms and patch embedding train anyway
        (
            {"train_biases": "adapted", "layers": ("fc1",)},
            DECODER + EXTRA + 5 * (64 * sum(BLOCK_WIDTHS) + 16 * sum(WIDTHS)) + 4 * sum(BLOCK_WIDTHS),
        ),
        ({"train_scale": True}, TRAINABLE + 48),
        ({"train_task_scale": True}, TRAINABLE + 4 * 3 * 4),
        ({**SCALES, "layers": tuple(PLUS)}, 7_054_394 + 51 + 48),
        ({**SCALES, "mode": "addition"}, 7_255_994 + 36 + 48),
        (
            {"task_rank": {"semseg": 1, "normals": 2, "saliency": (3,), "human_parts": (4, 5, 6, 7)}},
            TRAINABLE - 17_280 * 16 + 12 * (6 * sum(WIDTHS) + 4 * 96 + 5 * 192 + 6 * 384 + 7 * 768),
        ),
        (
            {"rank": (16, 32, 64, 8)},
            TRAINABLE - 70_656 * 64 + 16 * (16 * 192 + 32 * 384 + 64 * 2304 + 8 * 1536),
        ),
        ({"rank": 0}, TRAINABLE - 70_656 * 64),
        ({"train": "all"}, TRAINABLE + FROZEN),
    ],
    ids=str,
)  # fmt: skip
def test_trainable_counts_of_variants(adapter: dict[str, Any], trainable: int) -> None:
    assert counts(on_paper(load_recipe(R64), **adapter))[1] == trainable


@pytest.mark.parametrize(
    ("frozen", "fewer"),
    [
        (("patch_embed",), 48 * 96 + 96),  # its norm trains as a norm
        (("norm",), 23_040),  # that of the patch embedding trains with it
        (("patch_embed", "norm"), 4_896 + 23_040),
        (("tables",), 23_322),
        (("reduction",), 1_548_288),
        (tuple(PARTS), EXTRA),
    ],
    ids=str,
)
def test_freeze_switches(frozen: tuple[str, ...], fewer: int) -> None:
    """Each official switch is a part left out of ``train``."""
    train = tuple(part for name, part in PARTS.items() if name not in frozen)
    total, trainable, *_ = counts(on_paper(load_recipe(R64), train=train))
    assert (total, trainable) == (PASCAL[R64][0], TRAINABLE - fewer)


def test_the_norm_of_sums_trains_whatever_is_frozen() -> None:
    model = on_paper(load_recipe(R64), mode="addition", train=())
    norms = {name for name, _ in model.partition().trainable() if "lora_norm" in official_name(name)}
    assert len(norms) == 2 * 3 * 4


def test_the_branch_that_nobody_reads_is_counted() -> None:
    model = on_paper(load_recipe(R64))
    last = {n: p for n, p in model.named_parameters() if ".3.blocks.1." in n and ".fc2.shared." in n}
    assert count(last) == 64 * (3072 + 768) == 245_760


def test_official_names_of_scales() -> None:
    model = on_paper(load_recipe(R64), **SCALES)
    names = {official_name(n) for n, _ in model.named_parameters() if n.endswith(".scale")}
    shared = {name for name in names if name.endswith(".lora_shared_scale")}
    of_tasks = {name.rpartition(".lora_task_scale.")[2] for name in names - shared}
    assert len(shared) == 48 and len(names) == 96
    assert of_tasks == {"semseg", "normals", "sal", "human_parts"}
    assert "backbone.layers.0.blocks.1.mlp.fc1.lora_task_scale.sal" in names
