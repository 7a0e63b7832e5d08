"""Official MTLoRA files in, ours out, and back: checkpoints, settings, bad input."""

from __future__ import annotations

import copy
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from polytask.adapters.mtlora import MTLoRA
from polytask.cli import main
from polytask.convert import load_official
from polytask.convert.mtlora import export_state
from polytask.convert.official import convert_checkpoint, convert_settings, export_run, read_settings
from polytask.errors import CheckpointError, ConfigError, PolytaskWarning, TaskMismatchError
from polytask.model import ModelSpec, MultiTaskModel
from polytask.pickles import read_checkpoint
from polytask.recipe import Recipe, load_recipe
from polytask.runs import Run, empty_model
from tests.helpers import shake
from tests.parity.test_mtlora import GOLDEN, META, MODELS, TOLERANCE, ours, vectors

pytestmark = pytest.mark.filterwarnings("ignore::polytask.errors.PolytaskWarning")
each = pytest.mark.parametrize("name", MODELS)


def official_state(name: str) -> dict[str, Tensor]:
    """As the official code holds it: float32 and int64 (see ``meta.json``)."""
    state = load_file(GOLDEN / f"{META['models'][name]['state']}_state.safetensors")
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def settings_of(name: str) -> dict[str, Any]:
    """The official settings of a golden model, in lists of one where the official code allows it."""
    meta = META["models"][name]
    swin = {key.upper(): value for key, value in meta["options"].items() if key != "drop_path_rate"}
    ranks = {**meta["task_rank"], "shared": meta["rank"], "edge": [7], "depth": 9}
    lora = {
        "ENABLED": True, "R": [4, 4, 4, 4], "R_PER_TASK": ranks, "SHARED_SCALE": meta["scale"],
        "SHARED_MODE": meta["mode"], "DOWNSAMPLER_ENABLED": meta["plus"], "DROPOUT": [0.05] * 4,
    }  # fmt: skip
    return {
        "BASE": [""], "AMP": True, "DATA": {"IMG_SIZE": meta["image_size"]},
        "MODEL": {
            "TYPE": "swin", "DROP_PATH_RATE": 0.2, "SWIN": swin, "MTLORA": lora,
            "DECODER_CHANNELS": meta["channels"], "DECODER_HEAD": dict.fromkeys(meta["outputs"], "hrnet"),
        },
        "TRAIN": {"BASE_LR": 3.125e-5, "EPOCHS": 7},
    }  # fmt: skip


def node(value: Any, cls: type) -> Any:
    return cls({k: node(v, cls) for k, v in value.items()}) if isinstance(value, dict) else value


def write_official(path: Path, state: dict[str, Tensor], settings: dict[str, Any] | None) -> Path:
    """A checkpoint as the official loop saves it, settings as live nodes of yacs."""
    cls = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    modules = {name: types.ModuleType(name) for name in ("yacs", "yacs.config")}
    modules["yacs.config"].CfgNode = cls  # type: ignore[attr-defined]
    content: dict[str, Any] = {"model": state, "optimizer": {"state": {}}, "epoch": 3, "max_accuracy": 0.0}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        torch.save(content | ({"config": node(settings, cls)} if settings else {}), path)
    return path


@pytest.fixture
def official(tmp_path: Path) -> Any:
    def write(name: str, *, with_settings: bool = True, **changes: Any) -> Path:
        state = {**official_state(name), **changes}
        settings = settings_of(name) if with_settings else None
        return write_official(tmp_path / f"{name}.pth", state, settings)

    return write


def same_outputs(model: MultiTaskModel, name: str) -> None:
    assert not model.training
    with torch.no_grad():
        logits = model(vectors(name)["input"]).logits
    for task in META["models"][name]["outputs"]:
        pixels = logits[ours(task)][..., ::4, ::4]
        torch.testing.assert_close(pixels, vectors(name)[f"output.{task}"], **TOLERANCE)


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype, key
        assert torch.equal(value, other[key]), key


# --- checkpoints in --------------------------------------------------------------------------------


@each
def test_a_checkpoint_becomes_a_run(name: str, official: Any, tmp_path: Path) -> None:
    convert_checkpoint("mtlora", official(name), tmp_path / "run")
    run = Run(tmp_path / "run")
    assert run.recipe == load_recipe(tmp_path / "run")
    assert list(run.tasks) == ["semseg", "normals", "saliency", "human_parts"]
    assert run.recipe.optim.lr == 5e-4  # those in a checkpoint are multiplied by the batch already
    assert run.recipe.phases[0].epochs == 7
    same_outputs(run.model(), name)
    same_outputs(run.model().merged(), name)


@pytest.mark.parametrize("name", ["a", "addition", "plus"])
def test_without_settings_shapes_tell(name: str, official: Any, tmp_path: Path) -> None:
    """Masks tell the image size where there are any, as in `plus`; the others take what is said."""
    file = official(name, with_settings=False)
    size = META["models"][name]["image_size"]
    changes = [] if name == "plus" else [f"data.image_size={size}"]
    draft = convert_checkpoint("mtlora", file, tmp_path / "run", changes=changes)
    recipe = Run(tmp_path / "run").recipe
    assert recipe.data.image_size == (size, size)
    with_settings = convert_checkpoint("mtlora", official(name), tmp_path / "told").recipe
    assert Run(tmp_path / "run").recipe.model.adapter == Run(tmp_path / "told").recipe.model.adapter
    assert draft.recipe["model"] == with_settings["model"]
    assert any("read off the tensors: embedding" in note for note in draft.notes)
    assert any("assumed" in note and "scale 4" in note for note in draft.notes)
    same_outputs(Run(tmp_path / "run").model(), name)


def test_bare_state_dicts(tmp_path: Path) -> None:
    torch.save(official_state("plus"), tmp_path / "bare.pth")
    save_file(official_state("plus"), tmp_path / "bare.safetensors")
    for suffix in ("pth", "safetensors"):
        convert_checkpoint("mtlora", tmp_path / f"bare.{suffix}", tmp_path / suffix)
        same_outputs(Run(tmp_path / suffix).model(), "plus")


def test_settings_from_a_file_win(official: Any, tmp_path: Path) -> None:
    settings = settings_of("matrixv2")
    (tmp_path / "v2.yaml").write_text(yaml.safe_dump(settings))
    convert_checkpoint("mtlora", official("matrix"), tmp_path / "run", settings=tmp_path / "v2.yaml")
    assert Run(tmp_path / "run").recipe.optim.lr == 3.125e-5
    same_outputs(Run(tmp_path / "run").model(), "matrixv2")


def test_load_official(official: Any, tmp_path: Path) -> None:
    file = official("plus")
    convert_checkpoint("mtlora", file, tmp_path / "run")
    for recipe in (tmp_path / "run", str(tmp_path / "run" / "recipe.yaml"), Run(tmp_path / "run").recipe):
        same_outputs(load_official("mtlora", file, recipe), "plus")
    with pytest.raises(ConfigError, match="no such system, got 'mtlor'; did you mean 'mtlora'"):
        load_official("mtlor", file, tmp_path / "run")


def test_training_goes_on_from_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`train RUN --resume` starts at the first step, with the converted weights."""
    rooms = {"type": "rooms", "preset": "nano", "batch_size": 2, "eval_batch_size": 2, "image_size": [64, 64]}
    changes = [
        f"data={json.dumps(rooms)}", "tasks.semseg={}", "tasks.human_parts={}", "phases=[{steps: 1}]",
        "run={max_eval_batches: 1}",
    ]  # fmt: skip
    state = dict(official_state("plus"))
    classes = {task: channels_of_rooms()[task] for task in ("semseg", "human_parts")}
    for task, count in classes.items():
        for part in ("weight", "bias"):
            key = f"decoders.decoders.{task}.last_layer.3.{part}"
            state[key] = state[key].new_zeros(count, *state[key].shape[1:])
    file = write_official(tmp_path / "x.pth", state, settings_of("plus"))
    convert_checkpoint("mtlora", file, tmp_path / "run", changes=changes)
    before = Run(tmp_path / "run").model().state_dict()
    assert main(["train", str(tmp_path / "run"), "--resume"]) == 0
    assert "random weights" not in capsys.readouterr().err
    after = Run(tmp_path / "run").model().state_dict()
    frozen = [name for name in before if name.endswith(".base.weight")]
    assert frozen
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert Run(tmp_path / "run").scores["step"] == 1


def channels_of_rooms() -> dict[str, int]:
    from polytask.data.rooms import Rooms

    return {name: task.channels for name, task in Rooms(preset="nano").labels().items()}


# --- old files -------------------------------------------------------------------------------------


def old_state(name: str, *, wrapped: bool) -> dict[str, Tensor]:
    """A file from before June 2024: no shared branches but in the last block of each stage."""
    state = dict(official_state(name))
    for key in list(state):
        if ".blocks.0." not in key or key.endswith(("_mask", "_index")):
            continue
        if ".lora_" in key:
            del state[key]
        elif ".linear." in key and not wrapped:
            state[key.replace(".linear.", ".")] = state.pop(key)
    return state


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("with_settings", [True, False])
def test_old_checkpoints_have_rank_0_there(wrapped: bool, with_settings: bool, tmp_path: Path) -> None:
    settings = settings_of("matrix") if with_settings else None
    file = write_official(tmp_path / "old.pth", old_state("matrix", wrapped=wrapped), settings)
    changes = ["data.image_size=64"]
    with pytest.warns(PolytaskWarning, match=r"before June 2024: .*rank 0 .*blocks: last"):
        convert_checkpoint("mtlora", file, tmp_path / "run", changes=changes)
    adapter = Run(tmp_path / "run").recipe.model.adapter
    assert isinstance(adapter, MTLoRA)
    assert adapter.blocks == "last"
    # a model of today whose early branches are zero computes the same
    zero = {
        k: torch.zeros_like(v) if ".blocks.0." in k and k.endswith("lora_shared_B") else v
        for k, v in official_state("matrix").items()
    }
    new = write_official(tmp_path / "new.pth", zero, settings_of("matrix"))
    convert_checkpoint("mtlora", new, tmp_path / "today")
    image = vectors("matrix")["input"]
    with torch.no_grad():
        old, today = (Run(tmp_path / run).model()(image).logits for run in ("run", "today"))
    for task in old:
        torch.testing.assert_close(old[task], today[task], **TOLERANCE)
    with pytest.warns(PolytaskWarning, match="before June 2024"):
        model = load_official("mtlora", file, tmp_path / "today")
    with torch.no_grad():
        assert all(torch.equal(old[task], y) for task, y in model(image).logits.items())
    export_run("mtlora", tmp_path / "run", tmp_path / "out.pth")
    exported = read_checkpoint(tmp_path / "out.pth")["model"]
    kept = {key for key in exported if not key.endswith(("_mask", "_index"))}
    assert kept == {k for k in old_state("matrix", wrapped=True) if not k.endswith(("_mask", "_index"))}


def test_branches_that_nothing_reads_are_left_out(tmp_path: Path) -> None:
    state = dict(official_state("matrix"))
    for task in ("semseg", "normals", "sal", "human_parts"):
        for factor in "AB":
            key = f"backbone.layers.0.blocks.1.mlp.fc1.lora_tasks_{factor}.{task}"
            state[key.replace("blocks.1", "blocks.0")] = torch.ones_like(state[key])
    settings = settings_of("matrix")
    settings["MODEL"]["MTLORA"]["INTERMEDIATE_SPECIALIZATION"] = True
    file = write_official(tmp_path / "all.pth", state, settings)
    with pytest.warns(PolytaskWarning, match="8 tensors that no output"):
        convert_checkpoint("mtlora", file, tmp_path / "run")
    same_outputs(Run(tmp_path / "run").model(), "matrix")


# --- and back --------------------------------------------------------------------------------------


@each
def test_round_trip_is_bit_identical(name: str, official: Any, tmp_path: Path) -> None:
    convert_checkpoint("mtlora", official(name), tmp_path / "run")
    export_run("mtlora", tmp_path / "run", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    derived = ("attn_mask", "relative_position_index")
    assert any(key.endswith("attn_mask") for key in official_state("plus"))
    if name != "plus":  # their vectors were saved without what is derived
        back = {key: value for key, value in back.items() if not key.endswith(derived)}
    same_state(official_state(name), back)
    convert_checkpoint("mtlora", tmp_path / "back.pth", tmp_path / "again", settings=None, changes=[])
    same_state(Run(tmp_path / "run").model().state_dict(), Run(tmp_path / "again").model().state_dict())


@pytest.mark.parametrize("head", ["aspp", "segformer", "updecoder"])
def test_other_heads_and_trained_scales(head: str, tmp_path: Path) -> None:
    """There are no vectors of these: what is written as official reads as the same model, told or not."""
    settings = settings_of("plus")
    settings["MODEL"] |= {"DECODER_HEAD": {"sal": head, "normals": head}, "SEGFORMER_CHANNELS": 16}
    settings["MODEL"]["MTLORA"] |= {"TRAINABLE_SCALE_SHARED": True, "TRAINABLE_SCALE_PER_TASK": True}
    (tmp_path / "official.yaml").write_text(yaml.safe_dump(settings))
    convert_settings("mtlora", tmp_path / "official.yaml", tmp_path / "ours.yaml")
    recipe = load_recipe(tmp_path / "ours.yaml")
    model = empty_model(recipe).eval()
    shake(model)
    state = {**export_state(recipe, model), "decoders.decoders.sal.last_layer.conv_seg.weight": torch.ones(1)}
    assert any(key.endswith(".lora_task_scale.sal") for key in state)
    for name, given in (("told", settings), ("inferred", None)):
        convert_checkpoint("mtlora", write_official(tmp_path / f"{name}.pth", state, given), tmp_path / name)
        assert Run(tmp_path / name).recipe.model == recipe.model
        same_state(model.state_dict(), Run(tmp_path / name).model().state_dict())


def test_what_the_official_code_does_not_have(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tasks: the official code has no such model, expected a Swin"):
        export_run("mtlora", trained, tmp_path / "x.pth")
    assert not any(tmp_path.iterdir())


# --- settings alone --------------------------------------------------------------------------------

SHIPPED = {
    "DATA": {"IMG_SIZE": 448},
    "MODEL": {
        "TYPE": "swin", "NAME": "mtlora_tiny_448_r64_scale4", "DROP_PATH_RATE": 0.2,
        "SWIN": {
            "EMBED_DIM": 96, "DEPTHS": [2, 2, 6, 2], "NUM_HEADS": [3, 6, 12, 24], "WINDOW_SIZE": 7,
        },
        "MTLORA": {
            "ENABLED": True, "R": [64, 64, 64, 64], "SHARED_SCALE": [4.0], "TASK_SCALE": [4.0],
            "DROPOUT": [0.05, 0.05, 0.05, 0.05],
            "R_PER_TASK": {
                "semseg": [4], "normals": [4], "sal": [4], "human_parts": [4], "edge": [4], "depth": [4],
                "shared": [64],
            },
        },
        "DECODER_HEAD": {"semseg": "hrnet", "normals": "hrnet", "sal": "hrnet", "human_parts": "hrnet"},
    },
}  # fmt: skip


def recipe_from(tmp_path: Path, lora: dict[str, Any] | None = None, **options: Any) -> Recipe:
    settings = copy.deepcopy(SHIPPED)
    for name in ("MODEL", "TRAIN", "DATA"):
        settings.setdefault(name, {}).update(options.pop(name, {}))  # type: ignore[attr-defined]
    settings["MODEL"]["MTLORA"].update(lora or {})  # type: ignore[index]
    (tmp_path / "official.yaml").write_text(yaml.safe_dump(settings))
    convert_settings("mtlora", tmp_path / "official.yaml", tmp_path / "ours.yaml", **options)
    recipe = load_recipe(tmp_path / "ours.yaml")
    (tmp_path / "ours.yaml").unlink()
    return recipe


def adapter_from(tmp_path: Path, lora: dict[str, Any] | None = None, **options: Any) -> MTLoRA:
    adapter = recipe_from(tmp_path, lora, **options).model.adapter
    assert isinstance(adapter, MTLoRA)
    return adapter


PER_TASK = {"semseg": [4], "normals": [4], "sal": [4], "human_parts": [4], "edge": [4], "depth": [4]}


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        *((f"mtlora_r{r}", {"R_PER_TASK": {**PER_TASK, "shared": [r]}}) for r in (16, 32, 64)),
        *(
            (
                f"mtlora_plus_r{r}_pertask",
                {"R_PER_TASK": {**PER_TASK, "shared": [r]}, "DOWNSAMPLER_ENABLED": True},
            )
            for r in (16, 32, 64)
        ),
        *(
            (f"mtlora_plus_r{r}", {"R_PER_TASK": {}, "R": [r], "DOWNSAMPLER_ENABLED": True})
            for r in (4, 8, 16)
        ),
    ],
)
def test_the_shipped_settings_are_the_shipped_recipes(
    name: str, lora: dict[str, Any], tmp_path: Path
) -> None:
    ours, shipped = recipe_from(tmp_path, lora), load_recipe(f"pascal/{name}")
    assert ours.model == shipped.model
    assert list(ours.tasks) == list(shipped.tasks)
    assert (ours.optim, ours.phases, ours.balancer) == (shipped.optim, shipped.phases, shipped.balancer)
    assert ours.data.model_copy(update={"root": None}) == shipped.data.model_copy(update={"root": None})
    assert ours.name == "official"


def test_nyud_settings_are_the_nyud_recipe(tmp_path: Path) -> None:
    ours, shipped = (
        recipe_from(tmp_path, tasks=["semseg", "normals", "depth"]),
        load_recipe("nyud/mtlora_r64"),
    )
    assert ours.model == shipped.model
    assert ours.data.model_copy(update={"root": None}) == shipped.data.model_copy(update={"root": None})


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ({"R_PER_TASK": {}, "R": 8}, {"rank": 8, "task_rank": 8}),
        ({"R_PER_TASK": {}, "R": [1, 2, 3, 4]}, {"rank": (1, 2, 3, 4), "task_rank": (1, 2, 3, 4)}),
        (
            {
                "R_PER_TASK": {
                    "semseg": 1,
                    "normals": [2],
                    "sal": [3] * 4,
                    "human_parts": [1, 2, 3, 4],
                    "shared": 5,
                }
            },
            {"rank": 5, "task_rank": {"semseg": 1, "normals": 2, "saliency": 3, "human_parts": (1, 2, 3, 4)}},
        ),
        ({"SHARED_SCALE": 2}, {"scale": 2.0, "task_scale": None}),
        (
            {"SCALE_PER_TASK": {"semseg": 1, "normals": [2], "sal": 3.0, "human_parts": [4, 5, 6, 7]}},
            {"task_scale": {"semseg": 1, "normals": 2, "saliency": 3, "human_parts": (4, 5, 6, 7)}},
        ),
        ({"SCALE_PER_TASK": dict.fromkeys(SHIPPED["MODEL"]["DECODER_HEAD"], 3.0)}, {"task_scale": 3.0}),  # type: ignore[index]
        ({"DROPOUT": [0.0, 0.1, 0.2, 0.3]}, {"dropout": (0.0, 0.1, 0.2, 0.3)}),
        ({"SHARED_MODE": "add"}, {"mode": "addition"}),
        ({"SHARED_MODE": "lora_only"}, {"mode": "lora_only"}),
        ({"SHARED_MODE": "matrixv2"}, {"mode": "matrixv2"}),
        ({"BIAS": "all"}, {"train_biases": True}),
        ({"BIAS": "lora_only"}, {"train_biases": False}),
        ({"FREEZE_PRETRAINED": False}, {"train": "all"}),
        ({"DOWNSAMPLER_ENABLED": True}, {"layers": ("qkv", "proj", "fc1", "fc2", "reduction")}),
        ({"QKV_ENABLED": False, "FC1_ENABLED": False}, {"layers": ("proj", "fc2")}),
        (
            {"TRAINABLE_SCALE_SHARED": True, "TRAINABLE_SCALE_PER_TASK": True},
            {"train_scale": True, "train_task_scale": True},
        ),
    ],
)
def test_variants(lora: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    adapter = adapter_from(tmp_path, lora)
    assert {name: getattr(adapter, name) for name in expected} == expected


def test_freezing(tmp_path: Path) -> None:
    train = {"FREEZE_PATCH_EMBED": True, "FREEZE_RELATIVE_POSITION_BIAS": True}
    assert adapter_from(tmp_path, TRAIN=train).train == ("norm", "downsample.reduction")
    train = {"FREEZE_LAYER_NORM": True, "FREEZE_DOWNSAMPLE_REDUCTION": True}
    assert adapter_from(tmp_path, TRAIN=train).train == ("patch_embed", "relative_position_bias_table")


def test_networks_and_heads(tmp_path: Path) -> None:
    swin = {"EMBED_DIM": 128, "DEPTHS": [2, 2, 18, 2], "NUM_HEADS": [4, 8, 16, 32]}
    model = {"SWIN": swin, "DECODER_DOWNSAMPLER": False, "DECODER_HEAD": {"sal": "aspp", "normals": "other"}}
    spec = recipe_from(tmp_path, MODEL=model).model
    assert spec.backbone.name == "swin_base_patch4_window7_224"
    assert spec.neck.channels is None  # type: ignore[attr-defined]
    assert spec.head.type == "hrnet"
    assert {name: head.type for name, head in spec.heads.items()} == {"saliency": "aspp", "normals": "aspp"}
    own = {"EMBED_DIM": 48, "QKV_BIAS": False, "MLP_RATIO": 2.0, "PATCH_SIZE": 2}
    options = recipe_from(tmp_path, MODEL={"SWIN": own}, DATA={"IMG_SIZE": 224}).model.backbone.options
    assert {"embed_dim": 48, "qkv_bias": False, "mlp_ratio": 2.0, "patch_size": 2}.items() <= options.items()
    assert "num_heads" in options
    heads = {"DECODER_HEAD": "segformer", "SEGFORMER_CHANNELS": 64}
    assert recipe_from(tmp_path, MODEL=heads).model.head.width == 64  # type: ignore[attr-defined]
    assert recipe_from(tmp_path, MODEL={"DECODER_HEAD": "updecoder"}).model.head.legacy  # type: ignore[attr-defined]
    assert recipe_from(tmp_path, {"ENABLED": False}).model.adapter is None


def test_tasks_choose_the_dataset(tmp_path: Path) -> None:
    recipe = recipe_from(tmp_path, tasks=["semseg", "normals", "depth"])
    assert recipe.data.type == "nyud"
    assert list(recipe.tasks) == ["semseg", "normals", "depth"]
    with pytest.raises(ConfigError, match=r"official\.yaml: MODEL\.MTLORA\.R_PER_TASK: no value for 'parts'"):
        recipe_from(tmp_path, tasks=["semseg", "parts"])


def test_files_below(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "first.yaml").write_text("MODEL: {DROP_PATH_RATE: 0.3, SWIN: {WINDOW_SIZE: 14}}\n")
    (tmp_path / "second.yaml").write_text("BASE: ['', base/first.yaml]\nMODEL: {SWIN: {EMBED_DIM: 48}}\n")
    (tmp_path / "third.yaml").write_text("BASE: second.yaml\nMODEL: {DROP_PATH_RATE: 0.5}\n")
    merged = read_settings(tmp_path / "third.yaml")["MODEL"]
    assert merged == {"DROP_PATH_RATE": 0.5, "SWIN": {"WINDOW_SIZE": 14, "EMBED_DIM": 48}}
    (tmp_path / "base" / "first.yaml").write_text("BASE: ../third.yaml\n")
    with pytest.raises(ConfigError, match="`BASE` leads back to the same file"):
        read_settings(tmp_path / "third.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"SHARED_MODE": "matrix3"}}, r"MODEL\.MTLORA\.SHARED_MODE: .*got 'matrix3'.*did you mean"),
        ({"lora": {"R_PER_TASK": {"shared": [4]}}}, r"R_PER_TASK: no value for 'semseg'"),
        ({"lora": {"R_PER_TASK": {}, "R": [1, 2]}}, "rank: one value, or one per stage"),
        ({"lora": {"R_PER_TASK": {}, "R": 0}}, "a shared rank of 0 takes away"),
        ({"lora": {"DROPOUT": 1.5}}, "dropout: a probability"),
        ({"MODEL": {"TYPE": "swinv2"}}, r"MODEL\.TYPE: .*got 'swinv2'"),
        ({"MODEL": {"DROP_RATE": 0.1}}, r"MODEL\.DROP_RATE: .*got 0\.1"),
        ({"MODEL": {"SWIN": {"APE": True}}}, r"MODEL\.SWIN\.APE: .*got True"),
        ({"MODEL": {"PER_TASK_DOWNSAMPLER": False}}, r"PER_TASK_DOWNSAMPLER: .*got False"),
        ({"DATA": {"IMG_SIZE": 250}}, "4x4, which do not cover the image"),
        ({"tasks": ["semseg", "edge", "depths"]}, "no value for 'depths'"),
    ],
)
def test_settings_that_have_no_counterpart(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_from(tmp_path, **changes)
    assert [file.name for file in tmp_path.iterdir()] == ["official.yaml"]


def test_other_files_are_no_settings(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("data: rooms\nmodel: {adapter: mtlora}\n")
    what = r"own\.yaml: these are no settings of the official.*expected a key MODEL.*got 'data, model'"
    with pytest.raises(ConfigError, match=what):
        convert_settings("mtlora", tmp_path / "own.yaml", tmp_path / "recipe.yaml")
    assert [file.name for file in tmp_path.iterdir()] == ["own.yaml"]


def test_keys_of_forks_are_told(tmp_path: Path) -> None:
    with pytest.warns(
        PolytaskWarning, match="without a counterpart are passed over: MAML_MODE, METASGD_INIT"
    ):
        recipe_from(tmp_path, {"MAML_MODE": True, "METASGD_INIT": 1e-3, "SPLIT_QKV": False})


# --- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            {"MODEL": {"MTLORA": {"DOWNSAMPLER_ENABLED": True}}},
            CheckpointError,
            r"missing .*reduction\.linear",
        ),
        (
            {"MODEL": {"MTLORA": {"R_PER_TASK": {"shared": [8]}}}},
            CheckpointError,
            r"lora_shared_A has shape \(4",
        ),
        (
            {"MODEL": {"MTLORA": {"R_PER_TASK": {"sal": [3]}}}},
            CheckpointError,
            r"lora_tasks_A\.sal has shape",
        ),
        ({"MODEL": {"MTLORA": {"SHARED_MODE": "addition"}}}, CheckpointError, "missing .*lora_norm"),
        ({"MODEL": {"MTLORA": {"ENABLED": False}}}, CheckpointError, "left over .*lora_"),
        ({"MODEL": {"SWIN": {"EMBED_DIM": 24}}}, CheckpointError, "has shape"),
        ({"MODEL": {"DECODER_CHANNELS": [6, 12, 18]}}, ConfigError, "one projection per feature level"),
        ({"MODEL": {"DECODER_HEAD": {"sal": "aspp"}}}, CheckpointError, "sal.last_layer"),
    ],
)
def test_wrong_settings(
    change: dict[str, Any], kind: type[Exception], message: str, official: Any, tmp_path: Path
) -> None:
    from polytask.files import merge

    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(merge(settings_of("matrix"), change)))
    file = official("matrix")
    with pytest.raises(kind, match=message) as caught:
        convert_checkpoint("mtlora", file, tmp_path / "run", settings=tmp_path / "wrong.yaml")
    assert len(str(caught.value).splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"wrong.yaml", "matrix.pth"}


def test_another_task_set(official: Any, tmp_path: Path) -> None:
    convert_checkpoint("mtlora", official("matrix"), tmp_path / "run")
    recipe = Run(tmp_path / "run").recipe
    three = recipe.model_copy(update={"tasks": {k: v for k, v in recipe.tasks.items() if k != "normals"}})
    with pytest.raises(
        TaskMismatchError, match=r"matrix\.pth: .*expected human_parts, sal, semseg, got 'human_parts, nor"
    ):
        load_official("mtlora", tmp_path / "matrix.pth", three)


def run(*words: Any) -> int:
    return main(["convert", "mtlora", *map(str, words)])


def test_the_command_line(official: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = official("plus", with_settings=False)
    target = tmp_path / "run"
    assert run(file, "--output", target, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["run"] == str(target)
    assert "warning: " in err
    assert "read off the tensors: embedding 8, depths [2, 2, 2, 2]" in err
    assert run(target, "--to-official", tmp_path / "back.pth", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == len(official_state("plus"))
    (tmp_path / "shipped.yaml").write_text(yaml.safe_dump(SHIPPED))
    assert (
        run(tmp_path / "shipped.yaml", "--output", tmp_path / "r.yaml", "--set", "optim.lr=1.0", "--json")
        == 0
    )
    assert json.loads(capsys.readouterr().out)["recipe"] == str(tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml").optim.lr == 1.0


def test_a_converted_run_predicts(official: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    Image.new("RGB", (90, 70), "red").save(tmp_path / "photo.png")
    assert run(official("plus"), "--output", tmp_path / "run") == 0
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "photo.png")]) == 0
    with Image.open(tmp_path / "run" / "predictions" / "photo_semseg.png") as picture:
        assert picture.size == (90, 70)


class Malice:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


def test_bad_files(official: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence, exit code 4 (2 for a command that makes no sense), nothing written."""
    good = official("plus")
    cut = tmp_path / "cut.pth"
    cut.write_bytes(good.read_bytes()[:-1000])
    torch.save({"model": {"w": torch.ones(1)}, "config": Malice(tmp_path / "ran")}, tmp_path / "bad.pth")
    torch.save({"model": {"layers.0.weight": torch.ones(1)}}, tmp_path / "foreign.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    content = read_checkpoint(good)
    content["model"]["backbone.patch_embed.proj.weight"][0, 0, 0, 0] = torch.nan
    torch.save({"model": content["model"]}, tmp_path / "nan.pth")
    (tmp_path / "exists").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for words, code, message in [
        ((cut,), 4, "cut.pth: cannot be read"),
        ((tmp_path / "bad.pth",), 4, "system, which no checkpoint needs"),
        ((tmp_path / "foreign.pth",), 4, "this is no MTLoRA checkpoint"),
        ((tmp_path / "empty.pth",), 4, "holds no tensors by name"),
        ((tmp_path / "none.pth",), 4, "no such file"),
        ((tmp_path / "exists",), 4, "a folder, not a file"),
        ((tmp_path / "nan.pth",), 4, "1 tensors hold values that are not finite, first "),
        ((tmp_path / "none.yaml",), 2, "settings cannot be read"),
        ((good, "--config", tmp_path / "none.yaml"), 2, "settings cannot be read"),
        ((good, "--set", "model.adapter.rank=16"), 4, r"lora_shared_A has shape (4, 8), expected (16, 8)"),
        ((good, "--set", "model.adapter.rnak=16"), 2, "did you mean 'rank'?"),
    ]:
        assert run(*words, "--output", tmp_path / "run") == code, words
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if not line.startswith("warning: ")]
        assert len(errors) == 1, err
        assert message in errors[0]
        assert not out
        assert sorted(tmp_path.rglob("*")) == before
    assert run(good, "--output", tmp_path / "exists") == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert run(tmp_path / "exists", "--to-official", tmp_path / "x.pth") == 4
    assert sorted(tmp_path.rglob("*")) == before


def test_plain_swin(tmp_path: Path) -> None:
    """Settings without the adapter: all of the network trains, and the keys are those of a plain Swin."""
    settings = settings_of("plus")
    settings["MODEL"]["MTLORA"]["ENABLED"] = False
    state = {
        key.replace(".linear.", "."): value
        for key, value in official_state("plus").items()
        if ".lora_" not in key
    }
    convert_checkpoint("mtlora", write_official(tmp_path / "p.pth", state, settings), tmp_path / "run")
    spec: ModelSpec = Run(tmp_path / "run").recipe.model
    assert spec.adapter is None
    export_run("mtlora", tmp_path / "run", tmp_path / "back.pth")
    same_state(
        {k: v for k, v in state.items() if not k.endswith(("_mask", "_index"))},
        {
            k: v
            for k, v in read_checkpoint(tmp_path / "back.pth")["model"].items()
            if not k.endswith(("_mask", "_index"))
        },
    )
