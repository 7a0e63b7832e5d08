"""A whole run as one typed object, and the checks that concern more than one part of it."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, create_model, field_validator, model_validator

from polytask import balancers as _balancers  # noqa: F401 - registers
from polytask import tasks as _tasks  # noqa: F401 - registers
from polytask.balancers.base import BalancerSpec
from polytask.balancers.scalar import FixedSpec
from polytask.config import Slot, Spec, decode, encode, json_schema, registered
from polytask.data import datasets as _datasets  # noqa: F401 - registers
from polytask.data.base import DatasetSpec
from polytask.errors import ConfigError, ConfigErrors, PolytaskError, did_you_mean
from polytask.files import load_yaml, override
from polytask.meta import meta_problems
from polytask.model import ModelSpec
from polytask.optim import OptimSpec
from polytask.phases import PhaseSpec
from polytask.tasks.base import Task, TaskName, TaskSet


class RunSpec(Spec):
    """How a run proceeds and what it leaves behind."""

    eval_every: int = Field(
        default=1, ge=0, description="epochs between evaluations; 0: at the end of each phase only"
    )
    checkpoint_every: int | None = Field(
        default=None, ge=1, description="steps between checkpoints; default: per epoch"
    )
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = Field(
        default="auto", description="auto (CUDA if there is one, else CPU), cpu, cuda, cuda:1, …"
    )
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
    imports: tuple[str, ...] = Field(
        default=(), description="Python modules to import first; they register parts of your own"
    )
    data: Annotated[DatasetSpec, Slot("data")]
    tasks: dict[TaskName, dict[str, Any]] = Field(
        description="names of the dataset's tasks, each with changed settings"
    )
    model: ModelSpec
    balancer: Annotated[BalancerSpec, Slot("balancer")] = FixedSpec()
    optim: OptimSpec = OptimSpec()
    phases: tuple[PhaseSpec, ...] = Field(min_length=1)
    run: RunSpec = RunSpec()

    @model_validator(mode="before")
    @classmethod
    def _inherit_optim(cls, data: Any) -> Any:
        """What a phase says about the optimizer changes the recipe's, and does not replace it."""
        if not isinstance(data, dict) or not isinstance(data.get("phases"), (list, tuple)):
            return data
        above = data.get("optim") or {}
        above = above.model_dump() if isinstance(above, OptimSpec) else above
        return {**data, "phases": [_with_optim(phase, above) for phase in data["phases"]]}

    @field_validator(
        "tasks", mode="before", json_schema_input_type=str | list[str] | dict[str, dict[str, Any] | None]
    )
    @classmethod
    def _names(cls, value: Any) -> Any:
        """A name or a list of names is short for a mapping without changes."""
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, (list, tuple, dict)):
            return value
        wrong = [name for name in value if not isinstance(name, str)]
        if wrong:
            raise ValueError(
                f"a list of names is needed, or a mapping of names to settings, got the name {wrong[0]!r}"
            )
        if isinstance(value, dict):
            return {k: {} if v is None else v for k, v in value.items()}
        repeated = sorted({name for name in value if value.count(name) > 1})
        if repeated:
            raise ValueError(f"named twice: {', '.join(repeated)}")
        return {name: {} for name in value}

    def task_set(self) -> TaskSet:
        """The dataset's tasks with this recipe's changes.

        Raises:
            ConfigErrors: empty, unknown or wrongly changed tasks.
        """
        if not self.tasks:
            raise ConfigErrors(
                [f"tasks: at least one task is needed; {self.data.type} has {', '.join(self.data.labels())}"]
            )
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
        known = self.data.labels().get(name)
        if known is None:
            hint = did_you_mean(name, self.data.labels())
            raise ConfigErrors([f"tasks.{name}: dataset {self.data.type!r} has no such task; {hint}"])
        kind, kinds = changes.get("type", known.type), registered("task")
        cls = kinds.get(kind) if isinstance(kind, str) else None
        if cls is None:
            raise ConfigErrors([f"tasks.{name}.type: {_unknown(str(kind), kinds, 'a kind of task')}"])
        below = encode(known) if cls is type(known) else {}
        return decode(cls, {**below, **changes}, at=f"tasks.{name}")  # type: ignore[return-value]

    def phase_tasks(self, phase: PhaseSpec) -> TaskSet:
        """The tasks a phase trains."""
        tasks = self.task_set()
        return tasks if phase.tasks is None else tasks.subset(phase.tasks, f"phases ({phase.name}).tasks")

    def check(self) -> None:
        """The checks that need more than one part; all problems at once.

        Raises:
            ConfigErrors: with one sentence per problem.
        """
        problems = _problems(self, frozenset(type(self).model_fields))
        if problems:
            raise ConfigErrors(problems)


def _with_optim(phase: Any, above: Any) -> Any:
    own = phase.get("optim") if isinstance(phase, dict) else None
    return (
        {**phase, "optim": {**above, **own}} if isinstance(own, dict) and isinstance(above, dict) else phase
    )


# --- checks across parts ---------------------------------------------------------------------------


def _problems(recipe: Recipe, good: frozenset[str]) -> list[str]:
    """Problems between the parts of a recipe, as far as they are ``good``, that is right in themselves."""
    problems: list[str] = []
    if {"data", "run"} <= good:
        for field, split in (("train_split", recipe.run.train_split), ("eval_split", recipe.run.eval_split)):
            if split not in recipe.data.split_names():
                unknown = _unknown(split, recipe.data.split_names(), f"a split of {recipe.data.type}")
                problems.append(f"run.{field}: {unknown}")
    if "model" in good and recipe.model.adapter is not None and recipe.model.freeze_backbone:
        problems.append("model.freeze_backbone: an adapter decides itself what trains, so leave this out")
    if {"model", "phases"} <= good:
        problems += _penalty_problems(recipe)
    if {"model", "phases", "balancer", "run"} <= good:
        wrong = meta_problems(recipe.model, recipe.balancer, recipe.run.parallel)
        metas = [index for index, phase in enumerate(recipe.phases) if phase.meta is not None]
        problems += [f"phases.{index}.meta: {problem}" for index in metas for problem in wrong]
    tasks = _collect(recipe.task_set, problems) if {"data", "tasks"} <= good else None
    if tasks is not None:
        if "phases" in good:
            for index, phase in enumerate(recipe.phases):
                problems += _phase_problems(phase, tasks, f"phases.{index}")
        if "balancer" in good:
            _collect(lambda: recipe.balancer.build(tasks), problems)
        if "model" in good:
            problems += _model_problems(recipe.model, tasks)
    return list(dict.fromkeys(problems))


def _unknown(name: str, known: Collection[str], what: str) -> str:
    return f"{name!r} is not {what}; {did_you_mean(name, known)}"


def _penalty_problems(recipe: Recipe) -> list[str]:
    emitted = sorted(_penalties(recipe.model))
    return [
        f"phases.{index}.objective.penalties.{name}: no part of the model emits it; "
        f"{did_you_mean(name, emitted)}"
        for index, phase in enumerate(recipe.phases)
        for name in phase.objective.penalties
        if name not in emitted
    ]


def _penalties(value: object) -> set[str]:
    """Names of the penalties that a spec and the specs inside it emit."""
    if isinstance(value, Spec):
        return set(value.PENALTIES).union(
            *(_penalties(getattr(value, name)) for name in type(value).model_fields)
        )
    return set().union(*map(_penalties, value.values())) if isinstance(value, dict) else set()


def _phase_problems(phase: PhaseSpec, tasks: TaskSet, where: str) -> list[str]:
    if phase.tasks is not None:
        if not phase.tasks:
            return [f"{where}.tasks: at least one task is needed; leave it out for all"]
        unknown = [name for name in phase.tasks if name not in tasks]
        if unknown:
            return [f"{where}.tasks: {_unknown(name, tasks, 'a task of this run')}" for name in unknown]
    mine = tasks if phase.tasks is None else phase.tasks
    losses = phase.objective.losses
    problems = [
        f"{where}.objective.losses.{name}: {_unknown(name, mine, 'a task of this phase')}"
        for name in losses or {}
        if name not in mine
    ]
    if losses == {} and not phase.objective.penalties:
        problems.append(f"{where}.objective: selects neither a loss nor a penalty, so nothing would train")
    return problems


def _model_problems(model: ModelSpec, tasks: TaskSet) -> list[str]:
    problems = [
        f"model.heads.{name}: {_unknown(name, tasks, 'a task of this run')}"
        for name in model.heads
        if name not in tasks
    ]
    for name, task in tasks.items():
        _collect(lambda name=name, task=task: model.head_of(name, task), problems)
    adapter = model.adapter
    if adapter is not None:
        _collect(lambda: adapter.plan(tuple(tasks)), problems)
    return problems


def _collect(check: Any, problems: list[str]) -> Any:
    try:
        return check()
    except ConfigErrors as error:
        problems += error.problems
    except PolytaskError as error:
        problems.append(str(error))
    return None


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, inherit, override, decode and check a recipe.

    Args:
        path: YAML file, or the name of a shipped recipe such as ``rooms/mtlora``.
        overrides: texts ``a.b.0.c=VALUE``.

    Raises:
        ConfigErrors: all problems at once, each with its path.
    """
    data = override(load_yaml(find_recipe(Path(path))), overrides)
    _import(data.get("imports"), str(path))
    try:
        recipe = decode(Recipe, data)
        recipe.check()
    except ConfigErrors as error:
        more = [problem for problem in _salvage(data, error.problems) if problem not in error.problems]
        raise ConfigErrors([*error.problems, *more]).below(str(path)) from None
    return recipe


def _import(modules: object, where: str) -> None:
    """Import what a recipe names; what is no list of names is left to the schema's own sentence."""
    for name in modules if isinstance(modules, (list, tuple)) else ():
        try:
            importlib.import_module(str(name))
        except ImportError as error:
            what = f"{where}: imports: cannot import ({error})"
            hint = "install the package, or name its folder in PYTHONPATH"
            raise ConfigError(what, got=name, hint=hint) from None


def _salvage(data: Mapping[str, Any], problems: Sequence[str]) -> list[str]:
    """Problems across those parts of a faulty recipe that are right in themselves."""
    bad = {problem.partition(":")[0].partition(".")[0] for problem in problems}
    holes: dict[str, Any] = {name: (Any, None) for name in Recipe.model_fields if name in bad}
    partial = create_model("PartOfRecipe", __base__=Recipe, **holes)
    try:
        recipe = decode(partial, {name: value for name, value in data.items() if str(name) not in bad})
    except ConfigErrors:  # a problem of the whole, which has been told
        return []
    return _problems(recipe, frozenset(Recipe.model_fields) - bad)


def recipe_schema() -> dict[str, Any]:
    """JSON schema of recipe files, for editors: has ``base`` and requires nothing, as it may be inherited."""
    schema = _without_required(json_schema(Recipe))
    inherited = {"type": "string", "description": "recipe file to start from, relative to this one"}
    return {**schema, "properties": {"base": inherited, **schema["properties"]}}


def _without_required(node: Any) -> Any:
    if isinstance(node, dict):
        return {
            k: _without_required(v) for k, v in node.items() if not (k == "required" and isinstance(v, list))
        }
    return [_without_required(item) for item in node] if isinstance(node, list) else node


def find_recipe(path: Path) -> Path:
    """The file itself, the recipe of a run folder, or the shipped recipe of that name.

    Raises:
        ConfigError: there is none; names the nearest shipped one.
    """
    if (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if path.is_file():
        return path
    name = str(path).removeprefix("recipes/").removesuffix(".yaml")
    shipped = recipe_folder() / f"{name}.yaml"
    if shipped.exists():
        return shipped
    raise ConfigError("no such recipe", where=str(path), hint=did_you_mean(name, shipped_recipes()))


def shipped_recipes() -> dict[str, Path]:
    """Names and files of the recipes that come along; those that only serve as ``base`` begin with ``_``."""
    folder = recipe_folder()
    return {p.relative_to(folder).with_suffix("").as_posix(): p for p in sorted(folder.rglob("[!_]*.yaml"))}


def recipe_folder() -> Path:
    """Where the shipped recipes are: in the package, or in the checkout it is installed from."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"
