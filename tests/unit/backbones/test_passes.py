"""One pass per task through networks in which tasks own layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polytask.adapters.base import adapt
from polytask.adapters.recon import Recon
from polytask.backbones.streams import Once, Private, Streams
from polytask.backbones.timm import Backbone
from polytask.cost import count_macs
from polytask.errors import ConfigError
from polytask.types import PerTask, materialize, partition
from tests.helpers import MERGED_SWIN, SIZE, SWIN, VIT, backbone_spec, gap, image, shake

TASKS = ("a", "b")
NETS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "resnet": ({"name": "resnet10t"}, ("layer3.0.downsample.2", "layer4.0.conv2")),
    "efficientnet": ({"name": "tf_efficientnet_lite0"}, ("blocks.4.1.bn2",)),
    "densenet": (
        {"name": "densenet121", "options": {"growth_rate": 8, "block_config": [2, 2, 3, 2]}},
        ("features.denseblock3.denselayer3.conv1",),
    ),
    "hrnet": ({"name": "hrnet_w18_small"}, ("stage3.0.branches.1.1.conv1",)),
    "vit": (VIT, ("blocks.1.attn.qkv", "blocks.3.norm2")),
    "swin": (SWIN, ("layers.1.blocks.1.mlp.fc1", "layers.2.downsample.reduction")),
    "swin_merged": (MERGED_SWIN, ("layers.2.blocks.0.attn.proj",)),
    "swin_v2": (  # reads `.weight` of its layers
        {
            "name": "swinv2_tiny_window8_256",
            "options": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4},
        },
        ("layers.1.blocks.0.attn.qkv",),
    ),
    "unet": ({"name": "unet", "options": {"width": 4}}, ("encoder.4.*", "decoder.1.up")),
    "segnet": ({"name": "segnet", "options": {"width": 4}}, ("encoder.3.0", "decoder.2.*")),
}
some = pytest.mark.parametrize("name", ["resnet", "vit", "swin_merged", "swin_v2", "unet", "segnet"])


def plain(name: str) -> Backbone:
    torch.manual_seed(0)
    backbone = backbone_spec(NETS[name][0]).build(SIZE)
    shake(backbone, 0.02)  # some blocks begin as the identity
    return backbone


def split(name: str, noise: float = 0.1) -> Backbone:
    backbone = plain(name)
    adapt(backbone, Recon(layers=NETS[name][1]), TASKS)
    if noise:
        shake(backbone, noise, lambda path: ".tasks.b." in path)
    return backbone


def own_network(backbone: Backbone, name: str, task: str) -> Backbone:
    """An unsplit network with the shared layers and the copies of one task."""
    alone = plain(name)
    state = {path.replace(f".tasks.{task}.", "."): value for path, value in backbone.state_dict().items()}
    alone.load_state_dict({path: value for path, value in state.items() if ".tasks." not in path})
    return alone


def levels(backbone: Backbone, task: str = "", tasks: tuple[str, ...] = TASKS) -> list[Tensor]:
    torch.manual_seed(3)
    return [materialize(x) for x in backbone(image(), tasks if task else ()).of(task)]


@pytest.mark.parametrize(
    ("name", "training"),
    [
        pytest.param(name, mode, marks=[pytest.mark.slow] if name in ("hrnet", "efficientnet") else [])
        for name in NETS
        for mode in (False, True)
    ],
)
def test_every_task_has_the_network_with_its_own_layers(name: str, training: bool) -> None:
    backbone = split(name).train(training)
    for task in TASKS:
        alone = own_network(backbone, name, task).train(training)
        found = levels(copy.deepcopy(backbone), task, (task,))
        assert gap(found, levels(alone)) < 1e-6
        if not training:  # in training, drop path draws for one task after the other
            assert gap(levels(backbone, task), found) < 1e-6
    assert gap(levels(backbone, "a"), levels(backbone, "b")) > 1e-4


@some
def test_equal_copies_change_nothing(name: str) -> None:
    backbone, alone = split(name, noise=0.0).eval(), plain(name).eval()
    assert all(gap(levels(backbone, task), levels(alone)) == 0.0 for task in TASKS)


@some
def test_copies_get_the_gradient_of_their_task_and_the_rest_that_of_all(name: str) -> None:
    backbone, wanted = split(name).eval(), {}
    pyramids = backbone(image(), TASKS)
    for task in TASKS:
        alone = own_network(backbone, name, task).eval()
        sum(materialize(x).square().mean() for x in alone(image()).shared).backward()
        for path, p in alone.named_parameters():
            owned = path.replace(path.rpartition(".")[0], f"{path.rpartition('.')[0]}.tasks.{task}")
            key = owned if owned in dict(backbone.named_parameters()) else path
            wanted[key] = wanted.get(key, 0) + p.grad
    sum(materialize(x).square().mean() for task in TASKS for x in pyramids.of(task)).backward()
    found = {path: p.grad for path, p in backbone.named_parameters()}
    assert found.keys() == wanted.keys() and any(".tasks.a." in path for path in found)
    for path, gradient in wanted.items():
        torch.testing.assert_close(found[path], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


@some
def test_what_comes_before_the_first_private_layer_runs_once(name: str) -> None:
    backbone, alone = split(name).eval(), plain(name)
    one, both, whole = (
        count_macs(backbone, image(1), ("a",)),
        count_macs(backbone, image(1), TASKS),
        count_macs(alone, image(1), ()),
    )
    assert one == whole
    assert whole < both < 1.9 * whole


def test_batch_norms_see_one_task_at_a_time() -> None:
    backbone = split("resnet").train()
    levels(backbone, "a")
    counts = {path: int(x) for path, x in backbone.net.named_buffers() if path.endswith("batches_tracked")}
    assert counts["bn1.num_batches_tracked"] == counts["layer2.0.bn1.num_batches_tracked"] == 1
    assert counts["layer3.0.downsample.2.tasks.b.num_batches_tracked"] == 1
    assert counts["layer4.0.bn1.num_batches_tracked"] == 2


def test_partition_names_and_recompute() -> None:
    backbone = split("resnet")
    part = partition(backbone, TASKS)
    assert set(part.per_task["b"]) == {
        "net.layer3.0.downsample.2.tasks.b.weight",
        "net.layer3.0.downsample.2.tasks.b.bias",
        "net.layer4.0.conv2.tasks.b.weight",
    }
    assert "net.layer4.0.conv1.weight" in part.shared and not part.frozen
    backbone.recompute = (0,)
    with pytest.raises(ConfigError, match="nothing to recompute"):
        backbone.check_recompute()


class Toy(nn.Module):
    """A shared layer whose output is changed in place after it was read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.unused = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return y.add_(self.two(y)).mul_(2)


def test_work_in_place_does_not_reach_the_next_pass() -> None:
    net, streams, x = Toy(), Streams(), torch.randn(2, 3)
    with torch.no_grad():
        y = net.one(x)
        wanted = 2 * (y + net.two(y))
    net.two = Private(net.two, streams, TASKS)  # type: ignore[assignment]
    streams.share(net, lambda: streams.passes(lambda: [net(x)], TASKS[:1]))
    assert isinstance(net.one.forward, Once) and not isinstance(net.two.forward, Once)
    with torch.no_grad():
        found = streams.passes(lambda: [net(x)], TASKS)
    assert torch.equal(found["a"][0], wanted) and torch.equal(found["b"][0], wanted)


def test_layer_that_takes_no_part() -> None:
    net, streams = Toy(), Streams()
    net.unused = Private(net.unused, streams, TASKS)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="'unused' takes no part in the features"):
        streams.share(net, lambda: streams.passes(lambda: [net(torch.ones(1, 3))], TASKS[:1]))


def test_a_pass_that_fails_leaves_nothing_behind() -> None:
    backbone = split("vit").eval()
    wanted = levels(backbone, "a")
    with pytest.raises(ConfigError, match="cannot take this image"):
        backbone(image(2, (32, 32)), TASKS)
    assert not backbone.streams.task and not backbone.streams.once
    assert gap(levels(backbone, "a"), wanted) == 0.0
    layer = next(m for m in backbone.modules() if isinstance(m, Private))
    assert isinstance(layer.tasks, PerTask)
    with pytest.raises(AttributeError, match="weight"):
        layer.weight  # noqa: B018
