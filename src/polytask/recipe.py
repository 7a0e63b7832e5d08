"""A whole run as one typed object, and the checks that concern more than one part of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from polytask import balancers as _balancers  # noqa: F401 - registers
from polytask.data import datasets as _datasets  # noqa: F401 - registers
from polytask import tasks as _tasks  # noqa: F401 - registers
from polytask.balancers.base import BalancerSpec
from polytask.balancers.scalar import FixedSpec
from polytask.config import Slot, Spec, decode, encode, load_yaml, override, registered
from polytask.data.base import DatasetSpec
from polytask.optim import OptimSpec
from polytask.errors import ConfigError, ConfigErrors, PolytaskError, did_you_mean
from polytask.model import ModelSpec
from polytask.phases import PhaseSpec
from polytask.tasks.base import Task, TaskSet


class RunSpec(Spec):
    """How a run proceeds and what it leaves behind."""

    eval_every: int = Field(default=1, ge=0, description="epochs between evaluations; 0: at the end of each phase only")
    checkpoint_every: int | None = Field(default=None, ge=1, description="steps between checkpoints; default: per epoch")
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = Field(default="auto", description="auto (CUDA if there is one, else CPU), cpu, cuda, cuda:1, …")
    parallel: Literal["replicated", "fsdp"] = Field(default="replicated", description="of several processes")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    train_split: str = "train"
    eval_split: str = Field(default="val", description="scored during training")
    max_eval_batches: int | None = Field(default=None, ge=1, description="evaluate on the first batches only")


class Recipe(Spec):
    """Everything that determines a run."""

    schema_version: Literal[1] = 1
    name: str = "run"
    seed: int = Field(default=0, ge=0)
    data: Annotated[DatasetSpec, Slot("data")]
    tasks: dict[str, dict[str, Any]] = Field(description="names of the dataset's tasks, each with changed settings")
    model: ModelSpec
    balancer: Annotated[BalancerSpec, Slot("balancer")] = FixedSpec()
    optim: OptimSpec = OptimSpec()
    phases: tuple[PhaseSpec, ...] = Field(min_length=1)
    run: RunSpec = RunSpec()

    @field_validator("tasks", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """A list of names is short for a mapping without changes."""
        if isinstance(value, list):
            repeated = sorted({str(name) for name in value if value.count(name) > 1})
            if repeated:
                raise ValueError(f"named twice: {', '.join(repeated)}")
            return {name: {} for name in value}
        return {k: {} if v is None else v for k, v in value.items()} if isinstance(value, dict) else value

    def task_set(self) -> TaskSet:
        """The dataset's tasks with this recipe's changes.

        Raises:
            ConfigErrors: empty, unknown or wrongly changed tasks.
        """
        if not self.tasks:
            raise ConfigErrors([f"tasks: at least one task is needed; {self.data.type} has {', '.join(self.data.TASKS)}"])
        built: dict[str, Task] = {}
        problems: list[str] = []
        for name, changes in self.tasks.items():
            try:
                built[name] = self._task(name, changes)
            except ConfigErrors as error:
                problems += error.problems
        if problems:
            raise ConfigErrors(problems)
        return TaskSet(built)

    def _task(self, name: str, changes: dict[str, Any]) -> Task:
        known = self.data.TASKS.get(name)
        if known is None:
            hint = did_you_mean(name, self.data.TASKS)
            raise ConfigErrors([f"tasks.{name}: dataset {self.data.type!r} has no such task; {hint}"])
        cls = registered("task").get(changes.get("type", known.type), type(known))
        below = encode(known) if cls is type(known) else {}
        return decode(cls, {**below, **changes}, source=f"tasks.{name}")  # type: ignore[return-value]

    def phase_tasks(self, phase: PhaseSpec) -> TaskSet:
        """The tasks a phase trains."""
        tasks = self.task_set()
        return tasks if phase.tasks is None else tasks.subset(phase.tasks, f"phases ({phase.name}).tasks")

    def check(self) -> None:
        """The checks that need more than one part; all problems at once.

        Raises:
            ConfigErrors: with one sentence per problem.
        """
        problems: list[str] = []
        tasks = _collect(self.task_set, problems)
        if tasks is not None:
            for phase in self.phases:
                _collect(lambda phase=phase: self.phase_tasks(phase), problems)
                for name in phase.objective.losses or {}:
                    if name not in tasks:
                        problems.append(f"phases.objective.losses.{name}: not a task of this run; {did_you_mean(name, tasks)}")
            _collect(lambda: self.balancer.build(tasks), problems)
            for name in self.model.heads:
                if name not in tasks:
                    problems.append(f"model.heads.{name}: not a task of this run; {did_you_mean(name, tasks)}")
            for name, task in tasks.items():
                _collect(lambda name=name, task=task: self.model.head_of(name, task), problems)
            if self.model.adapter is not None:
                _collect(lambda: self.model.adapter.plan(tuple(tasks)), problems)  # type: ignore[union-attr]
        for split in (self.run.train_split, self.run.eval_split):
            _collect(lambda split=split: self.data.check_split(split), problems)
        if problems:
            raise ConfigErrors(list(dict.fromkeys(problems)))


def _collect(check: Any, problems: list[str]) -> Any:
    try:
        return check()
    except ConfigErrors as error:
        problems += error.problems
    except PolytaskError as error:
        problems.append(str(error))
    return None


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, inherit, override, decode and check a recipe.

    Args:
        path: YAML file, or the name of a shipped recipe such as ``rooms/mtlora``.
        overrides: texts ``a.b.0.c=VALUE``.

    Raises:
        ConfigErrors: all problems at once, each with its path.
    """
    data = override(load_yaml(find_recipe(path)), overrides)
    recipe = decode(Recipe, data, source=str(path))
    try:
        recipe.check()
    except ConfigErrors as error:
        raise ConfigErrors([f"{path}: {problem}" for problem in error.problems]) from None
    return recipe


def find_recipe(path: Path) -> Path:
    """The file itself, or the shipped recipe of that name."""
    if path.exists():
        return path
    name = str(path).removeprefix("recipes/").removesuffix(".yaml")
    shipped = recipe_folder() / f"{name}.yaml"
    if shipped.exists():
        return shipped
    known = [str(p.relative_to(recipe_folder()).with_suffix("")) for p in sorted(recipe_folder().rglob("*.yaml"))]
    raise ConfigError("no such recipe", where=str(path), hint=did_you_mean(name, known))


def recipe_folder() -> Path:
    """Where the shipped recipes are: in the package, or in the checkout it is installed from."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"
