"""Run folders read back."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import polytask
from polytask.errors import CheckpointError, ConfigError
from polytask.runs import Run, score
from tests.conftest import Make


def test_parts_of_a_run(trained: Path, small: Make) -> None:
    run = Run(trained)
    assert run.recipe == small()
    assert list(run.tasks) == ["semseg", "depth", "scene"]
    assert run.scores["step"] == 2
    assert run.cost["total"] > run.cost["trainable"] > 0
    assert [line["kind"] for line in run.log] == ["step", "step", "eval"]


@pytest.mark.parametrize("which", ["last", "best"])
def test_model_is_the_trained_one(trained: Path, which: str) -> None:
    model = Run(trained).model(which)
    assert not model.training
    image = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        one, two = model(image).logits, Run(trained).model(which)(image).logits
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_score_of_a_split(trained: Path) -> None:
    run = Run(trained)
    val, test = score(run), score(run, split="test")
    assert val.keys() == test.keys() == run.scores["scores"].keys()
    assert val != test
    assert score(run, checkpoint="best") == val
    with pytest.raises(ConfigError, match="unknown split, got 'tset'; did you mean 'test'"):
        score(run, split="tset")


def test_score_under_other_settings(trained: Path) -> None:
    near, all_ = score(Run(trained, ("tasks.depth.max_depth=2",))), score(Run(trained))
    assert near["depth"]["rmse"] != all_["depth"]["rmse"]
    assert near["semseg"] == all_["semseg"]
    with pytest.raises(ConfigError, match="max_dept: unknown key"):
        score(Run(trained, ("tasks.depth.max_dept=2",)))


def test_score_in_training_is_that_of_the_checkpoint(trained: Path, tmp_path: Path) -> None:
    run = Run(trained)
    limited = run.recipe.data.open("val", run.tasks, train=False)
    from polytask.data.base import Samples, eval_loader
    from polytask.engine.evaluator import evaluate

    first = Samples(run.recipe.data, limited.records[:8], run.tasks, train=False)
    assert evaluate(run.model(), run.tasks, eval_loader(first, batch_size=8)) == run.scores["scores"]


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="this is no run folder"):
        _ = Run(tmp_path).recipe
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        from polytask.engine import checkpoint

        checkpoint.read(tmp_path)


@pytest.mark.parametrize("content", [None, "{", ""])
def test_unfinished_run(trained: Path, tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder, symlinks=True)
    (folder / "scores.json").unlink()
    if content is not None:
        (folder / "scores.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"scores\.json cannot be read .*finish the run first"):
        _ = Run(folder).scores


def test_score_without_valid_labels_is_nan(trained: Path, tmp_path: Path) -> None:
    content = json.loads((trained / "scores.json").read_text())
    content["scores"]["semseg"]["mIoU"] = None
    (tmp_path / "scores.json").write_text(json.dumps(content))
    assert math.isnan(Run(tmp_path).scores["scores"]["semseg"]["mIoU"])


def test_public_names() -> None:
    assert set(polytask.__all__) == {"__version__", *polytask._HOMES}
    for name in polytask.__all__:
        assert getattr(polytask, name) is not None
    modules = {path.stem for path in Path(polytask.__file__).parent.iterdir()}
    assert not modules & set(polytask.__all__)  # a module of that name would hide it
    assert dir(polytask) == sorted(polytask.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = polytask.trian


def test_library_in_a_few_lines(trained: Path) -> None:
    from polytask import MTLoRA, Recipe, Run, encode

    run = Run(trained)
    assert isinstance(run.recipe, Recipe)
    assert run.recipe.model.adapter == MTLoRA(rank=2, task_rank=2)
    assert encode(run.recipe)["name"] == "small"
