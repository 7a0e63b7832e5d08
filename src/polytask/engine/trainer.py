"""The training loop: phases, epochs, steps, evaluations and checkpoints."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler

import polytask
from polytask import parallel
from polytask.config import dump_yaml, encode
from polytask.data.base import eval_loader, train_loader
from polytask.engine import checkpoint
from polytask.engine.evaluator import Scores, evaluate, headlines
from polytask.engine.log import RunLog, make_trackers, truncate
from polytask.engine.step import StepLog, train_step
from polytask.errors import CheckpointError, ConfigError, PolytaskError
from polytask.metrics.delta import delta_m
from polytask.model import MultiTaskModel
from polytask.phases import PhaseSpec
from polytask.progress import track
from polytask.recipe import Recipe
from polytask.seeding import seed_all
from polytask.tasks.base import TaskSet
from polytask.types import to_device


@dataclass
class Position:
    """How far a run is: the next step to take, and what was found on the way (plain values only)."""

    phase: int = 0
    epoch: int = 0
    step: int = 0
    global_step: int = 0
    seconds: float = 0.0
    first_scores: dict[str, float] = field(default_factory=dict)
    best_gain: float | None = None
    scores: Scores = field(default_factory=dict)


class Trainer:
    """Runs a recipe in a folder.

    Args:
        recipe: what to do.
        run: folder for the results; must not hold another run unless ``resume``.
        resume: continue from ``checkpoints/last`` (or start, if the run died before the first one).

    Raises:
        ConfigError: the folder holds a run already, or holds one of another recipe.
        CheckpointError: the checkpoint to resume from is damaged or does not fit.
    """

    def __init__(self, recipe: Recipe, run: Path, *, resume: bool = False) -> None:
        self.recipe, self.run = recipe, run
        self.device = choose_device(recipe.run.device)
        self.tasks = recipe.task_set()
        self.bf16 = recipe.run.precision == "bf16"
        self.saved = self._open_folder(resume)
        seed_all(recipe.seed)
        self.model: MultiTaskModel = recipe.model.build(self.tasks, recipe.data.image_size).to(self.device)
        self.balancer = recipe.balancer.build(self.tasks).to(self.device)
        if recipe.run.parallel == "fsdp":
            parallel.shard(self.model.backbone.net, [name for name, _, _ in self.model.backbone.blocks()])
        self.trained: set[str] = set()
        self.position = Position()
        data = recipe.data
        self.validation = data.open(recipe.run.eval_split, self.tasks, train=False)

    def fit(self) -> Scores:
        """Train through all phases; returns the last scores and writes ``scores.json``."""
        log = RunLog(self.run / "metrics.jsonl", self._trackers()) if parallel.rank() == 0 else None
        try:
            for index, phase in enumerate(self.recipe.phases):
                _PhaseRun(self, index, phase, log).go()
        finally:
            if log is not None:
                log.close()
        if parallel.rank() == 0:
            self._write_scores()
        return self.position.scores

    # --- folder ----------------------------------------------------------------------------------

    def _open_folder(self, resume: bool) -> checkpoint.Saved | None:
        text = dump_yaml(encode(self.recipe))
        file = self.run / "recipe.yaml"
        if resume and not file.exists():
            raise CheckpointError("there is no run to resume", where=str(self.run), hint="leave out --resume")
        if resume and file.read_text(encoding="utf-8") != text:
            raise ConfigError(
                "the run was started with another recipe", where=str(file),
                hint="resume with the same recipe, or use another --output",
            )  # fmt: skip
        if file.exists() and not resume:
            raise ConfigError("the folder holds a run already", where=str(self.run), hint="use --resume or another --output")
        if parallel.rank() == 0:
            self.run.mkdir(parents=True, exist_ok=True)
            write_text(file, text)
        found = (self.run / "checkpoints" / "last").exists()
        return checkpoint.read(self.run, "last") if resume and found else None

    def _trackers(self) -> list[Any]:
        return make_trackers(self.recipe.run.trackers, self.run, encode(self.recipe))

    def _write_scores(self) -> None:
        result = {
            "name": self.recipe.name,
            "scores": self.position.scores,
            "tasks": {
                name: {"headline": task.headline, "higher_is_better": task.higher_is_better}
                for name, task in self.tasks.items()
            },
            "split": self.recipe.run.eval_split,
            "samples": len(self.validation),
            "step": self.position.global_step,
            "train_seconds": round(self.position.seconds, 2),
            "seed": self.recipe.seed,
            "polytask": polytask.__version__,
            "torch": torch.__version__,
        }
        write_text(self.run / "scores.json", json.dumps(result, indent=1) + "\n")

    # --- checkpoints -----------------------------------------------------------------------------

    def save(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint of the present position (the first process writes, all take part)."""
        weights, left_out = checkpoint.weights_to_save(self.model, self.trained)
        state = {
            "position": dataclasses.asdict(self.position),
            "optimizer": checkpoint.optimizer_state(optimizer),
            "balancer": {k: v.cpu() for k, v in self.balancer.state_dict().items()},
        }
        manifest = {
            "step": self.position.global_step,
            "backbone": self.recipe.model.backbone.name,
            "base_digest": self.model.backbone.base_digest,
            "left_out": left_out,
            "tasks": list(self.tasks),
        }
        if parallel.rank() == 0:
            checkpoint.save(self.run, name, weights, state, manifest)

    def evaluate(self) -> Scores:
        """Scores on the evaluation split."""
        data = self.recipe.data
        batches = eval_loader(
            self.validation, batch_size=data.eval_batch_size, rank=parallel.rank(), world=parallel.world(), workers=data.workers
        )
        return evaluate(
            self.model, self.tasks, batches, bf16=self.bf16, max_batches=self.recipe.run.max_eval_batches
        )


class _PhaseRun:
    """One phase of a trainer: its tasks, optimizer, schedule and loop."""

    def __init__(self, trainer: Trainer, index: int, phase: PhaseSpec, log: RunLog | None) -> None:
        self.trainer, self.index, self.phase, self.log = trainer, index, phase, log
        self.recipe, self.model, self.position = trainer.recipe, trainer.model, trainer.position
        self.tasks: TaskSet = self.recipe.phase_tasks(phase)
        self.optim = phase.optim or self.recipe.optim

    def go(self) -> None:
        """Apply the actions, then train what is left of the phase."""
        for action in self.phase.actions:
            action.apply(self.model)
        self.trainer.trained |= {name for name, p in self.model.named_parameters() if p.requires_grad}
        saved = self.trainer.saved
        if saved is not None and saved.state["position"]["phase"] > self.index:
            if self.index + 1 == len(self.recipe.phases):  # the run was complete
                self._restore_model(saved)
            return
        data = self.recipe.data
        self.samples = data.open(self.recipe.run.train_split, self.tasks, train=True, seed=self.recipe.seed)
        self.optimizer = self.optim.optimizer(self.model, list(self.trainer.balancer.parameters()), data.batch_size)
        self.partition = self.model.partition()
        self.steps_per_epoch = len(self._loader(0, 0))
        self.steps = self.phase.steps or (self.phase.epochs or 0) * self.steps_per_epoch
        self.scheduler: Scheduler | None = self.optim.scheduler(
            self.optimizer, self.steps, self.steps_per_epoch, data.batch_size
        )
        if saved is not None:
            self._restore(saved)
        self._loop()
        self.position.phase, self.position.epoch, self.position.step = self.index + 1, 0, 0
        self.trainer.save("last", self.optimizer)

    def _restore_model(self, saved: checkpoint.Saved) -> None:
        checkpoint.load_weights(self.model, saved, str(self.trainer.run))
        for name, value in saved.state["position"].items():
            setattr(self.position, name, value)
        self.trainer.balancer.load_state_dict(saved.state["balancer"])
        self.trainer.saved = None

    def _restore(self, saved: checkpoint.Saved) -> None:
        self._restore_model(saved)
        if self.position.step or self.position.epoch:  # else the phase starts afresh
            checkpoint.load_optimizer_state(self.optimizer, saved.state["optimizer"])
        if self.log is not None:
            truncate(self.log.path, self.position.global_step)

    def _loader(self, epoch: int, start: int) -> Any:
        data = self.recipe.data
        return train_loader(
            self.samples, batch_size=data.batch_size, epoch=epoch, seed=self.recipe.seed, start=start,
            rank=parallel.rank(), world=parallel.world(), workers=data.workers,
        )  # fmt: skip

    def _loop(self) -> None:
        place = self.position
        self.model.train()
        while (done := place.epoch * self.steps_per_epoch + place.step) < self.steps:
            batches = self._loader(place.epoch, place.step)
            left = min(len(batches), self.steps - done)
            title = f"{self.phase.name} epoch {place.epoch + 1}/{-(-self.steps // self.steps_per_epoch)}"
            for number, batch in enumerate(track(batches, title, left)):
                self._step(batch)
                if number + 1 == left:
                    break
            place.epoch, place.step = place.epoch + 1, 0
            self._end_of_epoch(done + left >= self.steps)

    def _step(self, batch: Any) -> None:
        place, started = self.position, time.perf_counter()
        done = place.epoch * self.steps_per_epoch + place.step
        if self.scheduler is not None:
            self.scheduler.step_update(max(done - 1, 0))  # the official loops set the rate after update k
        seed_all(self.recipe.seed, place.global_step, parallel.rank())
        result = train_step(
            self.model, self.tasks, to_device(batch, self.trainer.device), self.trainer.balancer, self.optimizer,
            self.phase.objective, partition=self.partition, clip_norm=self.optim.clip_norm, bf16=self.trainer.bf16,
            where=f"phase {self.phase.name!r}, step {place.global_step + 1}",
        )  # fmt: skip
        place.step, place.global_step = place.step + 1, place.global_step + 1
        place.seconds += time.perf_counter() - started
        if self.log is not None:
            self.log.write("step", place.global_step, self._line(result))
        every = self.recipe.run.checkpoint_every
        if every and place.global_step % every == 0 and place.step < self.steps_per_epoch:
            self.trainer.save("last", self.optimizer)

    def _line(self, result: StepLog) -> dict[str, Any]:
        line: dict[str, Any] = {"phase": self.phase.name, "epoch": self.position.epoch + 1}
        line |= {f"loss/{task}": value for task, value in result.losses.items()}
        line |= {f"weight/{task}": value for task, value in result.weights.items()}
        line |= {f"penalty/{name}": value for name, value in result.penalties.items()}
        line |= {f"stat/{name}": value for name, value in result.stats.items()}
        line |= {"gradient_norm": result.gradient_norm, "lr": self.optimizer.param_groups[0]["lr"]}
        return line | {"seconds": round(self.position.seconds, 3)}

    def _end_of_epoch(self, last: bool) -> None:
        place, every = self.position, self.recipe.run.eval_every
        better = False
        if last or (every and place.epoch % every == 0):
            place.scores = self.trainer.evaluate()
            better = self._is_better(place.scores)
            if self.log is not None:
                flat = {f"{t}/{m}": v for t, scores in place.scores.items() for m, v in scores.items()}
                self.log.write("eval", place.global_step, {"phase": self.phase.name, "epoch": place.epoch, **flat})
        if better:  # before `last`: a kill in between repeats this epoch and writes the same file again
            self.trainer.save("best", self.optimizer)
        if not last:
            self.trainer.save("last", self.optimizer)

    def _is_better(self, scores: Scores) -> bool:
        """By the average relative gain over the run's first evaluation."""
        place, tasks = self.position, self.trainer.tasks
        current = headlines(scores, tasks)
        if not place.first_scores:
            place.first_scores, place.best_gain = current, 0.0
            return True
        try:
            gain = delta_m(current, place.first_scores, {n: not t.higher_is_better for n, t in tasks.items()})
        except PolytaskError:  # a first score of zero or without valid labels gives no relative gain
            return True
        if place.best_gain is not None and gain <= place.best_gain:
            return False
        place.best_gain = gain
        return True


def choose_device(name: str) -> torch.device:
    """The device of this process; ``auto`` takes CUDA if there is any.

    Raises:
        ConfigError: a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"no such device ({error})", where="run.device", got=name) from None
    if device.type == "cuda":
        index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", "0"))
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise ConfigError("no such CUDA device", where="run.device", got=name, hint="use run.device=cpu")
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return device


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


