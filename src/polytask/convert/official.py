"""From files of an official code to recipes and run folders, and back: what all systems share."""

from __future__ import annotations

import importlib
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polytask.config import decode, encode
from polytask.convert import SYSTEMS
from polytask.engine import checkpoint
from polytask.engine.phase import Position
from polytask.errors import CheckpointError, ConfigError, PolytaskWarning, TaskMismatchError, did_you_mean
from polytask.files import dump_yaml, make_folder, merge, new_folder, override, parse_yaml, write_text
from polytask.model import MultiTaskModel
from polytask.pickles import read_checkpoint, state_dict
from polytask.recipe import Recipe, load_recipe
from polytask.runs import Run, empty_model

State = Mapping[str, Tensor]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Draft:
    """A recipe as plain data, and what a person should know about how it came about."""

    recipe: dict[str, Any]
    notes: tuple[str, ...] = ()
    asked: Mapping[str, str] = field(default_factory=dict)
    """Path of a setting that a person has to state -> why, as a clause."""


class System(ABC):
    """What is particular to the files of one official code."""

    @abstractmethod
    def from_settings(self, settings: Settings, tasks: Sequence[str] | None, where: str) -> Draft:
        """The recipe of official settings alone; ``tasks`` are official names, None for the usual ones."""

    @abstractmethod
    def from_state(self, state: State, settings: Settings | None, where: str, *, embedded: bool) -> Draft:
        """The recipe of a checkpoint, as far as its settings (its own, if ``embedded``) or shapes tell."""

    @abstractmethod
    def fit(self, recipe: Recipe, state: State) -> Recipe:
        """The recipe with what else this checkpoint needs; warns where it changes something."""

    @abstractmethod
    def convert(self, state: State, model: MultiTaskModel) -> dict[str, Tensor]:
        """Official state dict -> a strict state dict of ``model``."""

    @abstractmethod
    def export(self, recipe: Recipe, model: MultiTaskModel) -> dict[str, Tensor]:
        """The official state dict of a model, with what the official code derives but saves."""


def find(system: str) -> System:
    """The system of that name; raises ConfigError if there is none."""
    if system not in SYSTEMS:
        raise ConfigError("no such system", got=system, hint=did_you_mean(system, SYSTEMS))
    known: System = importlib.import_module(SYSTEMS[system]).OFFICIAL
    return known


def load(system: str, file: Path, recipe: Recipe | Path | str) -> MultiTaskModel:
    """See ``polytask.convert.load_official``."""
    known = find(system)
    checked = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    state = state_dict(read_checkpoint(file), str(file))
    return _filled(known, known.fit(checked, state), state, file).eval()


def _filled(known: System, recipe: Recipe, state: State, file: Path) -> MultiTaskModel:
    model = empty_model(recipe)
    try:
        converted = known.convert(state, model)
    except CheckpointError as error:
        raise CheckpointError(error.what, where=str(file), hint=error.hint) from None
    except TaskMismatchError as error:
        raise TaskMismatchError(error.what, where=str(file), got=error.got, expected=error.expected) from None
    if wrong := [name for name, value in converted.items() if not value.isfinite().all()]:
        what = f"{len(wrong)} tensors hold values that are not finite, first {wrong[0]}"
        raise CheckpointError(what, where=str(file))
    model.load_state_dict(converted, strict=True)
    return model


def check_tasks(theirs: Collection[str], mine: Collection[str]) -> None:
    """Raises TaskMismatchError if a file's tasks (official names) are not those of the model."""
    if sorted(theirs) != sorted(mine):
        what = "the checkpoint has other tasks than the recipe"
        raise TaskMismatchError(what, got=", ".join(sorted(theirs)), expected=", ".join(sorted(mine)))


def renamed(name: str, rules: Sequence[tuple[str, str]], tasks: Mapping[str, str]) -> str:
    """An official key of one of our names: patterns replaced one after the other, then names of tasks."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    for ours, theirs in tasks.items():
        name = re.sub(rf"\b{ours}\b", theirs, name)
    return name


def matched(
    state: State, model: MultiTaskModel, key_of: Callable[[str], str], system: str, hint: str
) -> dict[str, Tensor]:
    """Official tensors under our names; 1x1 convolutions there may be linear here.

    Args:
        state: official; all of it has to be used.
        model: whose state dict is to be filled.
        key_of: the official key of one of our names.
        system: for the message.
        hint: what to do if it does not fit.

    Raises:
        CheckpointError: missing or left-over keys, or other shapes.
    """
    given, converted, problems = dict(state), dict[str, Tensor](), list[str]()
    for name, own in model.state_dict().items():
        key = key_of(name)
        value = given.pop(key, None)
        if value is None:
            problems.append(f"missing {key}")
        elif value.shape not in (own.shape, (*own.shape, 1, 1)):
            problems.append(f"{key} has shape {tuple(value.shape)}, expected {tuple(own.shape)}")
        else:
            converted[name] = value.reshape(own.shape).to(own.dtype)
    problems += [f"left over {key}" for key in given]
    if problems:
        what = f"{system} checkpoint does not fit the model: {len(problems)} problems, "
        raise CheckpointError(f"{what}first: {'; '.join(problems[:3])}", hint=hint)
    return converted


def convert_settings(
    system: str, file: Path, output: Path, *, tasks: Sequence[str] | None = None, changes: Sequence[str] = ()
) -> Draft:
    """Write the recipe of an official settings file.

    Args:
        system: see ``load_official``.
        file: official YAML.
        output: recipe to write.
        tasks: official names; default: those of the published runs.
        changes: texts ``a.b=VALUE`` for the recipe.

    Raises:
        ConfigError: settings that cannot be read or have no counterpart, or ``output`` exists.
    """
    draft = find(system).from_settings(read_settings(file), tasks, str(file))
    draft, recipe = _checked(draft, file, changes)
    _refuse_existing(output, "--output")
    with torch.device("meta"):
        empty_model(recipe)  # what only shows when the network is built
    make_folder(output.absolute().parent, "--output")
    write_text(output, f"# From {file.name}\n" + dump_yaml(draft.recipe))
    return draft


def convert_checkpoint(
    system: str, file: Path, output: Path, *, settings: Path | None = None, changes: Sequence[str] = ()
) -> Draft:
    """Write a run folder out of an official checkpoint.

    Args:
        system: see ``load_official``.
        file: official checkpoint.
        output: folder to make.
        settings: official YAML; default: what the checkpoint holds, else what its shapes tell.
        changes: texts ``a.b=VALUE`` for the recipe.

    Raises:
        ConfigError: as ``convert_settings``. CheckpointError, TaskMismatchError: as ``load_official``.
    """
    known = find(system)
    _refuse_existing(output, "--output")
    content = read_checkpoint(file)
    state = state_dict(content, str(file))
    own = content.get("config") if isinstance(content.get("config"), Mapping) else None
    given = read_settings(settings) if settings else own
    draft = known.from_state(state, given, str(settings or file), embedded=settings is None)
    draft, recipe = _checked(draft, file, changes)
    recipe = known.fit(recipe, state)
    model = _filled(known, recipe, state, file)
    with new_folder(output, "--output") as folder:
        write_text(folder / "recipe.yaml", dump_yaml(encode(recipe)))
        _save(folder, recipe, model, file)
    return draft


def _save(folder: Path, recipe: Recipe, model: MultiTaskModel, file: Path) -> None:
    """A checkpoint before the first step: `train --resume` starts from its weights."""
    tasks = recipe.task_set()
    balancer = recipe.balancer.build(tasks)
    manifest = {
        "step": 0, "backbone": recipe.model.backbone.name, "base_digest": None, "left_out": [],
        "tasks": list(tasks), "source": {"file": file.name, "sha256": checkpoint.file_hash(file)},
    }  # fmt: skip
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    state = {"position": asdict(Position()), "optimizer": {}, "balancer": dict(balancer.state_dict())}
    checkpoint.save(folder, "last", weights, state, manifest)


def export_run(system: str, run: Path, target: Path, which: str = "last") -> int:
    """Write the weights of a run as the official code would; returns the number of tensors.

    Raises:
        ConfigError: the official code has no such model, or ``target`` exists.
        CheckpointError: see ``Run.model``.
    """
    known = find(system)
    _refuse_existing(target, "--to-official")
    source = Run(run)
    state = known.export(source.recipe, source.model(which, torch.device("cpu")))
    make_folder(target.absolute().parent, "--to-official")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        torch.save({"model": state}, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return len(state)


def read_settings(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """An official YAML with the files of its key ``BASE`` below it.

    Raises:
        ConfigError: missing, no YAML, no mapping, or a ``BASE`` that leads back.
    """
    if path.resolve() in above:
        raise ConfigError("`BASE` leads back to the same file", where=str(path))
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"settings cannot be read ({error})", where=str(path)) from None
    if not isinstance(data, dict):
        raise ConfigError("settings are no mapping of keys", where=str(path), got=type(data).__name__)
    bases = data.pop("BASE", None) or []
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        if base:  # the usual default is a list of one empty name
            merged = merge(merged, read_settings(path.parent / base, (*above, path.resolve())))
    return merge(merged, data)


def _checked(draft: Draft, file: Path, changes: Sequence[str]) -> tuple[Draft, Recipe]:
    """A draft with its changes, and decoded."""
    data = override({"name": file.stem, **draft.recipe}, changes)
    stated = tuple(
        f"{path}: {_stated(data, path, why, file)}, as stated" for path, why in draft.asked.items()
    )
    for note in (*draft.notes, *stated):
        warnings.warn(f"{file}: {note}", PolytaskWarning, stacklevel=3)
    recipe = decode(Recipe, data, source=str(file))
    recipe.check()
    return replace(draft, recipe=data, notes=(*draft.notes, *stated)), recipe


def _stated(data: Any, path: str, why: str, file: Path) -> Any:
    for key in path.split("."):
        data = data.get(key) if isinstance(data, Mapping) else None
    if data is None:
        raise ConfigError(why, where=str(file), hint=f"state it: --set {path}=VALUE")
    return data


def refuse_unlike(parts: Mapping[str, bool], expected: str) -> None:
    """Refuse to export a model with a part, by its path, that the official code has not."""
    for where, fits in parts.items():
        if not fits:
            raise ConfigError("the official code has no such model", where=where, expected=expected)


def _refuse_existing(path: Path, where: str) -> None:
    if os.path.lexists(path):
        hint = "name one that does not exist yet"
        raise ConfigError("nothing is overwritten", where=where, got=str(path), hint=hint)
