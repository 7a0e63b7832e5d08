"""UNet and SegNet: sizes and figures of the literature."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from polytask.backbones.timm import Backbone, BackboneSpec
from polytask.tasks import Depth, Normals, Segmentation, TaskSet
from polytask.types import Partition, count, materialize
from tests.helpers import build, image, model_spec


def backbone(name: str, size: tuple[int, int] = (64, 64), **settings: object) -> Backbone:
    torch.manual_seed(0)
    settings = {"options": {"width": 4}} | settings
    return BackboneSpec(name=name, **settings).build(size)  # type: ignore[arg-type]


def of_convolutions(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.ndim == 4)


def test_unet_has_31_million_weights() -> None:
    net = backbone("unet", options={}).net
    assert of_convolutions(net.encoder) == 18_839_232  # type: ignore[arg-type]
    assert of_convolutions(net) == 31_024_832


def segnet_of_mtan() -> Partition:
    tasks = TaskSet(
        {"semseg": Segmentation(classes=tuple("abcdefghijklm")), "depth": Depth(), "normals": Normals()}
    )
    spec = model_spec({"name": "segnet"}, neck={"type": "level"}, head={"type": "conv"})
    return build(spec, tasks).partition()


def test_segnet_has_the_parameters_of_mtan() -> None:
    part = segnet_of_mtan()
    assert count(part.shared) == 24_943_296
    assert count(dict(part.trainable())) == 25_055_185


@pytest.mark.parametrize("size", [(64, 96), (70, 50)])
@pytest.mark.parametrize(("name", "stride"), [("unet", 16), ("segnet", 32)])
def test_any_size_comes_back_to_full_resolution(name: str, stride: int, size: tuple[int, int]) -> None:
    net = backbone(name, size)
    fine, coarse = [materialize(x) for x in net(image(2, size)).shared]
    assert fine.shape == (2, 4, *size) and net.strides == (1, stride)
    assert coarse.shape[2:] == tuple(x // stride for x in size)
    assert (fine.shape[1], coarse.shape[1]) == net.channels


@pytest.mark.parametrize("name", ["unet", "segnet"])
def test_bottleneck_alone_needs_no_decoder(name: str) -> None:
    whole, encoder = backbone(name).eval(), backbone(name, out_indices=(1,)).eval()
    assert len(encoder.net.decoder) == 0 and encoder.channels == whole.channels[1:]  # type: ignore[arg-type]
    encoder.load_state_dict({k: v for k, v in whole.state_dict().items() if "decoder" not in k})
    assert torch.equal(encoder(image()).shared[0], whole(image()).shared[1])


def test_unet_joins_the_encoder_before_the_decoder() -> None:
    up = backbone("unet").net.decoder[0].eval()  # type: ignore[index,union-attr]
    x, skip = torch.randn(1, 64, 2, 2), torch.randn(1, 32, 4, 4)
    assert torch.equal(up(x, skip), up.convolutions(torch.cat([skip, up.up(x)], 1)))


def test_segnet_puts_values_back_where_they_were() -> None:
    net = backbone("segnet").net.eval()
    net.encoder = nn.ModuleList([nn.Identity()] * 2)
    net.decoder = nn.ModuleList([nn.Identity()] * 2)
    x = torch.rand(1, 3, 8, 8) + 1
    fine, coarse = net(x)
    assert torch.equal(coarse, F.max_pool2d(x, 4))
    assert torch.equal(fine, torch.where(x == F.interpolate(coarse, scale_factor=4), x, 0))


def test_segnet_begins_with_xavier_weights() -> None:
    layer = backbone("segnet", options={"width": 16}).net.encoder[2][3]  # type: ignore[index,union-attr]
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.05)
    assert not layer.bias.any()
