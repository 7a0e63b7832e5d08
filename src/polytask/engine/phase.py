"""One phase of a run: its tasks, optimizer, schedule and loop."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from timm.scheduler.scheduler import Scheduler

from polytask import parallel
from polytask.data.base import train_loader
from polytask.engine import checkpoint
from polytask.engine.evaluator import Scores, headlines, plain_errors
from polytask.engine.log import RunLog
from polytask.engine.step import StepLog, StepSetup, train_step
from polytask.metrics.delta import delta_m
from polytask.phases import PhaseSpec
from polytask.progress import tell, track
from polytask.seeding import derive, seed_all
from polytask.tasks.base import TaskSet
from polytask.types import to_device

if TYPE_CHECKING:
    from polytask.engine.trainer import Trainer


@dataclass
class Position:
    """How far a run is: the next step to take, and what was found on the way (plain values only)."""

    phase: int = 0
    epoch: int = 0
    step: int = 0
    global_step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    first_scores: dict[str, float] = field(default_factory=dict)
    best_gain: float | None = None
    scores: Scores = field(default_factory=dict)


class PhaseRun:
    """One phase of a trainer: its tasks, optimizer, schedule and loop."""

    def __init__(self, trainer: Trainer, index: int, phase: PhaseSpec, log: RunLog | None) -> None:
        self.trainer, self.index, self.phase, self.log = trainer, index, phase, log
        self.recipe, self.model, self.position = trainer.recipe, trainer.model, trainer.position
        self.tasks: TaskSet = self.recipe.phase_tasks(phase)
        self.optim = phase.optim or self.recipe.optim
        self.losses: dict[str, float] = {}
        seed = self.recipe.seed
        self.seed = derive(seed, index) if index else seed  # no phase repeats another's augmentations

    def go(self) -> None:
        """Apply the actions, then train what is left of the phase."""
        saved = self.trainer.saved
        place = Position(**saved.state["position"]) if saved is not None else self.position
        starts_here = place.phase == self.index and place.epoch == place.step == 0
        if saved is not None and starts_here:  # the actions of this phase come on top
            self._restore(saved)
        self._act()
        if place.phase > self.index:  # done before; the last one means that the run was complete
            if saved is not None and self.index + 1 == len(self.recipe.phases):
                self._restore(saved)
            return
        self._prepare()
        if saved is not None and not starts_here:
            self._restore(saved)
            checkpoint.load_optimizer_state(self.optimizer, saved.state["optimizer"])
            if self.learner is not None:
                self.learner.load_state_dict(saved.state["meta"])
        self._loop()
        for action in self.phase.actions:
            action.leave(self.model)
        self.position.phase, self.position.epoch, self.position.step = self.index + 1, 0, 0
        self.trainer.save("last", self.optimizer)

    def _act(self) -> None:
        before = {name: p._version for name, p in self.model.named_parameters()}
        for action in self.phase.actions:
            action.apply(self.model)
        self.trainer.changed |= {
            name for name, p in self.model.named_parameters() if p.requires_grad or p._version != before[name]
        }

    def _prepare(self) -> None:
        data = self.recipe.data
        self.samples = data.open(self.recipe.run.train_split, self.tasks, train=True, seed=self.seed)
        self.learner = self.trainer.learner = self.trainer.build_learner(self.phase)
        extra = [*self.trainer.balancer.parameters(), *(self.learner.parameters() if self.learner else ())]
        self.optimizer = self.optim.optimizer(self.model, extra, data.batch_size)
        self.setup = StepSetup(
            tasks=self.tasks,
            balancer=self.trainer.balancer,
            optimizer=self.optimizer,
            objective=self.phase.objective,
            partition=self.model.partition(),
            clip_norm=self.optim.clip_norm,
            bf16=self.trainer.bf16,
            learner=self.learner,
        )
        self.steps_per_epoch = len(self._loader(0, 0))
        self.steps = self.phase.steps or (self.phase.epochs or 0) * self.steps_per_epoch
        self.scheduler: Scheduler | None = self.optim.scheduler(
            self.optimizer, self.steps, self.steps_per_epoch, data.batch_size
        )

    def _restore(self, saved: checkpoint.Saved) -> None:
        checkpoint.load_weights(self.model, saved, str(self.trainer.run))
        for name, value in saved.state["position"].items():
            setattr(self.position, name, value)
        self.trainer.balancer.load_state_dict(saved.state["balancer"])
        self.trainer.saved = None

    def _loader(self, epoch: int, start: int) -> Any:
        data = self.recipe.data
        return train_loader(
            self.samples,
            batch_size=data.batch_size,
            epoch=epoch,
            seed=self.seed,
            start=start,
            rank=parallel.rank(),
            world=parallel.world(),
            workers=data.workers,
        )

    def _loop(self) -> None:
        place = self.position
        self.model.train()
        while (done := place.epoch * self.steps_per_epoch + place.step) < self.steps:
            batches = self._loader(place.epoch, place.step)
            left = min(len(batches), self.steps - done)
            title = f"{self.phase.name} epoch {place.epoch + 1}/{-(-self.steps // self.steps_per_epoch)}"
            for number, batch in enumerate(track(plain_errors(batches), title, left, self._note)):
                self._step(batch)
                if number + 1 == left:
                    break
            place.epoch, place.step = place.epoch + 1, 0
            self.trainer.balancer.epoch_end()
            self._end_of_epoch(done + left >= self.steps)

    def _note(self) -> str:
        losses = self.losses.items()
        return f"loss {sum(loss for _, loss in losses):.3g}" if losses else ""

    def _step(self, batch: Any) -> None:
        place, started, computing = self.position, time.perf_counter(), time.process_time()
        done = place.epoch * self.steps_per_epoch + place.step
        if self.scheduler is not None:
            self.scheduler.step_update(max(done - 1, 0))  # the official loops set the rate after update k
        for action in self.phase.actions:
            action.before_step(self.model, done, self.steps, self.seed)
        seed_all(self.recipe.seed, place.global_step, parallel.rank())
        batch = to_device(batch, self.trainer.device)
        where = f"phase {self.phase.name!r}, step {place.global_step + 1}"
        result = train_step(self.model, batch, self.setup, where)
        self.losses = result.losses
        if place.global_step == 0 and len(self.tasks) > 1:
            tell(f"balancer {self.trainer.balancer.cost()}")
        place.step, place.global_step = place.step + 1, place.global_step + 1
        place.seconds += time.perf_counter() - started
        place.cpu_seconds += time.process_time() - computing
        if self.log is not None:
            self.log.write("step", place.global_step, self._line(result))
        every = self.recipe.run.checkpoint_every
        is_within = place.step < self.steps_per_epoch and done + 1 < self.steps
        if every and place.global_step % every == 0 and is_within:
            self.trainer.save("last", self.optimizer)

    def _line(self, result: StepLog) -> dict[str, Any]:
        line: dict[str, Any] = {"phase": self.phase.name, "epoch": self.position.epoch + 1}
        line |= {f"loss/{task}": value for task, value in result.losses.items()}
        line |= {f"weight/{task}": value for task, value in result.weights.items()}
        line |= {f"penalty/{name}": value for name, value in result.penalties.items()}
        line |= {f"stat/{name}": value for name, value in result.stats.items()}
        line |= {"gradient_norm": result.gradient_norm, "lr": self.optimizer.param_groups[0]["lr"]}
        if self.position.global_step == 1:
            line["balancer"] = self.trainer.balancer.cost()
        place = self.position
        return line | {"seconds": round(place.seconds, 3), "cpu_seconds": round(place.cpu_seconds, 3)}

    def _end_of_epoch(self, last: bool) -> None:
        place, every = self.position, self.recipe.run.eval_every
        better = False
        if last or (every and place.epoch % every == 0):
            place.scores = self.trainer.evaluate()
            better = self._is_better(place.scores)
            shown = ", ".join(
                f"{name} {self.trainer.tasks[name].headline} {value:.4g}"
                for name, value in headlines(place.scores, self.trainer.tasks).items()
            )
            tell(f"{self.phase.name} epoch {place.epoch}, step {place.global_step}: {shown}")
            if self.log is not None:
                flat = {f"{t}/{m}": v for t, scores in place.scores.items() for m, v in scores.items()}
                self.log.write(
                    "eval", place.global_step, {"phase": self.phase.name, "epoch": place.epoch, **flat}
                )
        if better:  # before `last`: a kill in between repeats this epoch and writes the same file again
            self.trainer.save("best", self.optimizer)
        if not last:
            self.trainer.save("last", self.optimizer)

    def _is_better(self, scores: Scores) -> bool:
        """By the average relative gain over the first evaluation, of tasks whose score there allows one."""
        place, tasks = self.position, self.trainer.tasks
        current = headlines(scores, tasks)
        if not place.first_scores:
            place.first_scores, place.best_gain = current, 0.0
            return True
        first = {
            name: value for name, value in place.first_scores.items() if math.isfinite(value) and value != 0
        }
        if not first:
            return True
        lower = [name for name in first if not tasks[name].higher_is_better]
        gain = delta_m({name: current[name] for name in first}, first, lower)
        if place.best_gain is not None and not gain > place.best_gain:
            return False
        place.best_gain = gain
        return True
