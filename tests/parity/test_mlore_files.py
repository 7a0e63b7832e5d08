"""Official MLoRE files: schemas of the published models, checkpoints in and out, bad input."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polytask.cli import main
from polytask.config import decode
from polytask.convert import load_official
from polytask.convert.mlore import DEAD, convert_state, export_state
from polytask.convert.mlore_shapes import infer
from polytask.convert.official import convert_checkpoint, export_run
from polytask.errors import CheckpointError, ConfigError, PolytaskError, PolytaskWarning, TaskMismatchError
from polytask.model import MultiTaskModel
from polytask.pickles import read_checkpoint
from polytask.recipe import Recipe, load_recipe
from polytask.runs import Run, empty_model
from tests.parity.test_mlore import GOLDEN, META, assert_outputs, names, state, vectors

pytestmark = pytest.mark.filterwarnings("ignore::polytask.errors.PolytaskWarning")
SCHEMAS = json.loads(gzip.decompress((GOLDEN / "state_dict_schema.json.gz").read_bytes()))
PUBLISHED = {
    "pascal/mlore_vit_small": ("vitS_pascal", 42_176_918, 384),
    "pascal/mlore_vit_base": ("vitB_pascal", 259_132_406, 768),
    "pascal/mlore_vit_large": ("vitL_pascal", 407_690_406, 1024),
    "nyud/mlore_vit_large": ("vitL_nyud", 551_625_533, 1024),
}
"""Recipe -> name of the schema, parameters that outputs depend on, width of the ViT."""
ORDER = {"pascal": "softmax_first", "nyud": "top_first"}


# --- schemas of the published models ---------------------------------------------------------------


def on_meta(recipe: Recipe) -> MultiTaskModel:
    with torch.device("meta"):
        return empty_model(recipe)


def schema_of(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(shape) for key, shape in SCHEMAS[PUBLISHED[name][0]].items()}


def empty(name: str, prefix: str = "") -> dict[str, Tensor]:
    """A state dict of published size without memory."""
    return {prefix + key: torch.empty(shape, device="meta") for key, shape in schema_of(name).items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipes_are_the_published_models(name: str) -> None:
    recipe, schema = load_recipe(name), schema_of(name)
    model = on_meta(recipe)
    assert convert_state(empty(name, "module."), model).keys() == model.state_dict().keys()
    dead = {key for key in schema if DEAD.match(key)}
    assert len(dead) == (59 if name.endswith("base") else 0)
    alive = {key: shape for key, shape in schema.items() if key not in dead}
    exported = {key: tuple(value.shape) for key, value in export_state(recipe, model).items()}
    assert exported == alive


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name: str) -> None:
    """Ours are fewer by the position of the class token, which the official network holds and never reads."""
    _, published, width = PUBLISHED[name]
    buffers = re.compile(r"running_(mean|var)$|num_batches_tracked$")
    alive = {k: s for k, s in schema_of(name).items() if not DEAD.match(k) and not buffers.search(k)}
    assert sum(map(math.prod, alive.values())) == published
    model = on_meta(load_recipe(name))
    assert sum(p.numel() for p in model.parameters()) == published - width


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_tell_the_published_recipe(name: str) -> None:
    draft, shipped = infer(empty(name), "file"), load_recipe(name)
    assert list(draft.asked) == ["model.neck.gates"]
    draft.recipe["model"]["neck"]["gates"] = ORDER[name.partition("/")[0]]
    found = decode(Recipe, draft.recipe)
    assert found.model_copy(update={"name": shipped.name}) == shipped


# --- checkpoints in and out ------------------------------------------------------------------------


def written(folder: Path, name: str, **changes: Tensor) -> Path:
    """As the official loop saves it, with what it holds of the optimizer and schedule."""
    path = folder / f"{name}.pth.tar"
    model = {f"module.{key}": value for key, value in {**state(name), **changes}.items()}
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))]).state_dict()
    scheduler = {"base_lrs": [2e-5], "last_epoch": 7, "_step_count": 8, "lr_lambdas": [None]}
    content = {"optimizer": optimizer, "scheduler": scheduler, "epoch": 3, "iter_count": 40000}
    torch.save({"model": model, **content}, path)
    return path


def told(name: str) -> list[str]:
    """What the small models of the vectors leave open; published ones only the order."""
    size = list(META[name]["image_hw"])
    return [
        f"model.neck.gates={ORDER[name]}", "model.backbone.options.num_heads=3", f"data.image_size={size}",
    ]  # fmt: skip


def converted(name: str, folder: Path) -> Run:
    convert_checkpoint("mlore", written(folder, name), folder / "run", changes=told(name))
    return Run(folder / "run")


@names
@torch.no_grad()
def test_a_checkpoint_becomes_a_run(name: str, tmp_path: Path) -> None:
    run = converted(name, tmp_path)
    assert list(run.tasks) == [{"sal": "saliency"}.get(task, task) for task in META[name]["tasks"]]
    assert_outputs(run.model()(vectors(name)["input.image"]), name)
    loaded = load_official("mlore", tmp_path / f"{name}.pth.tar", run.recipe)
    assert not loaded.training
    assert_outputs(loaded.merged()(vectors(name)["input.image"]), name)


@names
def test_back_to_official(name: str, tmp_path: Path) -> None:
    """All but the position of the class token comes back to the bit."""
    converted(name, tmp_path)
    export_run("mlore", tmp_path / "run", tmp_path / "back.pth")
    back, given = read_checkpoint(tmp_path / "back.pth")["model"], dict(state(name))
    given["backbone.pos_embed"] = given["backbone.pos_embed"].clone()
    given["backbone.pos_embed"][:, 0] = 0
    assert back.keys() == given.keys()
    for key, value in given.items():
        assert back[key].dtype == value.dtype
        assert torch.equal(back[key], value), key


@pytest.mark.parametrize(
    "change",
    ["model.backbone.final_norm=false", "model.neck=fuse", "model.adapter=bitfit", "model.head=hrnet"],
)
def test_what_is_no_official_model_is_not_exported(change: str) -> None:
    recipe = load_recipe("pascal/mlore_vit_small", [change, "phases.0.objective.penalties={}"])
    part = change.partition("=")[0].removesuffix(".final_norm")
    with pytest.raises(ConfigError, match=rf"{part}: the official code has no such model, expected a ViT"):
        export_state(recipe, on_meta(recipe))


# --- the order of the gates, and other sizes of images ---------------------------------------------


def test_the_order_must_be_stated_and_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, command = written(tmp_path, "pascal"), ["convert", "mlore", str(tmp_path / "pascal.pth.tar")]
    output = ["--output", str(tmp_path / "run"), "--json"]
    more = [word for change in told("pascal")[1:] for word in ("--set", change)]
    assert main([*command, *output, *more]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines() == [
        f"error: {file}: no checkpoint tells whether the softmax over all experts comes first, or the choice "
        "of the best, and a wrong order goes unnoticed: published models have softmax_first (PASCAL-Context) "
        "or top_first (NYUD-v2); state it: --set model.neck.gates=VALUE"
    ]
    assert not (tmp_path / "run").exists()
    assert main([*command, *output, *more, "--set", "model.neck.gates=top_first"]) == 0
    out, err = capsys.readouterr()
    assert "model.neck.gates: top_first, as stated" in err
    assert "model.neck.gates: top_first, as stated" in json.loads(out)["notes"]
    assert any("read off the tensors: ViT of width 24 and depth 4" in n for n in json.loads(out)["notes"])
    assert Run(tmp_path / "run").recipe.model.neck.gates == "top_first"  # type: ignore[attr-defined]


def test_another_size(tmp_path: Path) -> None:
    """Positions and the routers' maps are resized where the recipe says so; 36 patches are a square."""
    square = {
        key: torch.randn(1, 37, 24) if key == "backbone.pos_embed" else torch.randn(1, 36)
        for key in state("pascal")
        if key == "backbone.pos_embed" or key.endswith("convsp.weight")
    }
    file, size = written(tmp_path, "pascal", **square), "data.image_size=[128, 64]"
    convert_checkpoint("mlore", file, tmp_path / "own", changes=told("pascal")[:2])
    assert Run(tmp_path / "own").recipe.data.image_size == (96, 96)
    with pytest.raises(
        CheckpointError,
        match=r"the checkpoint is for images of 96x96, the recipe for images of 128x64; .*any_size=true",
    ):
        convert_checkpoint("mlore", file, tmp_path / "run", changes=[*told("pascal")[:2], size])
    assert not (tmp_path / "run").exists()
    changes = [*told("pascal")[:2], size, "model.neck.any_size=true"]
    with pytest.warns(PolytaskWarning, match="resized to images of 128x64"):
        convert_checkpoint("mlore", file, tmp_path / "run", changes=changes)
    found = Run(tmp_path / "run").model().state_dict()

    def wanted(key: str, mode: str, channels: int) -> Tensor:
        image = square[key][..., -36 * channels :] if channels == 1 else square[key][:, 1:]
        image = image.reshape(1, 6, 6, channels).permute(0, 3, 1, 2)
        resized = torch.nn.functional.interpolate(image, (8, 4), mode=mode, align_corners=False)
        return resized.flatten(2).transpose(1, 2)

    torch.testing.assert_close(found["backbone.net.pos_embed"], wanted("backbone.pos_embed", "bicubic", 24))
    router = wanted("backbone.MLoRE_2.3.router_1.sal.0.convsp.weight", "bilinear", 1)
    torch.testing.assert_close(found["neck.second.3.tasks.saliency.router.places.weight"], router.flatten(1))


@torch.no_grad()
def test_a_size_that_nothing_tells(tmp_path: Path) -> None:
    file, changes = written(tmp_path, "nyud"), told("nyud")
    with pytest.raises(ConfigError, match=r"height and width of a canvas of 12 patches; .*data\.image_size="):
        convert_checkpoint("mlore", file, tmp_path / "run", changes=changes[:2])
    sentence = "for images of 12 patches, the recipe for images of 64x64; set data.image_size to that size$"
    with pytest.raises(CheckpointError, match=sentence):
        convert_checkpoint("mlore", file, tmp_path / "run", changes=[*changes[:2], "data.image_size=64"])
    with pytest.raises(ConfigError, match="no tensor tells the heads of a ViT of width 24"):
        convert_checkpoint("mlore", file, tmp_path / "run", changes=changes[::2])


# --- bad input -------------------------------------------------------------------------------------


def narrow(key: str, value: Tensor) -> Tensor:
    """A decoder of width 10: the first channels of each map of the decoder."""
    return value[tuple(slice(10 if size == 12 else None) for size in value.shape)]


ODD_LEVEL = {
    "backbone.fea_fuse.4.weight": torch.zeros(12, 24, 1, 1), "backbone.fea_fuse.4.bias": torch.zeros(12),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "sets", "kind", "message"),
    [
        ({"backbone.extra": torch.zeros(1)}, [], CheckpointError, r"first: left over backbone\.extra"),
        ({"aux_head.semseg": torch.zeros(1)}, [], CheckpointError, "left over aux_head"),
        (ODD_LEVEL, [], CheckpointError, r"left over backbone\.fea_fuse\.4\.weight"),
        ({}, ["model.backbone.out_indices=[1, 2, 3]"], ConfigError, "the neck takes four levels.*got 3"),
        ({}, ["model.neck.width=14"], ConfigError, r"model\.neck\.width: .*multiple of 4"),
        ({}, ["model.neck.ranks=[1, 2, 3]"], ConfigError, "more experts than there are"),
        ({}, ["model.neck.task_rank=4"], CheckpointError, r"conv2\.semseg\.W\.weight has shape \(3, 12"),
        ({}, ["model.neck.gates=softmax"], ConfigError, "'softmax_first' or 'top_first'"),
        ({}, ["tasks={semseg: {}, edge: {}}"], TaskMismatchError, "other tasks than the recipe"),
        ({}, ["tasks.saliency.two_channels=false"], CheckpointError, r"sal\.linear_pred\.weight has shape"),
        ({"heads.semseg.linear_pred.weight": torch.zeros(13, 12, 1, 1)}, [], TaskMismatchError,
         "no known dataset, expected some of semseg 21, human_parts 7, sal 2, normals 3, edge 1 or some"),
        ({"heads.depths.linear_pred.weight": torch.zeros(1, 12, 1, 1)}, [], TaskMismatchError, "depths 1"),
    ],
)  # fmt: skip
def test_what_does_not_fit(
    changes: dict[str, Tensor], sets: list[str], kind: type[PolytaskError], message: str, tmp_path: Path
) -> None:
    file = written(tmp_path, "pascal", **changes)
    with pytest.raises(kind, match=message) as caught:
        convert_checkpoint("mlore", file, tmp_path / "run", changes=[*told("pascal"), *sets])
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == [file]


def test_width_of_a_checkpoint_that_no_router_can_have(tmp_path: Path) -> None:
    torch.save({key: narrow(key, value) for key, value in state("pascal").items()}, tmp_path / "odd.pth")
    with pytest.raises(ConfigError, match=r"odd\.pth: model\.neck\.width: .*multiple of 4"):
        convert_checkpoint("mlore", tmp_path / "odd.pth", tmp_path / "run", changes=told("pascal"))


def test_foreign_files(tmp_path: Path) -> None:
    given = state("pascal")
    kept = {key: value for key, value in given.items() if not key.startswith("backbone.fea_fuse")}
    for content, message in (
        ({"layers.0.weight": torch.ones(1)}, r"no MLoRE checkpoint, expected keys heads\.TASK\.linear_pred"),
        (kept, r"no MLoRE checkpoint, expected a tensor backbone\.fea_fuse\.0\.weight"),
    ):
        torch.save(content, tmp_path / "bad.pth")
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint("mlore", tmp_path / "bad.pth", tmp_path / "run", changes=told("pascal"))
    (tmp_path / "official.yml").write_text("pre_softmax: true\n")
    assert main(["convert", "mlore", str(tmp_path / "official.yml")]) == 2
    with pytest.raises(ConfigError, match=r"settings files of MLoRE are not read; .*nyud/mlore_vit_large"):
        convert_checkpoint(
            "mlore", written(tmp_path, "pascal"), tmp_path / "run", settings=tmp_path / "official.yml"
        )


def test_a_recipe_of_another_neck(tmp_path: Path) -> None:
    changes = ["model.neck=fuse", "phases.0.objective.penalties={}"]
    recipe = load_recipe("pascal/mlore_vit_small", changes)
    with pytest.raises(
        ConfigError, match=r"model\.neck: the official code has no such model, expected mlore"
    ):
        load_official("mlore", written(tmp_path, "pascal"), recipe)


def test_a_size_that_is_stated(tmp_path: Path) -> None:
    """A network whose number of patches is a square by chance."""
    given = {
        key: torch.randn(1, 37, 24) if key == "backbone.pos_embed" else torch.randn(1, 36)
        for key in state("pascal")
        if key == "backbone.pos_embed" or key.endswith("convsp.weight")
    }
    file, changes = written(tmp_path, "pascal", **given), [*told("pascal")[:2], "data.image_size=[64,144]"]
    with pytest.warns(PolytaskWarning, match="36 patches are taken to be images of 64x144, as stated, not"):
        convert_checkpoint("mlore", file, tmp_path / "run", changes=changes)
    positions = Run(tmp_path / "run").model().state_dict()["backbone.net.pos_embed"]
    assert torch.equal(positions, given["backbone.pos_embed"][:, 1:])


ODD = {
    "backbone.pos_embed": torch.ones(1, 37, 24),
    "backbone.MLoRE_1.0.router_1.sal.0.convsp.weight": torch.ones(1, 30),
}
SPLIT = {f"backbone.blocks.{k}.norm1.weight": torch.ones(24) for k in (9, 99999)}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"backbone.pos_embed": torch.ones(24)}, r"pos_embed of 3 dimensions, got '24'"),
        ({"backbone.pos_embed": torch.ones(1, 0, 24)}, "of 3 dimensions, got '1/0/24'"),
        ({"backbone.patch_embed.proj.weight": torch.tensor(1.0)}, r"proj\.weight of 4 dimensions, got ''"),
        ({"backbone.fea_fuse.0.weight": torch.tensor(1.0)}, r"fea_fuse\.0\.weight of 4 dimensions"),
        ({"heads.semseg.linear_pred.weight": torch.tensor(1.0)}, "heads of no known dataset.*semseg 0"),
        (SPLIT, r"expected blocks numbered from 0 without gaps, got '6, the last of them 99999'"),
        (ODD, r"1 problems, first: .* has shape \(1, 30\), expected"),
        ({"backbone.norm.bias": torch.full((24,), float("nan"))}, "not finite, first backbone.net.norm.bias"),
        ({"module.backbone.norm.bias": torch.ones(24)}, "both with and without the prefix module"),
    ],
)  # fmt: skip
def test_damaged_checkpoints(changes: dict[str, Tensor], sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "damaged.pth"
    torch.save({"model": {**state("pascal"), **changes}}, file)
    with pytest.raises(PolytaskError, match=sentence):
        convert_checkpoint(
            "mlore", file, tmp_path / "run", changes=[*told("pascal"), "model.neck.any_size=true"]
        )
    assert not (tmp_path / "run").exists()


def test_blocks_are_needed(tmp_path: Path) -> None:
    file = tmp_path / "damaged.pth"
    torch.save({k: v for k, v in state("pascal").items() if ".blocks." not in k}, file)
    with pytest.raises(CheckpointError, match="expected blocks numbered from 0 without gaps, got '0,"):
        convert_checkpoint("mlore", file, tmp_path / "run", changes=told("pascal"))


def test_options_for_the_other_kind_of_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", "mlore", str(written(tmp_path, "pascal")), "--output", str(tmp_path / "run")]
    assert main([*command, "--tasks", "semseg"]) == 2
    assert "--tasks: is of no use with a checkpoint, which has its own tasks" in capsys.readouterr().err
