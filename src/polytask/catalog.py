"""What there is: registered specs, backbones and shipped recipes."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import timm

from polytask.config import Slot, Spec, aliases, decode, registered
from polytask.data.base import DatasetSpec
from polytask.files import override
from polytask.recipe import load_recipe, shipped_recipes
from polytask.tasks.base import TaskSet

_SLOTS = {
    "tasks": "task", "datasets": "data", "adapters": "adapter", "necks": "neck", "heads": "head",
    "balancers": "balancer", "pipelines": "pipeline", "actions": "action", "meta": "meta",
}  # fmt: skip


def catalog(what: str, pattern: str = "*") -> list[tuple[str, str]]:
    """Names and one-line descriptions.

    Args:
        what: ``tasks datasets adapters necks heads balancers pipelines actions meta backbones recipes``.
        pattern: shell-style filter of the names, aliases among them.
    """
    if what == "recipes":
        rows = [(name, _describe_recipe(file)) for name, file in shipped_recipes().items()]
    elif what == "backbones":
        rows = [
            (name, "pretrained weights" if timm.is_model_pretrained(name) else "")
            for name in timm.list_models()
        ]
    else:
        return _registered(_SLOTS[what], pattern)
    return [row for row in rows if fnmatch.fnmatch(row[0], pattern)]


def _registered(slot: str, pattern: str) -> list[tuple[str, str]]:
    rows = []
    for name, cls in sorted(registered(slot).items()):
        others = [other for other, meant in aliases(slot).items() if meant == name]
        if fnmatch.filter([name, *others], pattern):
            rows.append((name, _first_line(cls) + (f" (also {', '.join(others)})" if others else "")))
    return rows


def _first_line(cls: type[Any]) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _describe_recipe(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    return lines[0].removeprefix("#").strip() if lines and lines[0].startswith("#") else ""


def chosen(
    name: str, root: str | Path | None, assignments: Sequence[str] = (), tasks: str | None = None
) -> tuple[DatasetSpec, TaskSet]:
    """A dataset and its tasks, by its name or as a recipe has them.

    Args:
        name: dataset, recipe file, run folder or shipped recipe.
        root: folder of the dataset.
        assignments: texts ``a=VALUE``, of the dataset or, if that is what is named, of the recipe.
        tasks: comma-separated names, if not all.

    Raises:
        ConfigError: unknown name, or settings or tasks it does not have.
    """
    file = Path(name)
    if name in registered("data") or not (file.suffix or file.is_dir() or "/" in name):
        spec = dataset(name, root, assignments)
        every = TaskSet(spec.labels())
    else:
        place = [] if root is None else [f"data.root={json.dumps(str(root))}"]
        recipe = load_recipe(file, [*place, *assignments])
        spec, every = recipe.data, recipe.task_set()
    return spec, every.subset([text.strip() for text in tasks.split(",")], "--tasks") if tasks else every


class _DataOnly(Spec):
    data: Annotated[DatasetSpec, Slot("data")]


def dataset(name: str, root: str | Path | None, assignments: Sequence[str] = ()) -> DatasetSpec:
    """A dataset by name and folder, with defaults for all else.

    Raises:
        ConfigErrors: unknown name, or settings it does not take.
    """
    settings: dict[str, Any] = {"type": name} | ({} if root is None else {"root": str(root)})
    data = override({"data": settings}, [f"data.{text}" for text in assignments])
    return decode(_DataOnly, data, source="dataset").data
