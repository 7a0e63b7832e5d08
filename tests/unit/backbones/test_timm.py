"""timm networks as backbones: specs, feature levels, weight files."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from polytask.backbones.networks import digest, load_weights
from polytask.backbones.timm import Backbone, BackboneSpec
from polytask.errors import CheckpointError, ConfigError
from tests.helpers import MERGED_SWIN, SIZE, SWIN, VIT, backbone_spec, gap, image


def swin(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(SWIN["name"], img_size=SIZE, num_classes=7, **SWIN["options"])


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Swin state dict as the original repository writes it."""
    renamed = {}
    for key, value in state.items():
        name = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
        renamed[name.replace("head.fc.", "head.")] = value
    renamed["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    renamed["layers.1.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    return renamed


def write(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"model": state}, path)
    return path


# --- building --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "resnet18x"},
            r"model\.backbone\.name resnet18x: no such timm model; did you mean 'resnet18'",
        ),
        (
            {"name": "resnet10t", "options": {"depths": 3}},
            r"model\.backbone\.options: timm refuses an option",
        ),
        ({**VIT, "options": {"dpeth": 3}}, r"model\.backbone\.options: timm refuses an option .*dpeth"),
        ({**VIT, "out_indices": [0, 12]}, r"out_indices: .*expected indices from 0 to 11"),
        ({**VIT, "options": {}, "out_indices": [3, 1]}, r"out_indices: levels must be ascending"),
        ({**VIT, "feature_point": "after_merge"}, "after_merge` needs stages that begin with downsample"),
        (
            {**MERGED_SWIN, "out_indices": [0, 2]},
            r"out_indices: `feature_point: after_merge` needs levels without a gap",
        ),
        ({**SWIN, "weights": "x", "pretrained": True}, "`pretrained` and `weights` exclude each other"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    options = {**settings.get("options", {})}
    if settings["name"] == VIT["name"] and "dpeth" not in options:
        options = {"embed_dim": 16, "num_heads": 2}
    with pytest.raises(ConfigError, match=message):
        backbone_spec(settings, options=options).build(SIZE)


@pytest.mark.parametrize(("settings", "size"), [(VIT, (60, 64)), (SWIN, (66, 64))])
def test_image_sizes_a_network_cannot_take(settings: dict[str, Any], size: tuple[int, int]) -> None:
    with pytest.raises(
        ConfigError,
        match=r"data\.image_size: .*do not cover the image.*use a multiple of the backbone's patch",
    ):
        backbone_spec(settings).build(size)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"num_heads": 5}, "divisible by num_heads"), ({"mlp_ratio": -1}, "negative dim")],
)
def test_options_a_network_cannot_be_built_with(options: dict[str, Any], reason: str) -> None:
    spec = backbone_spec(VIT, options={**VIT["options"], **options})
    with pytest.raises(ConfigError, match=f"model.backbone: .*{reason}.*check model.backbone.options"):
        spec.build(SIZE)


@pytest.mark.parametrize("settings", [SWIN, MERGED_SWIN, VIT])
def test_an_image_of_another_size_than_built_for(settings: dict[str, Any]) -> None:
    backbone = backbone_spec(settings).build(SIZE)
    with pytest.raises(
        ConfigError, match=r"image size: the backbone cannot take this image .*got \(1, 3, 72, 72\)"
    ):
        backbone(image(1, (72, 72)))


def test_default_levels() -> None:
    def levels(name: str, **options: Any) -> tuple[int, ...]:
        return BackboneSpec(name=name, options=options).build(SIZE).indices

    assert levels("vit_tiny_patch16_224", embed_dim=16, num_heads=2) == (2, 5, 8, 11)
    assert levels("resnet10t") == (1, 2, 3, 4)
    assert backbone_spec(SWIN).build(SIZE).indices == (0, 1, 2, 3)
    assert BackboneSpec(name="resnet10t", out_indices=(2, 4)).build(SIZE).strides == (8, 32)


def test_what_no_feature_needs_is_dropped() -> None:
    names = {name for name, _ in backbone_spec(VIT, out_indices=(0, 2)).build(SIZE).named_parameters()}
    assert not any(name.startswith(("net.blocks.3", "net.norm.", "net.head")) for name in names)
    assert any(name.startswith("net.blocks.2") for name in names)


def test_digest() -> None:
    first, again, other = swin(0), swin(0), swin(1)
    assert digest(first) == digest(again) != digest(other)
    with torch.no_grad():
        next(first.parameters()).view(-1)[0] += 1e-3
    assert digest(first) != digest(again)


# --- weights ---------------------------------------------------------------------------------------


def loaded(path: Path, settings: dict[str, Any] = SWIN) -> Backbone:
    return backbone_spec(settings, weights=str(path)).build(SIZE).eval()


@pytest.mark.parametrize("layout", ["official", "timm", "safetensors"])
def test_dense_swin_weights(layout: str, tmp_path: Path) -> None:
    state = swin().state_dict()
    if layout == "safetensors":
        path = tmp_path / "swin.safetensors"
        save_file(state, path)
    else:
        path = write(tmp_path / "swin.pth", official(state) if layout == "official" else state)
    torch.manual_seed(5)
    backbone = loaded(path)
    reference = swin().eval()
    with torch.no_grad():
        wanted = reference.forward_intermediates(image(), intermediates_only=True)
        assert gap(backbone(image()).shared, wanted) == 0.0
    assert backbone.base_digest is not None


def test_the_digest_is_that_of_the_weights(tmp_path: Path) -> None:
    path = write(tmp_path / "swin.pth", swin().state_dict())
    other = write(tmp_path / "other.pth", swin(1).state_dict())
    torch.manual_seed(1)
    first = loaded(path).base_digest
    torch.manual_seed(2)
    assert loaded(path).base_digest == first != loaded(other).base_digest


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"model\.backbone\.weights .*nothing\.pth: no such weight file"
    ):
        loaded(tmp_path / "nothing.pth")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_truncated_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"cut.{suffix}"
    if suffix == "pth":
        write(path, swin().state_dict())
    else:
        save_file(swin().state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=rf"cut\.{suffix}: weight file cannot be read") as caught:
        loaded(path)
    assert len(str(caught.value).splitlines()) == 1


class Trap:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('a weight file ran code')",)


@pytest.mark.parametrize("content", [{"model": Trap()}, [1, 2], {"model": {"a": "text"}}, {}])
def test_files_that_hold_something_else(content: object, tmp_path: Path) -> None:
    path = tmp_path / "odd.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"odd\.pth: weight"):
        loaded(path)


def test_weights_of_another_network(tmp_path: Path) -> None:
    state = swin().state_dict()
    fewer = {key: value for key, value in state.items() if "layers.3.blocks.0.mlp.fc1" not in key}
    with pytest.raises(
        CheckpointError, match=r"2 keys missing \(first \['layers\.3\.blocks\.0\.mlp\.fc1\.weight'"
    ):
        load_weights(swin(), write(tmp_path / "fewer.pth", fewer))
    with pytest.raises(CheckpointError, match=r"1 unexpected \(first \['extra\.weight'\]\)"):
        load_weights(swin(), write(tmp_path / "more.pth", {**state, "extra.weight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="of another network"):
        loaded(write(tmp_path / "fewer.pth", state), {"name": "resnet10t"})


def test_weights_of_other_shapes(tmp_path: Path) -> None:
    state = swin().state_dict()
    state["layers.0.blocks.0.mlp.fc1.weight"] = torch.zeros(5, 8)
    with pytest.raises(CheckpointError, match=r"other shapes .*fc1\.weight") as caught:
        load_weights(swin(), write(tmp_path / "wide.pth", state))
    assert len(str(caught.value).splitlines()) == 1


def test_the_classifier_of_the_file_is_ignored(tmp_path: Path) -> None:
    net = swin()
    before = net.head.fc.weight.detach().clone()
    load_weights(
        net, write(tmp_path / "swin.pth", {**swin(1).state_dict(), "head.fc.weight": torch.zeros(21, 64)})
    )
    assert torch.equal(net.head.fc.weight, before)


def test_pretrained_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("resnet10t", "vit_tiny_patch16_224"):
        with pytest.raises(
            CheckpointError, match=rf"pretrained weights of {name} cannot be .*go online once, or name"
        ) as e:
            BackboneSpec(name=name, pretrained=True).build((224, 224))
        assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize("way", ["weights", "pretrained"])
def test_weights_with_a_class_token_for_a_network_without(way: str, tmp_path: Path) -> None:
    whole = timm.create_model(VIT["name"], img_size=(48, 64), num_classes=0, **VIT["options"])
    path, options = tmp_path / "vit.pth", {**VIT["options"], "class_token": False, "global_pool": ""}
    torch.save(whole.state_dict(), path)
    if way == "pretrained":  # where timm would download from
        told: dict[str, Any] = {"pretrained": True}
        options["pretrained_cfg_overlay"] = {"file": str(path), "hf_hub_id": None, "num_classes": 0}
    else:
        told = {"weights": str(path)}
    spec = BackboneSpec(name=VIT["name"], options=options, final_norm=True, **told)
    net = spec.build((48, 64)).net
    state = whole.state_dict()
    assert "cls_token" not in net.state_dict()
    assert torch.equal(net.pos_embed, state["pos_embed"][:, 1:])  # type: ignore[arg-type]
    name = "patch_embed.proj.weight"
    assert torch.equal(net.get_parameter(name), state[name])


@pytest.mark.parametrize("layout", ["official", "timm"])
def test_tables_of_another_window_are_resized_bicubically(layout: str, tmp_path: Path) -> None:
    state = swin().state_dict()
    path = write(tmp_path / "swin.pth", official(state) if layout == "official" else state)
    wide = {**SWIN, "options": {**SWIN["options"], "window_size": 8}}
    net = backbone_spec(wide, weights=str(path)).build((128, 128)).net
    name = "layers.1.blocks.1.attn.relative_position_bias_table"
    table = state[name].T.reshape(1, 2, 7, 7)
    wanted = torch.nn.functional.interpolate(table, (15, 15), mode="bicubic", align_corners=False)
    assert torch.equal(net.state_dict()[name], wanted.reshape(2, -1).T)


def test_a_training_checkpoint_with_settings(tmp_path: Path) -> None:
    """What Microsoft's repository saves while it trains: settings of yacs beside the weights."""
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    modules = {name: types.ModuleType(name) for name in ("yacs", "yacs.config")}
    modules["yacs.config"].CfgNode = node  # type: ignore[attr-defined]
    path = tmp_path / "ckpt_epoch_299.pth"
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        torch.save({"model": official(swin().state_dict()), "epoch": 299, "config": node(A=node(B=1))}, path)
    assert loaded(path).base_digest == loaded(write(tmp_path / "bare.pth", swin().state_dict())).base_digest
