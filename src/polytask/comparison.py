"""Comparison of runs: a row of scores, average relative gains and costs for each recipe, over its seeds."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polytask.config import encode
from polytask.errors import ConfigError, PolytaskWarning, TaskMismatchError
from polytask.files import to_json
from polytask.metrics.delta import delta_m
from polytask.runs import Run


@dataclass(frozen=True)
class Row:
    """One line of a comparison: the runs of a recipe, or all single-task runs taken together.

    Figures are means over the seeds, ``spreads`` and ``delta_m_spread`` sample standard deviations (empty and
    None with one seed). ``delta_m`` is the average relative gain in percent over the single-task scores
    (higher is better), None where a baseline is missing. ``conflict`` is the part of the pairs of tasks whose
    gradients opposed each other, None where the balancer compared none. ``step_ms`` is CPU time where
    trained on CPU. Costs of single-task models are summed.
    """

    name: str
    baseline: bool
    scores: dict[str, float]
    spreads: dict[str, float]
    delta_m: float | None
    delta_m_spread: float | None
    conflict: float | None
    step_ms: float | None
    total: int
    trainable: int
    macs: int
    latency_ms: float | None
    train_seconds: float
    steps: int
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """Rows with the tasks (name -> headline metric, higher is better) they have in common."""

    tasks: dict[str, tuple[str, bool]]
    rows: list[Row]

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def ranked(self) -> list[Row]:
        """The rows, largest Δm first, those without one last."""
        return sorted(self.rows, key=lambda row: math.inf if row.delta_m is None else -row.delta_m)


@dataclass(frozen=True)
class Group:
    """Runs of one recipe, which differ in nothing but the seed, in the order of their seeds."""

    name: str
    runs: tuple[Run, ...]

    @property
    def task(self) -> str | None:
        """The task of single-task runs."""
        tasks = self.runs[0].tasks
        return next(iter(tasks)) if len(tasks) == 1 else None


def compare(paths: Sequence[Path]) -> Comparison:
    """Compare finished runs; runs with one task serve as the baselines of that task.

    Runs that differ in their seed only are one row. Gains are over the single-task runs of the same seed, or
    where there are none over the mean of all.

    Args:
        paths: run folders, or folders that hold some, as a study's.

    Raises:
        CheckpointError: a folder without finished run.
        TaskMismatchError: multi-task runs with different tasks, or scores from different splits.
        ConfigError: nothing to compare, or baselines of different recipes for one task.
    """
    return compare_groups(grouped(paths))


def grouped(paths: Sequence[Path]) -> list[Group]:
    """The runs by recipe, in the order in which recipes appear; raises as ``compare``."""
    folders = [run for path in paths for run in _runs_below(path)]
    if not folders:
        raise ConfigError("nothing to compare", hint="name at least one run folder")
    if len({path.resolve() for path in folders}) < len(folders):
        raise ConfigError("a run is named twice", where="compare", got=", ".join(map(str, paths)))
    found: dict[tuple[str, int], list[Run]] = {}
    copies: Counter[str] = Counter()
    for run in map(Run, folders):
        recipe = encode(run.recipe)
        copies[to_json(recipe)] += 1
        which = copies[to_json(recipe)]  # copies of a run are rows of their own
        found.setdefault((to_json({**recipe, "seed": None}), which), []).append(run)
    times = Counter(runs[0].recipe.name for runs in found.values())
    return [
        Group(_label(runs[0], times), tuple(sorted(runs, key=lambda run: run.recipe.seed)))
        for runs in found.values()
    ]


def _runs_below(path: Path) -> list[Path]:
    """The folder itself if it is a run's, else those of runs in it; without any the folder, to be refused."""
    inside = [] if (path / "recipe.yaml").exists() else [file.parent for file in path.glob("*/recipe.yaml")]
    return sorted(inside) or [path]


def _label(run: Run, times: Mapping[str, int]) -> str:
    """The name of the recipe, with the folder where several have it."""
    name = run.recipe.name
    return name if times[name] == 1 else f"{name} ({run.path})"


def compare_groups(groups: Sequence[Group]) -> Comparison:
    """See ``compare``."""
    singles = {group.task: group for group in groups if group.task is not None}
    multis = [group for group in groups if group.task is None]
    if len(singles) + len(multis) != len(groups):
        raise ConfigError(
            "two single-task runs have the same task", where="compare",
            got=", ".join(str(run.path) for group in groups if group.task for run in group.runs),
            expected="one recipe for each task, once with each seed",
        )  # fmt: skip
    reference = (multis or groups)[0].runs[0]
    for run in (run for group in groups for run in group.runs):
        _same_protocol(run, reference)
    tasks = {
        name: (task.headline, task.higher_is_better)
        for group in (multis[:1] or groups)
        for name, task in group.runs[0].tasks.items()
    }
    baselines = {task: group for task, group in singles.items() if task in tasks}
    rows = [_single_row(baselines, tasks)] if baselines else []
    return Comparison(tasks, rows + [_row(group, _gains(group, tasks, baselines)) for group in multis])


def _same_protocol(run: Run, reference: Run) -> None:
    mine, theirs = run.scores, reference.scores
    for key in ("split", "samples"):
        if mine[key] != theirs[key]:
            raise TaskMismatchError(
                f"runs were scored on different data ({key})",
                where=str(run.path),
                got=mine[key],
                expected=theirs[key],
            )
    if len(run.tasks) > 1 and len(reference.tasks) > 1 and set(run.tasks) != set(reference.tasks):
        raise TaskMismatchError(
            "runs have different tasks",
            where=str(run.path),
            got=", ".join(run.tasks),
            expected=", ".join(reference.tasks),
        )


def _headline(run: Run, task: str) -> float:
    return float(run.scores["scores"][task][run.tasks[task].headline])


def _gains(
    group: Group, tasks: Mapping[str, tuple[str, bool]], baselines: Mapping[str, Group]
) -> list[float] | None:
    """Of each run; None without the baselines of all tasks."""
    if set(baselines) != set(tasks):
        return None
    lower = [task for task, (_, up) in tasks.items() if not up]
    gains = []
    for run in group.runs:
        scores, baseline = {task: _headline(run, task) for task in tasks}, _baseline(run, baselines)
        try:
            gains.append(delta_m(scores, baseline, lower))
        except ConfigError as error:  # a baseline of zero, as after a few steps
            warnings.warn(f"no average gain for {run.path}: {error}", PolytaskWarning, stacklevel=2)
            return None
    return gains


def _baseline(run: Run, baselines: Mapping[str, Group]) -> dict[str, float]:
    """Single-task scores with the seed of a run, or else the means over all seeds."""
    of_seed = {
        task: [_headline(single, task) for single in group.runs if single.recipe.seed == run.recipe.seed]
        for task, group in baselines.items()
    }
    if all(of_seed.values()):
        return {task: score for task, (score,) in of_seed.items()}
    return {
        task: _mean(_headline(single, task) for single in group.runs) for task, group in baselines.items()
    }


def _mean(values: Iterable[float]) -> float:
    return float(np.mean([*values]))


def _mean_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if known else None


def _spread(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _row(group: Group, gains: Sequence[float] | None) -> Row:
    runs, cost = group.runs, group.runs[0].cost
    scores = {task: [_headline(run, task) for run in runs] for task in runs[0].tasks}
    spreads = {task: _spread(values) for task, values in scores.items()}
    step = _mean_known([run.step_seconds for run in runs])
    return Row(
        name=group.name,
        baseline=group.task is not None,
        scores={task: _mean(values) for task, values in scores.items()},
        spreads={task: spread for task, spread in spreads.items() if spread is not None},
        delta_m=None if gains is None else _mean(gains),
        delta_m_spread=None if gains is None else _spread(gains),
        conflict=_mean_known([run.conflict for run in runs]),
        step_ms=None if step is None else 1000 * step,
        total=cost["total"],
        trainable=cost["trainable"],
        macs=cost["macs_merged"],
        latency_ms=_mean_known([run.cost["latency_ms"] for run in runs]),
        train_seconds=_mean(run.scores["train_seconds"] for run in runs),
        steps=runs[0].scores["step"],
        seeds=tuple(run.recipe.seed for run in runs),
    )


def _single_row(baselines: Mapping[str, Group], tasks: Mapping[str, tuple[str, bool]]) -> Row:
    used = [_row(group, None) for group in baselines.values()]
    return Row(
        name=f"single task ({len(used)} models)",
        baseline=True,
        scores={task: score for row in used for task, score in row.scores.items()},
        spreads={task: spread for row in used for task, spread in row.spreads.items()},
        delta_m=0.0 if len(used) == len(tasks) else None,
        delta_m_spread=None,
        conflict=None,
        step_ms=_sum_known([row.step_ms for row in used]),
        total=sum(row.total for row in used),
        trainable=sum(row.trainable for row in used),
        macs=sum(row.macs for row in used),
        latency_ms=_sum_known([row.latency_ms for row in used]),
        train_seconds=sum(row.train_seconds for row in used),
        steps=sum(row.steps for row in used),
        seeds=tuple(sorted({seed for row in used for seed in row.seeds})),
    )


def _sum_known(values: Sequence[float | None]) -> float | None:
    """The sum, None where one is missing."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
