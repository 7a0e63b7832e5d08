"""What many tests need: a cache of their own, small recipes, and a trained run."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from polytask.config import decode
from polytask.engine.launch import train
from polytask.engine.phase import PhaseRun
from polytask.errors import PolytaskWarning
from polytask.files import dump_yaml, load_yaml, override
from polytask.progress import set_quiet
from polytask.recipe import Recipe
from tests.cli.forks import Forks

SMALL: dict[str, Any] = {
    "name": "small",
    "data": {"type": "rooms", "preset": "nano", "batch_size": 8, "eval_batch_size": 8},
    "tasks": ["semseg", "depth", "scene"],
    "model": {
        "backbone": {
            "name": "swin_tiny_patch4_window7_224",
            "feature_point": "after_merge",
            "options": {
                "patch_size": 2,
                "embed_dim": 8,
                "depths": [1, 1, 1, 1],
                "num_heads": [1, 2, 2, 2],
                "window_size": 4,
            },
        },
        "adapter": {"type": "mtlora", "rank": 2, "task_rank": 2},
        "neck": {"type": "fuse", "channels": [3, 4, 5, 6]},
    },
    "optim": {"lr": 2e-3},
    "phases": [{"steps": 2}],
    "run": {"max_eval_batches": 1},
}

Make = Callable[..., Recipe]


def small(*changes: str) -> Recipe:
    """A checked recipe that trains in a second; changes are texts ``a.b=VALUE``."""
    recipe = decode(Recipe, override(copy.deepcopy(SMALL), changes))
    recipe.check()
    return recipe


@pytest.fixture(name="small")
def _small() -> Make:
    return small


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of this session for everything the library keeps, so that nothing outside is touched."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYTASK_CACHE", str(folder))
        patch.delenv("WORLD_SIZE", raising=False)
        yield folder


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    set_quiet(True)
    yield
    set_quiet(False)


@pytest.fixture(scope="session")
def rooms(cache: Path) -> Path:
    """The cache with the smallest rooms rendered."""
    data = small().data
    for split in ("train", "val", "test"):
        data.records(split)
    return cache


@pytest.fixture(scope="session")
def trained(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the small recipe; tests must not change it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train_quietly(small(), folder)
    return folder


def train_quietly(recipe: Recipe, folder: Path, *, resume: bool = False) -> Any:
    """Train without the warning about the random frozen part."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PolytaskWarning)
        return train(recipe, folder, resume=resume)


@contextmanager
def killed_before(step: int) -> Iterator[None]:
    """Training in here is interrupted after so many steps."""
    steps = PhaseRun._step

    def killed(self: PhaseRun, batch: Any) -> None:
        if self.position.global_step == step:
            raise KeyboardInterrupt
        steps(self, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PhaseRun, "_step", killed)
        yield


@pytest.fixture(scope="session")
def forks(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Command lines in processes of their own."""
    server = Forks(tmp_path_factory.mktemp("forks"))
    yield server
    server.close()


@pytest.fixture
def recipe_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes the small recipe, changed, into a file."""

    def write(*changes: str, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(dump_yaml(override(copy.deepcopy(SMALL), changes)))
        return path

    return write


@pytest.fixture(scope="session")
def runs(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A multi-task run and the two single-task ones; tests must not change them."""
    folder = tmp_path_factory.mktemp("runs")
    for name, tasks in (("both", "[depth, scene]"), ("depth", "[depth]"), ("scene", "[scene]")):
        train_quietly(small(f"tasks={tasks}", f"name={name}", "phases.0.steps=1"), folder / name)
    scores = json.loads((folder / "scene" / "scores.json").read_text())
    scores["scores"]["scene"]["accuracy"] = 12.5  # after one step it may be zero, which allows no gain
    (folder / "scene" / "scores.json").write_text(json.dumps(scores))
    return {path.name: path for path in folder.iterdir()}


def rescored(run: Path, folder: Path, scores: dict[str, float], **changes: Any) -> Path:
    """A copy of a run with other headline scores; changes go into ``scores.json``."""
    shutil.copytree(run, folder, symlinks=True)
    content = json.loads((folder / "scores.json").read_text()) | changes
    for task, value in scores.items():
        content["scores"][task][content["tasks"][task]["headline"]] = value
    (folder / "scores.json").write_text(json.dumps(content))
    return folder


def reseeded(run: Path, folder: Path, scores: dict[str, float], **recipe: Any) -> Path:
    """A copy of a run with other headline scores and another recipe, such as another seed."""
    rescored(run, folder, scores)
    (folder / "recipe.yaml").write_text(dump_yaml({**load_yaml(run / "recipe.yaml"), **recipe}))
    return folder
