"""Run folders read back: recipe, scores, log, cost and trained model."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from polytask.config import decode
from polytask.data.base import eval_loader
from polytask.engine import checkpoint as checkpoint_files
from polytask.engine.evaluator import Scores, evaluate
from polytask.engine.log import read_log
from polytask.errors import CheckpointError, PolytaskWarning, TaskMismatchError
from polytask.files import load_yaml, override
from polytask.model import ModelSpec, MultiTaskModel
from polytask.parallel import choose_device
from polytask.recipe import Recipe
from polytask.tasks.base import TaskSet


def empty_model(recipe: Recipe) -> MultiTaskModel:
    """The model of a recipe with random weights, which are about to be replaced."""
    bare = recipe.model.backbone.model_copy(update={"pretrained": False, "weights": None})
    return _quietly(recipe.model.model_copy(update={"backbone": bare}), recipe)


def _quietly(spec: ModelSpec, recipe: Recipe) -> MultiTaskModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PolytaskWarning)  # about random weights
        return spec.build(recipe.task_set(), recipe.data.image_size)


@dataclass(frozen=True)
class Run:
    """What ``polytask train`` left in a folder."""

    path: Path
    overrides: tuple[str, ...] = ()
    """Changes of the recipe, ``a.b=VALUE``, such as settings of the metrics."""

    @cached_property
    def recipe(self) -> Recipe:
        """The resolved recipe.

        Raises:
            CheckpointError: the folder holds no run.
        """
        file = self.path / "recipe.yaml"
        if not file.exists():
            raise CheckpointError("this is no run folder (it has no recipe.yaml)", where=str(self.path))
        return decode(Recipe, override(load_yaml(file), self.overrides), source=str(file))

    @cached_property
    def tasks(self) -> TaskSet:
        """Tasks of the run."""
        return self.recipe.task_set()

    @cached_property
    def scores(self) -> dict[str, Any]:
        """Contents of ``scores.json``; NaN where nothing valid was seen.

        Raises:
            CheckpointError: the run has not finished.
        """
        content = self._json("scores.json")
        scores = content.get("scores", {})
        content["scores"] = {
            task: {metric: math.nan if value is None else value for metric, value in of_task.items()}
            for task, of_task in scores.items()
        }
        return content

    @cached_property
    def cost(self) -> dict[str, Any]:
        """Contents of ``cost.json``; raises as ``scores``."""
        return self._json("cost.json")

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """Lines of ``metrics.jsonl``."""
        return read_log(self.path / "metrics.jsonl")

    @cached_property
    def step_seconds(self) -> float | None:
        """Mean time of a training step: CPU seconds of all threads if trained on CPU, else seconds passed.

        The first step, which warms up, does not count; None with fewer than two.
        """
        steps = [line for line in self.log if line["kind"] == "step"]
        on_cpu = self.cost["device"] == "cpu" and all("cpu_seconds" in line for line in steps)
        key = "cpu_seconds" if on_cpu else "seconds"
        return (steps[-1][key] - steps[0][key]) / (len(steps) - 1) if len(steps) > 1 else None

    @cached_property
    def conflict(self) -> float | None:
        """Part of the pairs of tasks whose gradients opposed each other: mean of the steps that compared."""
        found = [line["stat/conflict"] for line in self.log if "stat/conflict" in line]
        return sum(found) / len(found) if found else None

    @property
    def balancer(self) -> str:
        """What a step of the balancer costs, in one line."""
        return next((line["balancer"] for line in self.log if "balancer" in line), "-")

    def _json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        try:
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{name} cannot be read ({error})", where=str(self.path),
                hint="finish the run first: polytask train RECIPE --resume",
            ) from None  # fmt: skip
        return content

    def model(self, which: str = "last", device: torch.device | None = None) -> MultiTaskModel:
        """The trained model, in eval mode.

        Args:
            which: checkpoint name, ``last`` or ``best``.
            device: where to put it; default CUDA if there is one, else CPU.

        Raises:
            CheckpointError: missing, damaged or not fitting.
            TaskMismatchError: the checkpoint was trained for other tasks than the run's recipe names.
        """
        saved = checkpoint_files.read(self.path, which)
        trained = saved.manifest["tasks"]
        if list(self.tasks) != trained:
            raise TaskMismatchError(
                "checkpoint and recipe have different tasks", where=str(self.path),
                got=", ".join(trained), expected=", ".join(self.tasks),
            )  # fmt: skip
        if saved.manifest["left_out"]:
            model = _quietly(self.recipe.model, self.recipe)
        else:  # the checkpoint has it all
            model = empty_model(self.recipe)
        checkpoint_files.load_weights(model, saved, str(self.path))
        return model.to(device or choose_device("auto")).eval()


def score(run: Run, *, checkpoint: str = "last", split: str | None = None, final: bool = True) -> Scores:
    """Scores of a trained run on a split (default: the one evaluated in training).

    With ``final`` there are those that take long too, which training leaves out.

    Raises:
        ConfigError: unknown split; CheckpointError and data errors as their parts raise them.
    """
    data = run.recipe.data
    name = split or run.recipe.run.eval_split
    device = choose_device(run.recipe.run.device)
    samples = data.open(name, run.tasks, train=False)
    batches = eval_loader(samples, batch_size=data.eval_batch_size, workers=data.workers)
    bf16 = run.recipe.run.precision == "bf16"
    model, description = run.model(checkpoint, device), f"evaluate {name}"
    return evaluate(model, run.tasks, batches, bf16=bf16, final=final, description=description)
