"""MTLoRA against vectors of the official code: whole models, their gradients, one layer, counts, rates."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from polytask.adapters.mtlora import Branches, TaskLinear
from polytask.backbones.streams import Streams
from polytask.config import decode
from polytask.convert.mtlora import TASK_NAMES, convert_state, official_name
from polytask.errors import CheckpointError
from polytask.model import ModelSpec, MultiTaskModel
from polytask.optim import OptimSpec
from polytask.tasks import Normals, Saliency, Segmentation, TaskSet
from polytask.types import count, materialize
from tests.helpers import build

GOLDEN = Path(__file__).parent / "golden" / "mtlora"
META = json.loads((GOLDEN / "meta.json").read_text())
MODELS = sorted(META["models"])
LAYERS = ["qkv", "proj", "fc1", "fc2"]
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}
models = pytest.mark.parametrize("name", MODELS)


def tasks_of(outputs: dict[str, int]) -> TaskSet:
    """Official task names and channels -> our tasks."""

    def task(name: str, channels: int) -> Any:
        if channels == 1:
            return Saliency()
        return Normals() if name == "normals" else Segmentation(classes=tuple(map(str, range(channels))))

    return TaskSet({ours(name): task(name, channels) for name, channels in outputs.items()})


def ours(task: str) -> str:
    return TASK_NAMES.get(task, task)


@cache
def official_state(name: str) -> dict[str, Tensor]:
    return {
        k: v.float()
        for k, v in load_file(GOLDEN / f"{META['models'][name]['state']}_state.safetensors").items()
    }


@cache
def vectors(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}_io.safetensors")


def blank(name: str, **changes: Any) -> MultiTaskModel:
    meta = META["models"][name] | changes
    adapter = {
        "type": "mtlora", "rank": meta["rank"], "scale": meta["scale"], "mode": meta["mode"],
        "task_rank": {ours(t): r for t, r in meta["task_rank"].items()},
        "layers": LAYERS + ["reduction"] * meta["plus"],
    }  # fmt: skip
    spec = decode(
        ModelSpec,
        {
            "backbone": {
                "name": "swin_tiny_patch4_window7_224",
                "options": meta["options"],
                "feature_point": "after_merge",
            },
            "adapter": adapter,
            "neck": {"type": "fuse", "channels": meta["channels"]},
        },
    )
    return build(spec, tasks_of(meta["outputs"]), (meta["image_size"],) * 2)


@cache
def loaded(name: str) -> MultiTaskModel:
    """The converted official model, in eval mode; tests must not change it."""
    model = blank(name)
    model.load_state_dict(convert_state(official_state(name), model), strict=True)
    return model.eval()


@models
@pytest.mark.parametrize("merged", [False, True])
def test_outputs(name: str, merged: bool) -> None:
    model = loaded(name).merged() if merged else loaded(name)
    with torch.no_grad():
        logits = model(vectors(name)["input"]).logits
    for task in META["models"][name]["outputs"]:
        pixels = logits[ours(task)][..., ::4, ::4]
        torch.testing.assert_close(pixels, vectors(name)[f"output.{task}"], **TOLERANCE)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "a"])
@pytest.mark.parametrize("merged", [False, True])
def test_features(name: str, merged: bool) -> None:
    model = loaded(name).merged() if merged else loaded(name)
    backbone = model.backbone
    backbone.own_streams_only = False  # the last shared feature is wanted here
    try:
        with torch.no_grad():
            pyramids = backbone(vectors(name)["input"], model.tasks)
    finally:
        backbone.own_streams_only = True
    theirs = {"shared": "shared", **{ours(t): t for t in META["models"][name]["outputs"]}}
    assert set(pyramids.per_task) == set(theirs) - {"shared"}
    for task, official in theirs.items():
        for stage, level in enumerate(pyramids.of(task)):
            tokens = materialize(level).flatten(2).transpose(1, 2)
            torch.testing.assert_close(tokens, vectors(name)[f"feature.stage{stage}.{official}"], **TOLERANCE)


@models
def test_counts(name: str) -> None:
    theirs = META["models"][name]["counts"]
    assert counts(loaded(name)) == tuple(
        theirs[key] for key in ("total", "trainable", "lora", "decoder", "extra")
    )


def targets() -> dict[str, Tensor]:
    batch = {ours(t): vectors("matrix")[f"target.{t}"] for t in META["models"]["matrix"]["outputs"]}
    normals = batch["normals"]
    return {k: v.long() for k, v in batch.items()} | {"normals": torch.where(normals == 255, 0.0, normals)}


def test_losses_and_gradients() -> None:
    meta, model = META["models"]["matrix"], loaded("matrix")
    model.zero_grad()
    losses = tasks_of(meta["outputs"]).losses(model(vectors("matrix")["input"]).logits, targets())
    for task, weight in meta["loss_weights"].items():
        assert float(losses[ours(task)].detach()) == pytest.approx(meta["losses"][task], rel=1e-5)
        (weight * losses[ours(task)]).backward(retain_graph=True)
    theirs = {k.removeprefix("grad."): v for k, v in vectors("matrix").items() if k.startswith("grad.")}
    assert len(theirs) == meta["n_grads"]
    trainable = dict(model.partition().trainable())
    without = {official_name(name) for name, p in trainable.items() if p.grad is None}
    assert without == set(meta["trainable_without_grad"])
    with_gradient = {official_name(name): p.grad for name, p in trainable.items() if p.grad is not None}
    assert theirs.keys() <= with_gradient.keys()  # of the others there is the norm
    for key, gradient in theirs.items():
        own = with_gradient[key]
        assert own is not None
        torch.testing.assert_close(own.view_as(gradient), gradient, rtol=1e-4, atol=1e-4, msg=key)
    norm = torch.stack([g.norm() for g in with_gradient.values() if g is not None]).norm()
    torch.testing.assert_close(float(norm), meta["grad_norm_all"], rtol=1e-5, atol=0.0)
    assert all(p.grad is None for p in model.partition().frozen.values())
    model.zero_grad()


def test_conversion_drops_only_what_the_network_derives() -> None:
    state, model = official_state("plus"), loaded("plus")
    derived = {key for key in state if key.endswith(("attn_mask", "relative_position_index"))}
    assert derived
    assert len(state) - len(derived) == len(convert_state(state, model)) == len(model.state_dict())


def test_foreign_checkpoints_are_refused() -> None:
    state, model = dict(official_state("matrix")), loaded("matrix")
    del state["backbone.layers.0.blocks.0.attn.qkv.lora_shared_A"]
    with pytest.raises(CheckpointError, match=r"1 problems, first: missing backbone.*qkv\.lora_shared_A"):
        convert_state(state, model)
    with pytest.raises(CheckpointError, match=r"1 problems, first: left over head\.weight"):
        convert_state({**official_state("matrix"), "head.weight": torch.zeros(1)}, model)
    with pytest.raises(CheckpointError, match="expected"):
        convert_state(official_state("addition"), model)
    with pytest.raises(CheckpointError, match=r"left over .*reduction\.lora_shared_A"):
        convert_state(official_state("plus"), blank("plus", plus=False))


def test_same_size_in_another_shape_is_refused() -> None:
    state, model = dict(official_state("matrix")), loaded("matrix")
    key = "backbone.layers.0.blocks.0.mlp.fc1.linear.weight"
    state[key] = state[key].T.contiguous()
    with pytest.raises(CheckpointError, match=r"fc1\.linear\.weight has shape"):
        convert_state(state, model)


# --- one layer -------------------------------------------------------------------------------------

LAYER = load_file(GOLDEN / "layer_io.safetensors")
TASKS = ("semseg", "normals", "sal", "human_parts")


def layer(mode: Any, streams: Streams, *, narrow: bool) -> TaskLinear:
    """The vectors' layer with ragged task ranks 2, 3, 1, 2, built and loaded as an adapter builds it."""
    ranks, scales = META["layer"]["ranks"], META["layer"]["task_scale"]
    branches = Branches(
        ranks["shared"], META["layer"]["shared_scale"], {t: ranks[t] for t in TASKS}, scales, 0.05, mode
    )
    wrapper = TaskLinear(nn.Linear(10, 14), branches, streams, narrow=narrow, is_last=False)
    return load_layer(wrapper, mode)


def load_layer(wrapper: TaskLinear, prefix: str) -> TaskLinear:
    state = {
        name: LAYER[
            f"{prefix}.param.{official_name(f'backbone.net.fc1.{name}').removeprefix('backbone.fc1.')}"
        ]
        for name in wrapper.state_dict()
    }
    wrapper.load_state_dict(state, strict=True)
    return wrapper.eval()


@pytest.mark.parametrize("mode", ["matrix", "matrixv2", "addition"])
@pytest.mark.parametrize("given", ["same", "own"])
@pytest.mark.parametrize("merged", [False, True])
def test_layer(mode: str, given: str, merged: bool) -> None:
    streams = Streams()
    streams.begin(TASKS, skip_final_shared=False)
    wrapper: nn.Module = layer(mode, streams, narrow=given == "same")
    if merged:
        wrapper = wrapper.merged()  # type: ignore[operator]
    inputs = [LAYER["x"]] + [LAYER[f"x_tasks.{task}"] for task in TASKS] * (given == "own")
    with torch.no_grad():
        shared, *tasks = wrapper(torch.cat(inputs)).chunk(5)
    torch.testing.assert_close(shared, LAYER[f"{mode}.{given}.shared"], **TOLERANCE)
    for task, y in zip(TASKS, tasks, strict=True):
        torch.testing.assert_close(y, LAYER[f"{mode}.{given}.task.{task}"], **TOLERANCE)


@pytest.mark.parametrize("merged", [False, True])
def test_layer_without_tasks(merged: bool) -> None:
    branches = Branches(
        META["layer"]["ranks"]["shared"], META["layer"]["shared_scale"], {}, {}, 0.05, "matrix"
    )
    wrapper = load_layer(
        TaskLinear(nn.Linear(10, 30), branches, Streams(), narrow=False, is_last=False), "notasks"
    )
    with torch.no_grad():
        y = (wrapper.merged() if merged else wrapper)(LAYER["x"])
    torch.testing.assert_close(y, LAYER["notasks.shared"], **TOLERANCE)


# --- counts (those of all recipes are in test_mtlora_counts.py) ------------------------------------


def counts(model: MultiTaskModel) -> tuple[int, int, int, int, int]:
    """Total, trainable, adapter branches, outside the backbone, rest."""
    trainable = dict(model.partition().trainable())
    branches = {n: p for n, p in trainable.items() if "lora" in official_name(n)}
    decoder = {n: p for n, p in trainable.items() if not n.startswith("backbone.")}
    total = sum(p.numel() for p in model.parameters())
    rest = count(trainable) - count(branches) - count(decoder)
    return total, count(trainable), count(branches), count(decoder), rest


# --- optimizer -------------------------------------------------------------------------------------

RECIPE = OptimSpec(lr=5e-4, warmup_lr=5e-7, min_lr=5e-6, lr_per_batch=512, warmup_epochs=20)


def test_learning_rates() -> None:
    """The official loops set the rate after update k, so update k runs at the value after k - 1."""
    optimizer = RECIPE.optimizer(nn.Linear(2, 2), [], batch_size=32)
    scheduler = RECIPE.scheduler(optimizer, 300 * 156, 156, batch_size=32)
    assert scheduler is not None
    for step, rate in META["lr"].items():
        scheduler.step_update(0 if step == "init" else int(step))
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([rate] * 2, rel=1e-9), step


def test_vectors_and_biases_are_not_decayed_but_tables_are() -> None:
    model = loaded("plus")
    optimizer = RECIPE.optimizer(model, [], batch_size=32)
    decayed = {id(p): group["weight_decay"] > 0 for group in optimizer.param_groups for p in group["params"]}
    trainable = dict(model.partition().trainable())
    assert len(decayed) == len(trainable)
    for name, parameter in trainable.items():
        assert decayed[id(parameter)] == (parameter.ndim > 1 and not name.endswith(".bias")), name
    assert any("relative_position_bias_table" in name and decayed[id(p)] for name, p in trainable.items())
