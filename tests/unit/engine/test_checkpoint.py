"""Checkpoints: whole or not at all, checked before use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from polytask.engine import checkpoint
from polytask.errors import CheckpointError, TaskMismatchError
from polytask.files import load_yaml
from polytask.runs import Run
from tests.conftest import Make

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(1)}
STATE: dict[str, Any] = {"optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}, "position": {"step": 3}}


def save(run: Path, step: int, name: str = "last", **more: Any) -> None:
    checkpoint.save(run, name, WEIGHTS, {**STATE, **more}, {"step": step, "tasks": ["x"]})


def folders(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_written_and_read(tmp_path: Path) -> None:
    save(tmp_path, 3)
    saved = checkpoint.read(tmp_path)
    assert all(torch.equal(saved.weights[name], value) for name, value in WEIGHTS.items())
    assert saved.state == STATE
    assert saved.manifest["step"] == 3
    assert saved.manifest["torch"] == torch.__version__
    assert sorted(p.name for p in (tmp_path / "checkpoints" / "last").iterdir()) == [
        "manifest.json", "state.pt", "weights.safetensors",
    ]  # fmt: skip


def test_only_the_newest_of_each_name_is_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
        save(tmp_path, step, "best")
    assert folders(tmp_path) == ["best", "best-00000003", "last", "last-00000003"]


def test_saving_the_same_step_again_replaces(tmp_path: Path) -> None:
    for value in (1, 2, 3):
        save(tmp_path, 7, phase=value)
        assert checkpoint.read(tmp_path).state["phase"] == value
        assert len(folders(tmp_path)) == 2


@pytest.mark.parametrize(
    "place",
    [
        "safetensors.torch.save_file", "torch.save", "polytask.engine.checkpoint.file_hash",
        "polytask.engine.checkpoint._sync", "pathlib.Path.rename", "polytask.engine.checkpoint._link",
        "pathlib.Path.symlink_to", "pathlib.Path.replace",
    ],
)  # fmt: skip
def test_failure_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    save(tmp_path, 1)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(place, fail)
        with pytest.raises(OSError, match="full"):
            save(tmp_path, 2)
    assert checkpoint.read(tmp_path).manifest["step"] == 1
    save(tmp_path, 2)
    assert checkpoint.read(tmp_path).manifest["step"] == 2
    assert folders(tmp_path) == ["last", "last-00000002"]


def test_absent(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.read(tmp_path, "best")


def test_replaced_while_being_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    original, calls = checkpoint._verify, []

    def verify(folder: Path, digests: Any) -> None:
        calls.append(folder.name)
        if len(calls) == 1:
            save(tmp_path, 2)
        original(folder, digests)

    monkeypatch.setattr(checkpoint, "_verify", verify)
    assert checkpoint.read(tmp_path).manifest["step"] == 2
    assert calls == ["last-00000001", "last-00000002"]


def test_newer_format(tmp_path: Path) -> None:
    save(tmp_path, 1)
    file = tmp_path / "checkpoints" / "last" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2}))
    with pytest.raises(CheckpointError, match="written by a newer polytask"):
        checkpoint.read(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": "x"}', '{"format": 1}', "null"])
def test_manifest_of_other_content(tmp_path: Path, content: str) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "last" / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        checkpoint.read(tmp_path)


def test_state_with_objects_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, "last", WEIGHTS, {"path": Path("x")}, {"step": 1})
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read(tmp_path)


def test_optimizer_goes_on(tmp_path: Path) -> None:
    def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            net(torch.ones(1, 2)).square().sum().backward()
            optimizer.step()

    for kind in (torch.optim.AdamW, torch.optim.SGD):
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        torch.manual_seed(0)
        net = nn.Linear(2, 2)
        optimizer = kind(net.parameters(), lr=0.1, **options)
        train(net, optimizer, 3)
        state = checkpoint.optimizer_state(optimizer)
        torch.save(state, tmp_path / "o.pt")
        again = nn.Linear(2, 2)
        again.load_state_dict(net.state_dict())
        resumed = kind(again.parameters(), lr=0.1, **options)
        checkpoint.load_optimizer_state(resumed, torch.load(tmp_path / "o.pt", weights_only=True))
        train(net, optimizer, 3)
        train(again, resumed, 3)
        assert torch.equal(net.weight, again.weight)


def altered(trained: Path, folder: Path, *pairs: tuple[str, str]) -> Run:
    """A copy of a run whose recipe was changed by hand."""
    shutil.copytree(trained, folder, symlinks=True)
    text = (folder / "recipe.yaml").read_text()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    (folder / "recipe.yaml").write_text(text)
    return Run(folder)


def test_other_tasks(trained: Path, tmp_path: Path) -> None:
    assert "  scene: {}\n" in (trained / "recipe.yaml").read_text()
    with pytest.raises(TaskMismatchError, match="expected semseg, depth, edge, got 'semseg, depth, scene'"):
        altered(trained, tmp_path / "run", ("  scene: {}\n", "  edge: {}\n")).model()


def test_other_rank(trained: Path, tmp_path: Path) -> None:
    run = altered(trained, tmp_path / "run", ("    rank: 2\n", "    rank: 3\n"))
    with pytest.raises(
        CheckpointError, match=r"checkpoint does not fit the model: 0 tensors missing, 0 left over, [1-9]"
    ):
        run.model()


def test_no_adapter(trained: Path, tmp_path: Path) -> None:
    data = load_yaml(trained / "recipe.yaml")
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    (tmp_path / "run" / "recipe.yaml").write_text(
        json.dumps({**data, "model": {**data["model"], "adapter": None}})
    )
    with pytest.raises(CheckpointError, match=r"tensors missing, [1-9]"):
        Run(tmp_path / "run").model()


def test_what_the_weight_source_gives_back_is_left_out(small: Make) -> None:
    recipe = small()
    with pytest.warns(UserWarning, match="random weights"):
        model = recipe.model.build(recipe.task_set(), recipe.data.image_size)
    everything, none = checkpoint.weights_to_save(model, [])
    assert none == []
    assert set(everything) == set(model.state_dict())
    model.backbone.base_digest = "some"
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    some, left_out = checkpoint.weights_to_save(model, trained)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert set(left_out) == frozen
    assert set(some) == set(model.state_dict()) - frozen
    saved = checkpoint.Saved(some, {}, {"base_digest": "other", "left_out": left_out})
    with pytest.raises(CheckpointError, match="trained on other pretrained weights"):
        checkpoint.load_weights(model, saved, "here")
