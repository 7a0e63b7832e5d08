"""Studies: what is planned, kept, resumed, told and written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polytask import study
from polytask.cli import main
from polytask.comparison import compare
from polytask.config import encode
from polytask.errors import ConfigError, DataError
from polytask.files import dump_yaml
from polytask.runs import Run
from polytask.study import recipe_files, run_study
from tests.conftest import SMALL, train_quietly

pytestmark = pytest.mark.filterwarnings("ignore::polytask.errors.PolytaskWarning")
TASKS = {"both": ["depth", "scene"], "depth": ["depth"], "scene": ["scene"]}
Write = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three recipes on a common one, of one step each."""
    path = tmp_path / "mine"
    path.mkdir()
    (path / "_common.yaml").write_text(dump_yaml({**SMALL, "phases": [{"steps": 1}]}))
    for name, tasks in TASKS.items():
        add(path, name, tasks=tasks)
    return path


def add(folder: Path, name: str, **settings: Any) -> None:
    recipe = {"base": "_common.yaml", "name": name, **settings}
    (folder / f"{name}.yaml").write_text(dump_yaml(recipe))


@pytest.fixture
def news() -> list[str]:
    return []


def test_every_recipe_with_every_seed(folder: Path, tmp_path: Path, rooms: Path, news: list[str]) -> None:
    out = tmp_path / "out"
    found = run_study(folder, out, news.append, seeds=[3, 1])
    assert found.failed == {}
    assert [(row.name, row.seeds) for row in found.comparison.rows] == [
        ("single task (2 models)", (1, 3)),
        ("both", (1, 3)),
    ]
    assert [line.partition(":")[0] for line in news] == [
        "[1/6] both-seed3", "[2/6] depth-seed3", "[3/6] scene-seed3",
        "[4/6] both-seed1", "[5/6] depth-seed1", "[6/6] scene-seed1",
    ]  # fmt: skip
    assert all(line.endswith("left") for line in news[:5])
    assert not news[5].endswith("left")
    assert "polytask study: " in (out / "report.html").read_text()
    assert (out / "table.md").read_text().count("\n| ") == 3  # rule and rows
    assert (out / "figures" / "predictions-1.png").exists()
    train_quietly(Run(out / "both-seed3").recipe, tmp_path / "alone")
    name = "checkpoints/last/weights.safetensors"
    assert (tmp_path / "alone" / name).read_bytes() == (out / "both-seed3" / name).read_bytes()

    news.clear()
    again = run_study(folder, out, news.append, seeds=[3, 1])
    assert again.comparison == found.comparison == compare([out])
    assert all(line.endswith("already done") for line in news)
    wider = run_study(folder, out, news.append, seeds=[1, 2, 3])
    assert wider.comparison.rows[1].seeds == (1, 2, 3)


def test_interrupted_runs_are_resumed(
    folder: Path,
    tmp_path: Path,
    rooms: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    resumed, stopped = [], []

    def train(recipe: Any, run: Path, *, resume: bool) -> Any:
        resumed.append((run.name, resume))
        if run.name == "depth-seed0" and not stopped:
            stopped.append(run)
            run.mkdir(parents=True)
            (run / "recipe.yaml").write_text(dump_yaml(encode(recipe)))
            raise KeyboardInterrupt
        return train_quietly(recipe, run, resume=resume)

    monkeypatch.setattr(study, "train", train)
    words = ["study", str(folder), "--seeds", "0", "--output", str(tmp_path / "out")]
    assert main(words) == 130
    assert "interrupted; the same command continues" in capsys.readouterr().err
    assert main(words) == 0
    runs = [("both-seed0", False), ("depth-seed0", False), ("depth-seed0", True), ("scene-seed0", False)]
    assert resumed == runs


def test_failed_runs_do_not_stop_the_others(
    folder: Path, tmp_path: Path, rooms: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(folder, "diverges", tasks=TASKS["both"], optim={"lr": 1e30, "clip_norm": None}, phases=[{"steps": 3}])
    words = ["study", str(folder), "--seeds", "0", "--output", str(tmp_path / "out"), "--json"]
    assert main(words) == 5
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert [row["name"] for row in result["rows"]] == ["single task (2 models)", "both"]
    ((run, sentence),) = result["failed"].items()
    assert run == str(tmp_path / "out" / "diverges-seed0")
    assert "not finite" in sentence or "is nan" in sentence
    assert "[3/4] diverges-seed0: failed: " in err
    assert "error: diverges-seed0 failed: " in err


def test_nothing_finished(folder: Path, tmp_path: Path, news: list[str]) -> None:
    for name in ("both", "scene"):
        (folder / f"{name}.yaml").unlink()
    overrides = [f"data={{type: pascal_context, root: {tmp_path}, image_size: 32}}", "tasks=[semseg]"]
    found = run_study(folder, tmp_path / "out", news.append, overrides=overrides)
    assert found.comparison is None
    assert {run.name for run in found.failed} == {"depth"}
    assert all(error.exit_code == 3 for error in found.failed.values())
    assert not (tmp_path / "out").exists()


def test_what_is_refused_before_training(
    folder: Path, tmp_path: Path, news: list[str], monkeypatch: pytest.MonkeyPatch, trained: Path
) -> None:
    out = tmp_path / "out"

    def refused(message: str, *words: Any, **options: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            run_study(*(words or (folder, out, news.append)), **options)

    refused("no such folder of recipes.*did you mean 'rooms/demo'", "rooms/dmeo", out, news.append)
    refused("no recipe in this folder", tmp_path, out, news.append)
    refused("a seed is named twice.*got '1 1'", seeds=[1, 1])
    refused("rnak", overrides=["model.adapter.rnak=3"])
    refused("3 recipes have the name 'x'", overrides=["name=x"])
    refused("recipes cannot be compared.*both: depth; depth: depth", overrides=["tasks=[depth]"])
    add(folder, "three", tasks=["depth", "scene", "semseg"])
    refused("recipes cannot be compared.*three: depth, scene, semseg")
    (folder / "three.yaml").unlink()
    shutil.copytree(trained, out / "scene", symlinks=True)
    refused("started with another recipe")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("a study runs in one process")
    assert news == []
    assert [path.name for path in out.iterdir()] == ["scene"]


def test_shipped_folders_by_name() -> None:
    names = {file.stem for file in recipe_files(Path("recipes/rooms/balancers/"))}
    assert {"equal", "cagrad", "single_depth"} <= names
    assert not any(name.startswith("_") for name in names)
    assert {file.stem for file in recipe_files(Path("rooms/balancers"))} == names


def test_demo_is_a_study_with_the_seeds_of_its_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(recipe: Any, run: Path, *, resume: bool) -> Any:
        raise DataError("no", where=str(recipe.seed))

    monkeypatch.setattr(study, "train", train)
    assert main(["demo", "--output", str(tmp_path), "--json"]) == 3
    failed = json.loads(capsys.readouterr().out)["failed"]
    assert set(failed.values()) == {"0: no"}
    names = ["single-semseg", "single-human_parts", "single-saliency", "single-normals"]
    names += ["hard-sharing", "decoders-only", "mtlora"]
    assert list(failed) == [str(tmp_path / name) for name in names]


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "4 s"), (99, "99 s"), (150, "2 min"), (7200, "120 min")])
def test_durations(seconds: float, text: str) -> None:
    assert study._duration(seconds) == text
