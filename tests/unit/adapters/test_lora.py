from __future__ import annotations

from typing import Any

import pytest
import torch

from polytask.adapters.lora import LoRALinear
from polytask.backbones.streams import Private
from polytask.cost import count_macs
from polytask.errors import ConfigError
from polytask.model import MultiTaskModel
from tests.helpers import MERGED_SWIN, SWIN, TASKS, VIT, build, gap, image, model_spec, shake


def make(backbone: dict[str, Any] = SWIN, **settings: Any) -> MultiTaskModel:
    model = build(model_spec(backbone, adapter={"type": "lora", "rank": 2, **settings}))
    shake(model.backbone, 0.3, lambda name: name.endswith(".B.weight"))
    return model.eval()


def layers(model: MultiTaskModel) -> list[LoRALinear]:
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def test_branches_are_scaled_by_alpha_over_rank() -> None:
    layer = layers(make(alpha=3.0))[0]
    x = torch.randn(2, 5, layer.base.in_features)
    a, b, scale = layer.factors() or pytest.fail("no factors")
    assert a.shape == (2, layer.base.in_features) and b.shape == (layer.base.out_features, 2) and scale == 1.5
    wanted = x @ (layer.base.weight + 1.5 * b @ a).T + layer.base.bias
    assert gap([layer(x)], [wanted]) < 1e-6


def test_nothing_else_of_the_backbone_trains_unless_named() -> None:
    def trained(**settings: Any) -> set[str]:
        named = make(**settings).backbone.net.named_parameters()
        return {name for name, p in named if p.requires_grad and ".branch." not in name}

    assert not trained()
    norms = trained(train=["norm1", "downsample.norm"])
    assert norms and all("norm1." in name or "downsample.norm." in name for name in norms)


def test_each_task_has_a_network_of_its_own() -> None:
    model = make(per_task=True)
    with torch.no_grad():
        together = model(image()).logits
        for task in TASKS:
            alone = make()
            for layer, private in zip(layers(alone), layers(model), strict=True):
                assert isinstance(private.branch, Private)
                layer.branch.load_state_dict(private.branch.tasks[task].state_dict())
            alone.neck.load_state_dict(model.neck.state_dict())
            alone.heads.load_state_dict(model.heads.state_dict())
            assert torch.equal(alone(image()).logits[task], together[task])
    assert len({float(logits.sum()) for logits in together.values()}) == len(TASKS)


def test_what_no_branch_reaches_runs_once_for_all_tasks() -> None:
    """The patch embedding and the first frozen map; all else runs per task."""
    model = make(per_task=True)
    one, all_three = (count_macs(model, image(1), tuple(TASKS)[:count]) for count in (1, 3))
    assert 2 * one < all_three < 3 * one


def test_branches_per_task_have_factors_per_task() -> None:
    layer = layers(make(per_task=True))[0]
    assert layer.factors() is None and layer.merged() is layer
    own = layer.factors("depth")
    assert own is not None and own.B is dict(layer.named_parameters())["branch.tasks.depth.B.weight"]


def test_merging_leaves_no_branch() -> None:
    assert not layers(make().merged())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_patch_merging_with_a_branch(dropout: float) -> None:
    """In eval mode the map and its branch are one matrix for the neck; not while dropout acts."""
    model = make(MERGED_SWIN, layers=["reduction"], dropout=dropout)
    assert all(layer.linear_weight() is not None for layer in layers(model))
    model.train()
    assert all((layer.linear_weight() is None) == (dropout > 0) for layer in layers(model))


@pytest.mark.parametrize(
    ("backbone", "settings", "words"),
    [
        (SWIN, {"rank": 0}, "adapter.rank: input should be greater than or equal to 1"),
        (SWIN, {"alpha": 0}, "adapter.alpha: input should be greater than 0"),
        (SWIN, {"layers": []}, "model.adapter.layers"),
        (VIT, {"layers": ["reduction"]}, "the backbone has no 'reduction', expected fc1, fc2, proj, qkv"),
        (SWIN, {"train": ["nrom"]}, "model.adapter.train: 'nrom' names no parameter"),
        (SWIN, {"train": ["fc1.bias"]}, "'fc1.bias' names layers.0.blocks.0.mlp.fc1.bias, which has"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(backbone: dict[str, Any], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(backbone, **settings)
    assert words.removeprefix("model.") in str(caught.value)
