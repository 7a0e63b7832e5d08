"""One forked block against the formulas, for every choice of layers; what trains, and what nobody reads."""

from __future__ import annotations

from itertools import chain, combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.adapters.mtlora import TaskLinear
from polytask.cost import count_macs
from polytask.model import MultiTaskModel
from polytask.types import materialize
from tests.helpers import MERGED_SWIN, SWIN, TASKS, VIT, build, gap, image, model_spec, shake

NAMES = tuple(TASKS)
ROLES = ("proj", "fc1", "fc2")
SUBSETS = list(chain.from_iterable(combinations(ROLES, size) for size in (1, 2, 3)))


def model(backbone: dict[str, Any], branches: float = 0.1, **settings: Any) -> MultiTaskModel:
    made = build(model_spec(backbone, adapter={"type": "mtlora", "rank": 2, "task_rank": 2, **settings}))
    shake(made.backbone, branches, lambda name: name.endswith((".B", "scale")))
    return made.eval()


def layer(module: nn.Module, shared: Tensor, own: Tensor | None, task: str, mode: str) -> Tensor:
    """What a layer hands the stream of a task (of nobody, if ``own`` is None), by the paper."""
    if not isinstance(module, TaskLinear):
        plain: Tensor = module(shared if own is None else own)
        return plain
    base, branch = module.base(shared), module.shared
    low = 0 if branch is None else branch.scale * F.linear(F.linear(shared, branch.A), branch.B)
    if own is None:
        return base + low
    part: Any = module.tasks[task]
    y: Tensor = base + part.scale * F.linear(F.linear(own, part.A), part.B)
    return y + low if mode == "matrixv2" else y


@pytest.mark.parametrize("mode", ["matrix", "matrixv2"])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("layers", SUBSETS, ids="+".join)
def test_streams_with_any_layers(layers: tuple[str, ...], rank: int, mode: str) -> None:
    """Also without `proj` a stream keeps its residual, and without `fc2` it goes on."""
    made = model(VIT, layers=("qkv", *layers), mode=mode, rank=rank, train_task_scale=True)
    fork: Any = made.backbone.net.get_submodule("blocks.3")
    block, seen = fork.block, {}
    fork.register_forward_pre_hook(lambda _, x: seen.update(x=x[0]))
    # if no task branch sits at `proj`, the layer is wrapped to repeat what it puts out
    proj = block.attn.proj if "proj" in layers else block.attn.proj.layer
    proj.register_forward_pre_hook(lambda _, x: seen.update(u=x[0]))
    with torch.no_grad():
        pyramids = made.backbone(image(), NAMES)
        x, u = seen["x"], seen["u"]
        first = x + layer(proj, u, None, "", mode)
        for task in NAMES:
            own_u = u if "proj" in layers else None
            own = x + layer(proj, u, own_u, task, mode)
            wide = block.norm2(first), block.norm2(own)
            hidden = [F.gelu(layer(block.mlp.fc1, wide[0], y, task, mode)) for y in (None, wide[1])]
            own = own + layer(block.mlp.fc2, hidden[0], hidden[1], task, mode)
            level = materialize(pyramids.of(task)[-1]).flatten(2).transpose(1, 2)
            torch.testing.assert_close(level, own[:, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backbone", [MERGED_SWIN, SWIN, VIT], ids=["merged", "swin", "vit"])
@pytest.mark.parametrize("training", [False, True])
def test_fresh_streams_equal_the_shared_one_exactly(backbone: dict[str, Any], training: bool) -> None:
    made = model(backbone, branches=0, dropout=0.3 * training, train_scale=True, train_task_scale=True)
    made.backbone.own_streams_only = False
    made.train(training)
    pyramids = made.backbone(image(), NAMES)
    assert tuple(pyramids.per_task) == NAMES
    shared = [materialize(level) for level in pyramids.shared]
    for task in NAMES:
        assert gap([materialize(level) for level in pyramids.of(task)], shared) == 0.0


def test_sums_of_streams_need_no_shared_branch() -> None:
    made = model(MERGED_SWIN, mode="addition", rank=0)
    names = [name for name, _ in made.backbone.named_parameters()]
    assert not any(".shared." in name for name in names)
    assert sum(".norm.weight" in name and ".mlp.fc1." in name for name in names) == 4
    alone = model(MERGED_SWIN, mode="addition", rank=2, layers=ROLES)
    owned = [name for name, _ in alone.backbone.named_parameters() if ".shared.A" in name]
    assert len(owned) == 3  # of the one block that is not the last of its stage


def test_the_branch_that_nobody_reads_has_no_gradient_and_costs_nothing() -> None:
    made = model(MERGED_SWIN, train_scale=True)
    sum(x.sum() for x in made(image()).logits.values()).backward()
    trainable = dict(made.partition().trainable())
    without = {name for name, p in trainable.items() if p.grad is None}
    last = made.backbone.net.get_submodule("layers.3.blocks.0").block.mlp.fc2.shared  # type: ignore[union-attr]
    assert {id(trainable[name]) for name in without} == {id(p) for p in last.parameters()}
    skipped = count_macs(made, image(1), NAMES)
    made.backbone.own_streams_only = False
    tokens, width = 4, 64  # 64 pixels over a stride of 32, squared; channels of the last stage
    assert count_macs(made, image(1), NAMES) - skipped == tokens * 2 * (4 * width + width)


@pytest.mark.parametrize("layers", [ROLES, (*ROLES, "reduction")])
def test_merged_models_multiply_projections_with_patch_merging_only_once(layers: tuple[str, ...]) -> None:
    made = model(MERGED_SWIN, layers=layers)
    merged, later = made.merged(), made.merged()
    for projection in later.neck.projections.values():  # type: ignore[operator, union-attr]
        projection._buffers.clear()  # as if each pass had to multiply them
    wide = [8, 16, 32]  # channels before patch merging, which leads from 4C to 2C
    products = sum(c * 2 * w * 4 * w for c, w in zip(made.neck.levels_of("depth"), wide, strict=False))
    saved = count_macs(later, image(1), NAMES) - count_macs(merged, image(1), NAMES)
    assert saved == len(NAMES) * products
    for task, logits in later(image()).logits.items():
        assert torch.equal(logits, merged(image()).logits[task])
    assert merged.state_dict().keys() == later.state_dict().keys()


def test_everything_may_train() -> None:
    made = model(SWIN, train="all", layers=(*ROLES, "qkv", "reduction")).train()
    assert not made.partition().frozen
    before = made(image()).logits
    sum(x.square().sum() for x in before.values()).backward()
    weights = [m.base.weight for m in made.modules() if isinstance(m, TaskLinear)]
    assert weights and all(w.grad is not None and w.grad.any() for w in weights)
    made.eval()
    with torch.no_grad():
        assert gap(made.merged()(image()).logits, made(image()).logits) < 1e-5


def test_biases_of_adapted_layers_may_train() -> None:
    def biases(**settings: Any) -> set[str]:
        made = model(SWIN, train=["downsample.norm"], **settings)
        return {name for name in dict(made.partition().trainable()) if name.endswith(".base.bias")}

    assert not biases()
    adapted, everywhere = biases(train_biases="adapted", layers=("fc1", "fc2")), biases(train_biases=True)
    assert adapted == {name for name in everywhere if ".fc1." in name or ".fc2." in name}
    assert len(adapted) == 2 * 5 and len(everywhere) == 4 * 5
