"""A study: every recipe of a folder trained with every seed, one run after another, and compared."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from polytask.comparison import Comparison
from polytask.engine.launch import train
from polytask.engine.trainer import check_folder
from polytask.errors import ConfigError, PolytaskError, did_you_mean
from polytask.recipe import Recipe, load_recipe, recipe_folder, shipped_recipes
from polytask.report import make_report

DEMO = "rooms/demo"


@dataclass(frozen=True)
class Planned:
    """A run of a study: its recipe, its folder, whether there is something to resume, whether it is done."""

    recipe: Recipe
    run: Path
    begun: bool
    done: bool


@dataclass(frozen=True)
class Study:
    """What came out: the comparison of the finished runs, if any, and why the others failed."""

    comparison: Comparison | None
    failed: dict[Path, PolytaskError]


def run_study(
    folder: Path | str,
    output: Path,
    say: Callable[[str], None],
    *,
    seeds: Sequence[int] = (),
    overrides: Sequence[str] = (),
    title: str = "",
) -> Study:
    """Train the recipes of a folder and write ``report.html``, ``table.md`` and ``figures`` into ``output``.

    Complete runs are kept, interrupted ones resumed; one that fails is told and does not stop the others.

    Args:
        folder: with recipes, or the name of a shipped one such as ``rooms/balancers``; files that begin with
            ``_`` are left out.
        output: below it, a run's folder has the name of its recipe, with the seed if ``seeds`` are given.
        say: is told about each run.
        seeds: for every recipe; none for the seed in each recipe.
        overrides: changes of every recipe, ``a.b=VALUE``.
        title: of the page.

    Raises:
        ConfigError: no such folder, no recipe in it, a seed named twice, two recipes of one name or with
            tasks that cannot be compared, the folder of a run holds one of another recipe, or several
            processes. Nothing is trained then.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        hint = "give torchrun single recipes with `train`, and compare the runs with `compare`"
        raise ConfigError("a study runs in one process", where="study", hint=hint)
    planned = _plan(folder, output, seeds, overrides)
    failed = _train_all(planned, say)
    finished = [one.run for one in planned if one.run not in failed]
    name = str(folder).removeprefix("recipes/").rstrip("/")
    if not finished:
        return Study(None, failed)
    report = make_report(finished)
    report.write_page(output / "report.html", title or f"polytask study: {name}")
    report.write_files(output)
    return Study(report.comparison, failed)


def _plan(folder: Path | str, output: Path, seeds: Sequence[int], overrides: Sequence[str]) -> list[Planned]:
    """Each recipe with the first seed, then each with the second, and so on: early results are broad."""
    if len(set(seeds)) < len(seeds):
        raise ConfigError("a seed is named twice", where="--seeds", got=" ".join(map(str, seeds)))
    changes = [[*overrides, f"seed={seed}"] for seed in seeds] or [list(overrides)]
    files = recipe_files(Path(folder))
    recipes = [load_recipe(file, more) for more in changes for file in files]
    names = [f"{recipe.name}-seed{recipe.seed}" if seeds else recipe.name for recipe in recipes]
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        hint = "give every recipe a `name` of its own"
        raise ConfigError(f"{times} recipes have the name {name!r}", where=str(folder), hint=hint)
    _check_tasks(recipes[: len(files)], str(folder))
    return [_planned(recipe, output / name) for recipe, name in zip(recipes, names, strict=True)]


def _check_tasks(recipes: Sequence[Recipe], where: str) -> None:
    """What could not be compared in the end is not trained at all."""
    tasks = {recipe.name: ", ".join(sorted(recipe.tasks)) for recipe in recipes}
    several = {name: of for name, of in tasks.items() if "," in of}
    single = Counter(of for of in tasks.values() if "," not in of)
    if len(set(several.values())) > 1 or any(times > 1 for times in single.values()):
        got = "; ".join(f"{name}: {of}" for name, of in tasks.items())
        expected = "the same tasks in all recipes with several, and at most one recipe with each task alone"
        raise ConfigError("recipes cannot be compared", where=where, got=got, expected=expected)


def recipe_files(folder: Path) -> list[Path]:
    """The recipes of a folder, in the order of their names.

    Raises:
        ConfigError: there is no such folder, here or among the shipped ones, or no recipe in it.
    """
    name = folder.as_posix().removeprefix("recipes/")
    found = next((path for path in (folder, recipe_folder() / name) if path.is_dir()), None)
    if found is None:
        known = sorted({shipped.rpartition("/")[0] for shipped in shipped_recipes()})
        raise ConfigError("no such folder of recipes", where=str(folder), hint=did_you_mean(name, known))
    files = sorted(found.glob("[!_]*.yaml"))
    if not files:
        hint = "names end in .yaml; those that begin with _ only serve as `base`"
        raise ConfigError("no recipe in this folder", where=str(folder), hint=hint)
    return files


def _planned(recipe: Recipe, run: Path) -> Planned:
    begun = (run / "recipe.yaml").exists()
    if begun:
        check_folder(run, recipe, resume=True)
    return Planned(recipe, run, begun, (run / "cost.json").exists())


def _train_all(planned: Sequence[Planned], say: Callable[[str], None]) -> dict[Path, PolytaskError]:
    """Train what is not complete; returns what failed."""
    failed: dict[Path, PolytaskError] = {}
    left, seconds = sum(not one.done for one in planned), 0.0
    for number, one in enumerate(planned, 1):
        title, started = f"[{number}/{len(planned)}] {one.run.name}", time.monotonic()
        if one.done:
            say(f"{title}: already done")
            continue
        outcome = ""
        try:
            train(one.recipe, one.run, resume=one.begun)
        except PolytaskError as error:
            failed[one.run] = error
            outcome = f" failed: {error};"
        seconds += time.monotonic() - started
        trained = sum(not before.done for before in planned[:number])
        rest = f", about {_duration(seconds / trained * (left - trained))} left" if left > trained else ""
        say(f"{title}:{outcome} {_duration(time.monotonic() - started)}{rest}")
    return failed


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
