"""Adapter folders written by PEFT, read here, and the reverse; those marked need PEFT itself."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from polytask.backbones.timm import Backbone
from polytask.convert.peft import export_peft, import_peft, peft_settings
from polytask.errors import CheckpointError, ConfigError
from polytask.model import MultiTaskModel
from polytask.types import materialize
from tests.helpers import SWIN, build, gap, model_spec, shake

GOLDEN = Path(__file__).parent / "golden" / "peft"
SIZE = (64, 96)
TRUNK: dict[str, Any] = {"name": "swin_rooms", "pretrained": True}
BY_STAGE = {"rank": [2, 2, 2, 3], "scale": [2.5, 2.5, 1.5, 1.0], "layers": ["qkv"]}
SHARED = {"type": "mtlora", "mode": "lora_only", "rank": [2, 3, 2, 2], "scale": 4.0, "dropout": 0.0}


def make(noise: int = 0, backbone: dict[str, Any] = TRUNK, **adapter: Any) -> MultiTaskModel:
    model = build(model_spec(backbone, adapter=adapter), size=SIZE)
    if noise:
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        shake(model, 0.1, lambda name: name in trained, seed=noise)
    return model.eval()


def image() -> Tensor:
    return torch.sin(0.37 * torch.arange(3.0 * 64 * 96)).reshape(1, 3, *SIZE)


@torch.no_grad()
def features(backbone: Backbone, task: str | None = None) -> list[Tensor]:
    pyramids = backbone(image(), () if task is None else (task,))
    return [materialize(level) for level in (pyramids.shared if task is None else pyramids.of(task))]


@torch.no_grad()
def bare_features(net: nn.Module) -> Sequence[Tensor]:
    return net.forward_intermediates(image(), indices=[0, 1, 2, 3], intermediates_only=True)


def rewritten(tmp_path: Path, name: str = "plain", **changes: Any) -> Path:
    """A copy of a folder with other entries in its configuration."""
    folder = shutil.copytree(GOLDEN / name, tmp_path / "copy")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


# --- from PEFT -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "rslora"])
def test_folders_of_peft_compute_what_they_did_there(name: str) -> None:
    model = make(**peft_settings(GOLDEN / name))
    assert import_peft(GOLDEN / name, model) == []
    wanted = load_file(GOLDEN / name / "features.safetensors")
    assert gap(features(model.backbone)[2:], [wanted["level2"], wanted["level3"]]) < 2e-5


def test_ranks_and_scales_by_layer() -> None:
    model = make(type="mtlora", mode="lora_only", **BY_STAGE)
    import_peft(GOLDEN / "patterns", model)
    wanted = load_file(GOLDEN / "patterns" / "features.safetensors")
    assert gap(features(model.backbone)[2:], [wanted["level2"], wanted["level3"]]) < 2e-5
    with pytest.raises(
        CheckpointError, match="the adapter `lora` has one rank and scale, got 'rank 2 scaled"
    ):
        peft_settings(GOLDEN / "patterns")


def test_settings_are_those_of_the_folder() -> None:
    wanted = {"type": "lora", "rank": 2, "alpha": 3.0, "dropout": 0.0, "layers": ["qkv", "fc1"]}
    assert peft_settings(GOLDEN / "plain") == wanted
    assert peft_settings(GOLDEN / "rslora")["alpha"] == pytest.approx(3 * 2**0.5)


def test_a_folder_serves_one_of_several_tasks() -> None:
    settings = peft_settings(GOLDEN / "rslora")
    model, shared = make(**settings, per_task=True), make(**settings)
    before = features(model.backbone, "depth")
    import_peft(GOLDEN / "rslora", model, task="normals")
    import_peft(GOLDEN / "rslora", shared)
    assert gap(features(model.backbone, "normals"), features(shared.backbone)) == 0.0
    assert gap(features(model.backbone, "depth"), before) == 0.0


def test_the_classifier_of_the_other_network_has_no_place(tmp_path: Path) -> None:
    folder = rewritten(tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    extra = {"base_model.model.head.fc.weight": torch.ones(2, 2)}
    save_file(tensors | extra, folder / "adapter_model.safetensors")
    assert import_peft(folder, make(**peft_settings(folder))) == ["head.fc.weight"]


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "only LoRA can be imported, expected peft_type LORA, got 'IA3'"),
    ({"use_dora": True}, "this is not plain LoRA on the original weights, got 'use_dora: True'"),
    ({"something_new": {"a": 1}}, 'this is not plain LoRA on the original weights, got "something_new'),
    ({"init_lora_weights": "pissa_niter_4"}, "got 'init_lora_weights: pissa_niter_4'"),
    ({"lora_alpha": None}, "adapter_config.json has no usable lora_alpha"),
    ({"alpha_pattern": {"(": 2}}, "adapter_config.json has no usable lora_alpha"),
    ({"alpha_pattern": [1]}, "adapter_config.json has no usable lora_alpha"),
]


@pytest.mark.parametrize(("changes", "words"), CONFIGS)
def test_other_techniques_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        peft_settings(rewritten(tmp_path, **changes))
    assert words in str(caught.value) and str(caught.value).count("\n") == 0


TENSORS: list[tuple[str, Tensor | None, str]] = [
    ("layers.0.blocks.0.attn.qkv.lora_A.weight", None, "every layer needs lora_A and lora_B"),
    (
        "layers.0.blocks.0.attn.qkv.lora_A.weight",
        torch.ones(3, 32),
        "layers.0.blocks.0.attn.qkv: no low-rank",
    ),
    (
        "layers.0.blocks.0.attn.qkv.lora_A.weight",
        torch.ones(2, 31),
        "branch of another shape, expected rank 2",
    ),
    ("layers.0.blocks.0.attn.qkv.lora_B.bias", torch.ones(3), "expected LoRA of linear layers"),
    (
        "layers.9.norm1.weight",
        torch.ones(3),
        "1 tensors do not fit the backbone, first layers.9.norm1.weight",
    ),
    ("layers.0.blocks.0.norm1.weight", torch.ones(3), "1 tensors do not fit the backbone, first layers.0"),
]


@pytest.mark.parametrize(("name", "value", "words"), TENSORS)
def test_other_tensors_are_refused(tmp_path: Path, name: str, value: Tensor | None, words: str) -> None:
    folder = rewritten(tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(f"base_model.model.{name}", None)
    if value is not None:
        tensors[f"base_model.model.{name}"] = value
    save_file(tensors, folder / "adapter_model.safetensors")
    model = make(**peft_settings(GOLDEN / "plain"))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        import_peft(folder, model)
    assert words in str(caught.value) and str(caught.value).count("\n") == 0
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 3}, "branch of another shape, expected rank 3, 32 to 96, got 'rank 2, 32 to 96"),
        ({"alpha": 2.0}, "layers.0.blocks.0.attn.qkv: other scale (alpha / r), expected 1, got '1.5'"),
        ({"layers": ["qkv"]}, "7 layers have a branch on one side only, first layers.0.blocks.0.mlp.fc1 of"),
        ({"layers": ["qkv", "fc1", "fc2"]}, "first layers.0.blocks.0.mlp.fc2 of the model"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        import_peft(GOLDEN / "plain", make(**{**peft_settings(GOLDEN / "plain"), **changes}))
    assert words in str(caught.value)


def test_incomplete_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a PEFT folder cannot be read"):
        peft_settings(tmp_path)
    folder = rewritten(tmp_path)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="a PEFT folder cannot be read"):
        peft_settings(folder)
    (folder / "adapter_config.json").write_text("[1]")
    file.write_bytes((GOLDEN / "plain" / "adapter_model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="expected peft_type LORA, got 'list'"):
        peft_settings(folder)


# --- to PEFT -------------------------------------------------------------------------------------------

EXPORTED: dict[str, tuple[dict[str, Any], str | None]] = {
    "lora": ({"type": "lora", "rank": 3, "alpha": 5.0}, None),
    "lora_and_norms": ({"type": "lora", "rank": 2, "train": ["norm", "patch_embed"]}, None),
    "one_task": ({"type": "lora", "rank": 2, "per_task": True}, "depth"),
    "shared": (SHARED, None),
}


@pytest.mark.parametrize("variant", EXPORTED)
def test_a_round_trip_changes_nothing(tmp_path: Path, variant: str) -> None:
    settings, task = EXPORTED[variant]
    model, other = make(1, **settings), make(**settings)
    left = export_peft(model, tmp_path / "peft", task=task)
    assert left and all(name.startswith(("neck.", "heads.")) for name in left)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["peft"]
    assert gap(features(model.backbone, task), features(other.backbone, task)) > 0.1
    import_peft(tmp_path / "peft", other, task=task)
    assert gap(features(model.backbone, task), features(other.backbone, task)) == 0.0


def test_patch_merging_under_a_merge_point(tmp_path: Path) -> None:
    settings = {
        "backbone": {**TRUNK, "feature_point": "after_merge"},
        "type": "lora",
        "layers": ["reduction"],
    }
    model, plain = make(1, **settings), make(type="lora", layers=["reduction"])
    export_peft(model, tmp_path / "peft")
    import_peft(tmp_path / "peft", plain)
    assert gap(features(model.backbone)[-1:], features(plain.backbone)[-1:]) == 0.0


@pytest.mark.parametrize("variant", EXPORTED)
def test_peft_computes_the_same(tmp_path: Path, variant: str) -> None:
    """Exactly the same for plain LoRA; a branch fused with its layer is added in another order."""
    peft = pytest.importorskip("peft")
    settings, task = EXPORTED[variant]
    model = make(1, **settings)
    export_peft(model, tmp_path / "peft", task=task)
    net = timm.create_model("swin_rooms", pretrained=True).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(net, str(tmp_path / "peft")).eval()
    difference = gap(features(model.backbone, task), bare_features(loaded.base_model.model))
    assert difference < 1e-5 if variant == "shared" else difference == 0.0


def test_folders_written_by_peft_now(tmp_path: Path) -> None:
    """As the stored ones, by the version that is installed."""
    peft = pytest.importorskip("peft")
    net = timm.create_model("swin_rooms", pretrained=True).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = peft.get_peft_model(
            net, peft.LoraConfig(r=2, target_modules=["qkv", "fc2"], bias="all")
        ).eval()
        trained = {name for name, p in given.named_parameters() if p.requires_grad}
        shake(given, 0.1, lambda name: name in trained)
        given.save_pretrained(tmp_path)
    model = make(**peft_settings(tmp_path))
    assert import_peft(tmp_path, model) == ["norm.bias"]
    assert gap(features(model.backbone), bare_features(net)) == 0.0


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    cases: list[tuple[MultiTaskModel, str]] = [
        (
            make(type="mtlora", rank=2, task_rank=2),
            "PEFT: layers.0.blocks.1.block.attn.proj is no plain low-rank",
        ),
        (make(type="lora", per_task=True), "branches must be the same for all tasks, or name the task"),
        (make(type="bitfit"), "the model has no low-rank branches"),
        (build(model_spec(SWIN, adapter={"type": "lora"})), "adapters need a trunk that can be loaded again"),
    ]
    for model, words in cases:
        with pytest.raises(ConfigError) as caught:
            export_peft(model, tmp_path / "peft")
        assert words in str(caught.value)
        assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"name the task whose own they are"):
        export_peft(make(type="lora", per_task=True), tmp_path / "peft", task="deepth")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        export_peft(make(type="lora"), tmp_path)


def test_another_trunk_is_refused(tmp_path: Path) -> None:
    export_peft(make(type="lora"), tmp_path / "peft")
    net = timm.create_model("swin_rooms", pretrained=True)
    shake(net)
    save_file(net.state_dict(), tmp_path / "other.safetensors")
    other = make(backbone={"name": "swin_rooms", "weights": str(tmp_path / "other.safetensors")}, type="lora")
    with pytest.raises(CheckpointError, match="the adapter was trained on other pretrained weights"):
        import_peft(tmp_path / "peft", other)
