"""What every timm network must do as a backbone, each small and with random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polytask.adapters.base import adapt
from polytask.adapters.mtlora import MTLoRA
from polytask.backbones import streams
from polytask.backbones.streams import StreamPlan
from polytask.backbones.timm import ROLES, Backbone
from polytask.errors import UnsupportedBackboneError
from polytask.types import materialize
from tests.helpers import MERGED_SWIN, SIZE, SWIN, VIT, backbone_spec, gap, image, shake

SMALL = {"embed_dim": 16, "depth": 4, "num_heads": 2}
ADAPTABLE: dict[str, dict[str, Any]] = {
    "swin": SWIN,
    "swin_merged": MERGED_SWIN,
    "swinv2_cr": {
        "name": "swinv2_cr_tiny_ns_224",
        "options": {
            "embed_dim": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 2, 2],
            "window_size": 2,
            "init_values": 0.5,
        },
    },
    "swin_cubic_maps": {**SWIN, "options": {**SWIN["options"], "embed_dim": 16}},  # 16 channels on 16 x 16
    "vit": VIT,
    "vit_registers": {"name": "vit_small_patch16_224", "options": {**SMALL, "reg_tokens": 3}},
    "deit3": {"name": "deit3_small_patch16_224", "options": {**SMALL, "init_values": 0.5}},
    "test_vit": {"name": "test_vit"},
    "hiera": {"name": "hiera_tiny_224", "options": {"embed_dim": 16, "stages": [1, 1, 1, 1]}},
    "davit": {
        "name": "davit_tiny",
        "options": {"embed_dims": [8, 16, 32, 64], "num_heads": [1, 2, 4, 8], "depths": [1, 1, 1, 1]},
    },
    "maxvit": {"name": "test_maxvit"},
    "cait": {"name": "cait_xxs24_224", "options": {**SMALL, "init_values": 0.5}},
}
PLAIN: dict[str, dict[str, Any]] = {
    "resnet10t": {"name": "resnet10t"},
    "convnext": {"name": "convnext_atto"},
    "efficientnet_lite": {"name": "tf_efficientnet_lite0"},
    "hrnet": {"name": "hrnet_w18_small"},
    "pvt": {"name": "pvt_v2_b0"},
    "mobilevit": {"name": "mobilevit_xxs"},
    "unet": {"name": "unet", "options": {"width": 4}},
    "segnet": {"name": "segnet", "options": {"width": 4}},
}
TASKS = ("a", "b")

adaptable = pytest.mark.parametrize("name", ADAPTABLE)
every = pytest.mark.parametrize("name", [*ADAPTABLE, *PLAIN])


def build(settings: dict[str, Any], size: tuple[int, int] = SIZE) -> Backbone:
    torch.manual_seed(0)
    options = settings.get("options", {})
    return backbone_spec(settings, options=options).build(size).eval()


@cache
def plain(name: str) -> Backbone:
    return build((ADAPTABLE | PLAIN)[name])


def adapted(name: str, tasks: tuple[str, ...] = TASKS, **settings: Any) -> Backbone:
    """With an adapter on top whose branches are not zero any more."""
    backbone = build(ADAPTABLE[name])
    adapt(backbone, MTLoRA(**({"rank": 2, "task_rank": 2} | settings)), tasks)
    shake(backbone, 0.1, lambda path: path.endswith(".B"))
    return backbone.eval()


def maps(backbone: Backbone, x: Tensor, tasks: tuple[str, ...] = ()) -> dict[str, list[Tensor]]:
    """Levels of the shared stream and of every task that owns one."""
    with torch.no_grad():
        pyramids = backbone(x, tasks)
        streams = {"shared": pyramids.shared, **pyramids.per_task}
        return {stream: [materialize(level) for level in levels] for stream, levels in streams.items()}


@every
def test_channels_and_strides_are_those_of_the_maps(name: str) -> None:
    backbone = plain(name)
    levels = maps(backbone, image())["shared"]
    assert [x.shape[1] for x in levels] == list(backbone.channels)
    for x, stride in zip(levels, backbone.strides, strict=True):
        assert x.shape == (2, x.shape[1], SIZE[0] // stride, SIZE[1] // stride)
    assert list(backbone.strides) == sorted(backbone.strides)
    assert all(x.isfinite().all() for x in levels)
    assert backbone.base_digest is None


@every
def test_each_sample_is_alone(name: str) -> None:
    backbone, x = plain(name), image()
    both, second = maps(backbone, x)["shared"], maps(backbone, x[1:])["shared"]
    assert gap([level[1:] for level in both], second) < 1e-4


@adaptable
def test_sites_are_in_execution_order_and_complete(name: str) -> None:
    backbone = build(ADAPTABLE[name])
    sites = list(backbone.sites())
    ran: list[str] = []
    for site in sites:
        layer = backbone.net.get_submodule(site.name)
        assert isinstance(layer, nn.Linear)
        layer.register_forward_hook(lambda *_, name=site.name: ran.append(name))
    maps(backbone, image(1))
    assert ran == [site.name for site in sites]
    of_blocks = [site for site in sites if site.role != "reduction"]
    assert [site.role for site in of_blocks] == list(ROLES.values()) * (len(of_blocks) // 4)
    assert [site.stage for site in of_blocks] == sorted(site.stage for site in of_blocks)


@adaptable
def test_stage_ends_are_the_last_blocks_of_their_stages(name: str) -> None:
    backbone = plain(name)
    last: dict[int, int] = {}
    for site in backbone.sites():
        last[site.stage] = max(last.get(site.stage, -1), site.block)
    assert sorted(last) == list(range(len(backbone.channels)))
    for site in backbone.sites():
        is_end = site.role != "reduction" and site.block == last[site.stage]
        assert site.is_stage_end == is_end
        assert site.is_last == (is_end and site.stage == max(last))


@adaptable
def test_every_wrapped_site_moves_the_output(name: str) -> None:
    layers = tuple(dict.fromkeys(site.role for site in plain(name).sites()))
    backbone, x = adapted(name, layers=layers), image(1)
    before = maps(backbone, x, TASKS)
    branches = {path: p for path, p in backbone.named_parameters() if path.endswith(".B")}
    assert len(branches) >= len(list(plain(name).sites()))
    for path, branch in branches.items():
        kept = branch.detach().clone()
        shake(backbone, 0.5, lambda other, path=path: other == path)
        after = maps(backbone, x, TASKS)
        branch.data.copy_(kept)
        moved = {stream for stream in before if gap(before[stream], after[stream]) > 0}
        owner = path.split(".tasks.")[1].split(".")[0] if ".tasks." in path else None
        assert moved == {owner} if owner else "shared" in moved, path


@adaptable
def test_equal_streams_stay_equal(name: str) -> None:
    backbone, x = build(ADAPTABLE[name]), image()
    adapt(backbone, MTLoRA(rank=2, task_rank=2), TASKS)
    backbone.eval()
    levels = maps(backbone, x, TASKS)
    alone = maps(plain(name), x)["shared"]
    assert set(levels) == {"shared", *TASKS}
    for stream in levels.values():
        assert [level.shape for level in stream] == [level.shape for level in alone]
    # a stream of its own computes the very same numbers, but some kernels block a larger batch differently
    assert gap(levels["a"], levels["b"]) == 0.0
    assert gap(levels["shared"], alone) < 1e-5
    assert gap(levels["a"], alone) < 1e-5


@adaptable
def test_absent_tasks_change_nothing(name: str) -> None:
    backbone, x = adapted(name), image()
    both = maps(backbone, x, TASKS)
    for task in TASKS:
        one = maps(backbone, x, (task,))
        assert set(one) == {"shared", task}
        assert gap(one[task], both[task]) < 1e-4
    assert gap(maps(backbone, x)["shared"], both["shared"]) < 1e-4
    assert gap(both["a"], both["b"]) > 1e-3


def gradients_of(name: str, stages: tuple[int, ...], dropout: float) -> dict[str, Tensor]:
    torch.manual_seed(0)
    backbone = backbone_spec({**ADAPTABLE[name], "recompute": stages}).build(SIZE)
    adapt(backbone, MTLoRA(rank=2, task_rank=2, dropout=dropout), TASKS)
    shake(backbone, 0.1, lambda path: path.endswith(".B"))
    backbone.train()
    torch.manual_seed(1)
    pyramids = backbone(image(), TASKS)
    sum(materialize(level).square().mean() for task in TASKS for level in pyramids.of(task)).backward()
    found = {path: p.grad for path, p in backbone.named_parameters() if p.grad is not None}
    assert len(found) > 10
    return found


@pytest.mark.parametrize("name", ["swin", "swin_merged", "vit", "davit"])
def test_recompute_gives_the_same_gradients(name: str) -> None:
    assert gap(gradients_of(name, (), 0.0), gradients_of(name, (0, 3), 0.0)) < 1e-5


@pytest.mark.parametrize("name", ["swin", "vit"])
def test_recompute_drops_again_what_was_dropped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recomputed = gradients_of(name, (0, 3), 0.1)

    def keep(call: Callable[..., Tensor], *args: Any, use_reentrant: bool, **options: Any) -> Tensor:
        assert not use_reentrant
        return call(*args, **options)

    monkeypatch.setattr(streams, "checkpoint", keep)
    assert gap(recomputed, gradients_of(name, (0, 3), 0.1)) == 0.0


def test_after_merge_is_the_next_stage_merge_of_before_merge() -> None:
    before, after = adapted("swin"), adapted("swin_merged")
    after.load_state_dict(
        {k: v for k, v in zip(after.state_dict(), before.state_dict().values(), strict=True)}
    )
    x = image()
    fine, merged = maps(before, x, TASKS), maps(after, x, TASKS)
    assert after.channels == (*before.channels[1:], before.channels[-1])
    assert after.strides == (*before.strides[1:], before.strides[-1])
    for stream, levels in fine.items():
        for stage, level in enumerate(levels[:-1]):
            down = before.net.layers[stage + 1].downsample
            with torch.no_grad():
                by_hand = down(level.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            torch.testing.assert_close(merged[stream][stage], by_hand)
        torch.testing.assert_close(merged[stream][-1], levels[-1])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (
            "swinv2_tiny_window8_256",
            {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4},
        ),
        pytest.param("beit_base_patch16_224", SMALL),
        pytest.param("eva02_tiny_patch14_224", {**SMALL, "patch_size": 16}),
    ],
)
def test_networks_that_would_bypass_a_wrapper_say_so(name: str, options: dict[str, Any]) -> None:
    backbone = build({"name": name, "options": options})
    adapt(backbone, MTLoRA(rank=2, task_rank=2), TASKS)
    with pytest.raises(UnsupportedBackboneError, match="would bypass the adapter"):
        backbone(image(), TASKS)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("resnet10t", {}, "it has no such block"),
        ("convnext_atto", {}, r"stages\.0\.blocks\.0 \(ConvNeXtBlock\) has no layer attn\.qkv"),
        ("pvt_v2_b0", {}, r"\(Block\) has no layer attn\.qkv, expected attn\.qkv, attn\.proj"),
        ("test_coatnet", {}, r"has a Conv2d as attn\.qkv, not a linear layer"),
        (
            "xcit_nano_12_p16_224",
            {"depth": 4},
            r"local_mp\.bn: .*batch statistics would mix tasks, got 'BatchNorm2d'",
        ),
        ("mobilevit_xxs", {}, "need a transformer block in every feature level; there is none in"),
        (
            "hrnet_w18_small",
            {},
            r"HighResolutionNet: its feature levels are not modules of the network \(stage1\)",
        ),
        ("twins_svt_small", {}, "Twins: its feature levels are not modules"),
    ],
)
def test_networks_that_cannot_be_adapted_say_why(name: str, options: dict[str, Any], reason: str) -> None:
    backbone = build({"name": name, "options": options})
    with pytest.raises(UnsupportedBackboneError, match=reason):
        adapt(backbone, MTLoRA(rank=2, task_rank=2), TASKS)


def test_maps_that_are_not_what_the_block_left_are_refused() -> None:
    nest = build({"name": "nest_tiny"}, (224, 224))
    adapt(nest, MTLoRA(rank=2, task_rank=2), TASKS)
    with pytest.raises(UnsupportedBackboneError, match=r"Nest, levels\.0: the feature map of a stage is not"):
        nest(image(1, (224, 224)), TASKS)


def test_batch_norm_in_a_forked_block_is_found_before_anything_changes() -> None:
    backbone = build({"name": "xcit_nano_12_p16_224", "options": {"depth": 4}})
    names = [name for name, _ in backbone.named_modules()]
    with pytest.raises(UnsupportedBackboneError, match="batch statistics"):
        backbone.check_fork(StreamPlan("stage_end", TASKS))
    backbone.check_fork(StreamPlan())
    assert [name for name, _ in backbone.named_modules()] == names


def test_blocks_with_extra_arguments() -> None:
    backbone = build({"name": "test_vit_relpos"})
    adapt(backbone, MTLoRA(rank=2, task_rank=2), TASKS)
    assert set(maps(backbone, image(), TASKS)) == {"shared", *TASKS}
