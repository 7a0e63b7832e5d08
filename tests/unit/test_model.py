"""Backbone, adapter, neck and heads put together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polytask.errors import ConfigError, PolytaskWarning
from polytask.model import MultiTaskModel
from polytask.tasks import TaskSet
from polytask.types import Drainable
from tests.helpers import MERGED_SWIN, SCENE, SIZE, SWIN, TASKS, VIT, build, gap, image, model_spec, shake

WITH_SCENE = TaskSet({**TASKS, "scene": SCENE})
ADAPTER = {"type": "mtlora", "rank": 2, "task_rank": 2}
RESNET = {"name": "resnet10t"}


@pytest.mark.parametrize(
    "backbone", [SWIN, MERGED_SWIN, VIT, RESNET], ids=["swin", "merged", "vit", "resnet"]
)
@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_logits_have_the_size_of_the_image(backbone: dict[str, Any], size: tuple[int, int]) -> None:
    model = build(model_spec(backbone), WITH_SCENE, size)
    output = model(image(2, size))
    assert {task: tuple(x.shape) for task, x in output.logits.items()} == {
        "semseg": (2, 3, *size), "normals": (2, 3, *size), "depth": (2, 1, *size), "scene": (2, 2),
    }  # fmt: skip
    assert output.penalties == {} and output.stats == {}


def test_asked_tasks_come_in_the_asked_order() -> None:
    model = build(model_spec(adapter=ADAPTER), WITH_SCENE).eval()
    assert model.tasks == ("semseg", "normals", "depth", "scene")
    assert tuple(model(image(), ("scene", "semseg")).logits) == ("scene", "semseg")
    assert model(image(), ()).logits == {}


def test_unknown_task() -> None:
    model = build(model_spec())
    with pytest.raises(ConfigError, match="the model has no task 'dept'; did you mean 'depth'"):
        model(image(), ("dept",))


def test_image_of_another_size() -> None:
    model = build(model_spec(VIT))
    with pytest.raises(ConfigError, match=r"image size: the backbone cannot take this image .*80"):
        model(image(1, (80, 80)))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"heads": {"dept": "hrnet"}},
            r"model\.heads: 'dept' is not a task of this run; did you mean 'depth'",
        ),
        (
            {"heads": {"scene": "hrnet"}},
            r"model\.heads\.scene: head 'hrnet' does not fit .*one prediction per image",
        ),
        ({"head": "pooled"}, r"model\.head: head 'pooled' does not fit .*one prediction per pixel"),
        ({"adapter": ADAPTER, "freeze_backbone": True}, r"model\.freeze_backbone: an adapter decides itself"),
        ({"neck": {"type": "fuse", "channels": [1, 2]}}, r"model\.neck\.channels: .*expected 4 numbers"),
    ],
)
def test_parts_that_do_not_fit(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(model_spec(**parts), WITH_SCENE)


def test_heads_of_single_tasks() -> None:
    model = build(
        model_spec(heads={"depth": {"type": "hrnet", "width": 1}, "scene": {"type": "pooled"}}), WITH_SCENE
    )
    assert model.heads["depth"][0].out_channels == model.neck.channels == 18
    assert model.heads["semseg"][0].out_channels == 72


def test_random_frozen_weights_are_worth_a_warning() -> None:
    with pytest.warns(
        PolytaskWarning, match="the frozen part has random weights; set model.backbone.pretrained"
    ):
        model_spec(adapter=ADAPTER).build(TASKS, SIZE)
    with pytest.warns(PolytaskWarning, match="the frozen part has random weights"):
        model_spec(freeze_backbone=True).build(TASKS, SIZE)
    model_spec().build(TASKS, SIZE)


def test_a_frozen_backbone_stays_in_eval_mode() -> None:
    model = build(model_spec(RESNET, freeze_backbone=True)).train()
    assert model.training and model.heads.training and not model.backbone.training
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    sum(x.sum() for x in model(image()).logits.values()).backward()
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())
    assert all(p.grad is None for p in model.backbone.parameters())
    adapted = build(model_spec(adapter=ADAPTER)).train()
    assert adapted.backbone.training


def test_merging_folds_batch_norms_and_keeps_the_outputs() -> None:
    model = build(model_spec(adapter=ADAPTER), WITH_SCENE).train()
    for seed in range(3):
        model(image(4, seed=seed))
    shake(model.heads)
    model.eval()
    merged = model.merged()
    with torch.no_grad():
        assert gap(merged(image()).logits, model(image()).logits) < 1e-5
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.heads.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in merged.heads.modules())
    assert not merged.training and not any(p.requires_grad for p in merged.parameters())


def test_merging_folds_the_heads_only() -> None:
    model = build(model_spec(RESNET)).eval()
    merged = model.merged()
    assert any(isinstance(module, nn.BatchNorm2d) for module in merged.backbone.modules())
    with torch.no_grad():
        assert gap(merged(image()).logits, model(image()).logits) < 1e-4


class Noisy(Drainable):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        self.recorded_penalties["size"] = x.abs().mean()
        return self.layer(x)


def test_penalties_of_parts_reach_the_output_once() -> None:
    model = build(model_spec())
    model.heads["depth"] = Noisy(model.heads["depth"])
    assert set(model(image()).penalties) == {"size"}
    assert model(image(), ("semseg",)).penalties == {}


def test_partition_of_the_model() -> None:
    part = build(model_spec(adapter=ADAPTER)).partition()
    assert all(name.startswith("backbone.") for name in [*part.shared, *part.frozen])
    assert {name.split(".")[0] for name in part.per_task["depth"]} == {"backbone", "neck", "heads"}


def learns(model: MultiTaskModel) -> bool:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = sum((x - 1).square().mean() for x in model(image()).logits.values())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("adapter", [None, ADAPTER])
def test_learns(adapter: dict[str, Any] | None) -> None:
    assert learns(build(model_spec(adapter=adapter), WITH_SCENE).train())
