"""The loop: phases, actions, evaluations, the best checkpoint, and what is refused before it starts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from polytask.engine import checkpoint, launch, phase
from polytask.engine.trainer import Trainer, check_folder
from polytask.errors import (
    CheckpointError,
    ConfigError,
    DatasetNotFoundError,
    NonFiniteLossError,
    PolytaskWarning,
)
from polytask.parallel import choose_device
from polytask.runs import Run
from tests.conftest import Make, train_quietly

pytestmark = pytest.mark.filterwarnings("ignore::polytask.errors.PolytaskWarning")
Run_ = Callable[..., Path]


class Stop(Exception):
    """Ends a run as a kill would."""


class NoCost:
    """Measuring what a model costs takes longer than these runs."""

    def as_dict(self) -> dict[str, Any]:
        return {}


@pytest.fixture
def run(small: Make, rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run_:
    """Trains the small recipe, changed, and returns the folder."""
    monkeypatch.setattr(launch, "_measure", lambda _: NoCost())

    def train(*changes: str, name: str = "run", resume: bool = False) -> Path:
        train_quietly(small(*changes), tmp_path / name, resume=resume)
        return tmp_path / name

    return train


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Let a run die before its n-th step from now; None to let runs live."""
    original = phase.train_step

    def at(number: int | None) -> None:
        calls = 0

        def instead(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                raise Stop
            return original(*arguments, **options)

        monkeypatch.setattr(phase, "train_step", instead)

    return at


def lines(folder: Path, kind: str = "step") -> list[dict[str, Any]]:
    return [line for line in Run(folder).log if line["kind"] == kind]


def test_what_a_run_leaves_behind(trained: Path) -> None:
    assert sorted(path.name for path in trained.iterdir()) == [
        "checkpoints", "cost.json", "metrics.jsonl", "recipe.yaml", "scores.json",
    ]  # fmt: skip
    scores = json.loads((trained / "scores.json").read_text(), parse_constant=pytest.fail)
    assert (scores["name"], scores["split"], scores["samples"], scores["step"]) == ("small", "val", 8, 2)
    assert scores["tasks"]["depth"] == {"headline": "rmse", "higher_is_better": False}
    step = lines(trained)[0]
    assert {"loss/semseg", "weight/depth", "gradient_norm", "lr", "phase", "epoch", "seconds"} <= set(step)
    manifest = checkpoint.read(trained).manifest
    assert manifest["tasks"] == ["semseg", "depth", "scene"]
    assert checkpoint.read(trained).state["position"]["phase"] == 1


def test_frozen_base_does_not_move(run: Run_, small: Make) -> None:
    folder = run("phases.0.steps=3")
    trainer_model = Run(folder).model()
    torch.manual_seed(0)
    fresh = Trainer(small("phases.0.steps=3"), folder.with_name("other")).model
    state = fresh.state_dict()
    frozen = {name for name, p in fresh.named_parameters() if not p.requires_grad}
    assert len(frozen) > 10
    for name, value in trainer_model.state_dict().items():
        if name in frozen:
            assert torch.equal(value, state[name]), name


def test_same_seed_same_run_other_seed_another(run: Run_) -> None:
    a, b, c = run(), run(name="b"), run("seed=1", name="c")
    assert [line["loss/depth"] for line in lines(a)] == [line["loss/depth"] for line in lines(b)]
    assert lines(a)[0]["loss/depth"] != lines(c)[0]["loss/depth"]


def test_length_in_epochs_and_steps(run: Run_) -> None:
    folder = run(
        "data.batch_size=32", "phases=[{name: a, epochs: 2}, {name: b, steps: 3}]", "run.eval_every=1"
    )
    assert [(line["phase"], line["epoch"]) for line in lines(folder)] == [
        ("a", 1), ("a", 1), ("a", 2), ("a", 2), ("b", 1), ("b", 1), ("b", 2),
    ]  # fmt: skip
    assert [(line["phase"], line["step"]) for line in lines(folder, "eval")] == [
        ("a", 2), ("a", 4), ("b", 6), ("b", 7),
    ]  # fmt: skip


@pytest.mark.parametrize(("every", "steps"), [(0, [6]), (2, [4, 6]), (1, [2, 4, 6])])
def test_evaluations(run: Run_, every: int, steps: list[int]) -> None:
    folder = run("data.batch_size=32", "phases=[{epochs: 3}]", f"run.eval_every={every}")
    assert [line["step"] for line in lines(folder, "eval")] == steps


def test_phase_trains_its_tasks_with_its_optimizer(run: Run_) -> None:
    second = "{name: b, steps: 1, tasks: [depth], optim: {type: sgd, lr: 0.5, schedule: constant}}"
    folder = run(f"phases=[{{steps: 1}}, {second}]")
    first, last = lines(folder)
    assert {key for key in first if key.startswith("loss/")} == {"loss/semseg", "loss/depth", "loss/scene"}
    assert {key for key in last if key.startswith("loss/")} == {"loss/depth"}
    assert (first["lr"], last["lr"]) == (2e-3, 0.5)
    assert set(Run(folder).scores["scores"]) == {"semseg", "depth", "scene"}


def test_phases_see_other_augmentations(run: Run_, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    original = phase.train_step

    def noted(model: Any, batch: Any, *arguments: Any) -> Any:
        seen.append(batch["image"].clone())
        return original(model, batch, *arguments)

    monkeypatch.setattr(phase, "train_step", noted)
    run("phases=[{steps: 1}, {steps: 1}]")
    assert not torch.equal(*seen)


def test_actions_freeze_and_unfreeze(run: Run_) -> None:
    freeze = "[{type: freeze, patterns: [neck.*, '*.shared.*']}]"
    unfreeze = "[{type: unfreeze, patterns: [neck.*]}]"
    folder = run(f"phases=[{{steps: 1, actions: {freeze}}}, {{steps: 1, actions: {unfreeze}}}]", name="both")
    one = run(f"phases=[{{steps: 1, actions: {freeze}}}]", name="one")
    early, late = checkpoint.read(one).weights, checkpoint.read(folder).weights
    moved = {name for name, value in late.items() if not torch.equal(value, early[name])}
    assert any(name.startswith("neck.") for name in moved)
    assert not any(".shared." in name for name in moved)


def test_actions_are_checked_before_the_first_step(run: Run_, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'nekc\.\*' matches no parameter; did you mean 'neck\.\*'"):
        run("phases=[{steps: 1}, {steps: 1, actions: [{type: freeze, patterns: [nekc.*]}]}]")
    with pytest.raises(CheckpointError, match="cannot be read"):
        run("phases=[{steps: 1}, {steps: 1, actions: [{type: load, path: nowhere.safetensors}]}]")
    assert not (tmp_path / "run").exists()


def test_nothing_left_to_train(run: Run_) -> None:
    with pytest.raises(ConfigError, match="no parameter of the model trains"):
        run("phases=[{steps: 1, actions: [{type: freeze, patterns: ['*']}]}]")


def second_phase(tmp_path: Path) -> str:
    """Phases of which the second loads a file into a part that the first trains, and freezes another."""
    file = tmp_path / "part.safetensors"
    save_file({"heads.depth.3.bias": torch.full((1,), 3.0)}, file)
    actions = f"[{{type: load, path: {file}}}, {{type: freeze, patterns: [neck.*]}}]"
    return f"phases=[{{steps: 2}}, {{steps: 3, actions: {actions}}}]"


@pytest.mark.parametrize("step", [3, 4])  # the first step of the second phase, and one within it
def test_resume_in_the_second_phase(run: Run_, stop: Any, tmp_path: Path, step: int) -> None:
    changes = (second_phase(tmp_path), "run.checkpoint_every=1", "optim.lr=1e-4")
    whole = run(*changes, name="whole")
    stop(step)
    with pytest.raises(Stop):
        run(*changes)
    stop(None)
    folder = run(*changes, resume=True)
    mine, theirs = checkpoint.read(folder), checkpoint.read(whole)
    assert all(torch.equal(mine.weights[name], value) for name, value in theirs.weights.items())
    assert float(mine.weights["heads.depth.3.bias"]) == pytest.approx(3, abs=0.01)
    assert [line["loss/depth"] for line in lines(folder)] == [line["loss/depth"] for line in lines(whole)]


def test_phase_that_ends_where_a_checkpoint_was_due(run: Run_) -> None:
    folder = run("phases.0.steps=4", "run.checkpoint_every=2")
    assert checkpoint.read(folder).state["position"]["phase"] == 1
    again = run("phases.0.steps=4", "run.checkpoint_every=2", resume=True)
    assert Run(again).scores["scores"]["depth"]["rmse"] > 0
    assert len(lines(again, "eval")) == 1


def test_run_that_died_before_its_first_checkpoint(run: Run_, stop: Any) -> None:
    whole = run(name="whole")
    stop(2)
    with pytest.raises(Stop):
        run()
    stop(None)
    folder = run(resume=True)
    assert [line["loss/depth"] for line in lines(folder)] == [line["loss/depth"] for line in lines(whole)]


def test_frozen_weights_that_an_action_loaded_are_kept(
    run: Run_, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = checkpoint.read(run(name="fresh")).weights
    name = next(n for n in fresh if n.endswith("qkv.base.bias"))
    file = tmp_path / "frozen.safetensors"
    save_file({name: torch.full_like(fresh[name], 0.125)}, file)
    monkeypatch.setattr("polytask.backbones.timm.BackboneSpec.build", _with_source)
    folder = run(f"phases=[{{steps: 1, actions: [{{type: load, path: {file}}}]}}]")
    saved = checkpoint.read(folder)
    assert len(saved.manifest["left_out"]) > 10
    assert name not in saved.manifest["left_out"]
    assert (Run(folder).model().state_dict()[name] == 0.125).all()


def _with_source(spec: Any, size: tuple[int, int]) -> Any:
    """A backbone that seems to have come from published weights."""
    from polytask.backbones.timm import Backbone, create

    torch.manual_seed(5)
    backbone = Backbone(create(spec, size), spec, size)
    backbone.base_digest = "published"
    return backbone


def test_best_is_by_average_gain_in_the_right_direction(small: Make, rooms: Path, tmp_path: Path) -> None:
    trainer = Trainer(small("tasks=[semseg, depth]"), tmp_path / "run")
    one = phase.PhaseRun(trainer, 0, trainer.recipe.phases[0], None)

    def better(semseg: float, depth: float) -> bool:
        return one._is_better({"semseg": {"mIoU": semseg}, "depth": {"rmse": depth}})

    assert better(10, 4)
    assert not better(10, 4)
    assert better(11, 4)  # higher is better
    assert not better(11, 5)  # lower is better
    assert better(11, 3)
    assert trainer.position.best_gain == pytest.approx((10 + 25) / 2)
    assert not better(12, 3.5)
    assert not better(math.nan, 1)  # no score is no gain
    assert better(14, 3)


def test_best_when_a_first_score_is_zero(small: Make, rooms: Path, tmp_path: Path) -> None:
    trainer = Trainer(small("tasks=[semseg, depth]"), tmp_path / "run")
    one = phase.PhaseRun(trainer, 0, trainer.recipe.phases[0], None)
    for depth, better in ((4.0, True), (5.0, False), (3.0, True), (3.5, False)):
        assert (
            one._is_better({"semseg": {"mIoU": depth if depth != 4 else 0.0}, "depth": {"rmse": depth}})
            is better
        )


def test_folder_that_holds_a_run(run: Run_, small: Make, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds a run already"):
        check_folder(trained, small(), resume=False)
    with pytest.raises(ConfigError, match=r"other values of optim\.lr"):
        check_folder(trained, small("optim.lr=1"), resume=True)
    check_folder(trained, small(), resume=True)
    with pytest.raises(CheckpointError, match="no run to resume"):
        check_folder(tmp_path / "x", small(), resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--output: folder cannot be made"):
        run(name="file")


def test_refused_run_leaves_no_folder(run: Run_, small: Make, tmp_path: Path) -> None:
    for change in ("run.device=cuda:77", "run.device=fpga", "run.parallel=fsdp"):
        with pytest.raises(ConfigError):
            run(change)
    data = f"data={{type: pascal_context, root: {tmp_path / 'nowhere'}, image_size: 32}}"
    with pytest.raises(DatasetNotFoundError):
        run(data, "tasks=[semseg]")
    assert not (tmp_path / "run").exists()


def test_divergence_keeps_the_last_checkpoint(
    run: Run_, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changes = ("run.checkpoint_every=1", "phases.0.steps=6")
    original, calls = phase.to_device, []

    def spoil(batch: Any, device: Any) -> Any:
        calls.append(batch["id"])
        moved = original(batch, device)
        return {**moved, "depth": moved["depth"] * math.inf} if len(calls) == 4 else moved

    monkeypatch.setattr(phase, "to_device", spoil)
    with pytest.raises(NonFiniteLossError) as caught:
        run(*changes)
    for part in ("task 'depth'", "phase 'train', step 4", *calls[3]):
        assert part in str(caught.value)
    folder = tmp_path / "run"
    assert checkpoint.read(folder).manifest["step"] == 3
    Run(folder).model()
    monkeypatch.setattr(phase, "to_device", original)
    assert Run(run(*changes, resume=True)).scores["step"] == 6


def test_bf16(run: Run_) -> None:
    folder = run("run.precision=bf16")
    assert all(
        value.dtype == torch.float32
        for value in checkpoint.read(folder).weights.values()
        if value.is_floating_point()
    )
    assert lines(folder)[0]["loss/depth"] > 0


def test_workers_change_nothing(run: Run_) -> None:
    a, b = run(), run("data.workers=1", name="b")
    assert [line["loss/depth"] for line in lines(a)] == [line["loss/depth"] for line in lines(b)]


def test_random_frozen_part_is_told(small: Make, rooms: Path, tmp_path: Path) -> None:
    with pytest.warns(PolytaskWarning, match="the frozen part has random weights"):
        Trainer(small(), tmp_path / "run")


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ConfigError, match="no such device"):
        choose_device("abacus")
    with pytest.raises(ConfigError, match="no such CUDA device"):
        choose_device("cuda:99")


def test_training_on_what_is_evaluated_is_told(small: Make, tmp_path: Path) -> None:
    recipe = small("data.pipeline=plain", "phases.0.steps=1")
    original = type(recipe.data).records
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(recipe.data), "records", lambda spec, _: original(spec, "val"))
        with pytest.warns(PolytaskWarning, match="32 of 32 samples of run.eval_split 'val' are trained"):
            Trainer(recipe, tmp_path / "run")
