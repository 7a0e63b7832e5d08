"""Comparison of runs: one table of scores, average relative gains and costs, and a self-contained page."""

from __future__ import annotations

import platform
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from PIL import Image

import polytask
from polytask.config import encode
from polytask.data.pipelines import Pipeline
from polytask.errors import ConfigError, PolytaskWarning, TaskMismatchError
from polytask.files import dump_yaml, make_folder, write_text
from polytask.metrics.delta import delta_m
from polytask.model import MultiTaskModel
from polytask.runs import Run
from polytask.tasks.base import Task
from polytask.types import Sample
from polytask.viz import COLORS, Curve, chart, data_uri, grid, legend, predictions, task_picture, to_picture


@dataclass(frozen=True)
class Row:
    """One line of a comparison: a run, or all single-task runs taken together.

    ``delta_m`` is the average relative gain in percent over the single-task scores (higher is better),
    None where a baseline is missing. Costs of single-task models are summed.
    """

    name: str
    scores: dict[str, float]
    delta_m: float | None
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


def compare(paths: Sequence[Path]) -> Comparison:
    """Compare finished runs; runs with one task serve as the baselines of that task.

    Raises:
        CheckpointError: a folder without finished run.
        TaskMismatchError: multi-task runs with different tasks, or scores from different splits.
        ConfigError: nothing to compare, or two baselines for one task.
    """
    runs = [Run(path) for path in paths]
    if not runs:
        raise ConfigError("nothing to compare", hint="name at least one run folder")
    if len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError("a run is named twice", where="compare", got=", ".join(map(str, paths)))
    singles = {next(iter(run.tasks)): run for run in runs if len(run.tasks) == 1}
    multis = [run for run in runs if len(run.tasks) > 1]
    if len(singles) + len(multis) != len(runs):
        raise ConfigError(
            "two single-task runs have the same task", where="compare", got=", ".join(map(str, paths))
        )
    reference = multis[0] if multis else runs[0]
    for run in runs:
        _same_protocol(run, reference)
    names = labels(runs)
    tasks = {
        name: (task.headline, task.higher_is_better)
        for run in ([reference] if multis else runs)
        for name, task in run.tasks.items()
    }
    baseline = {task: _headline(run, task) for task, run in singles.items() if task in tasks}
    rows = [_single_row(singles, tasks)] if singles else []
    rows += [_row(run, names[run.path], _gain(run, tasks, baseline)) for run in multis]
    return Comparison(tasks, rows)


def labels(runs: Sequence[Run]) -> dict[Path, str]:
    """What to call each run: the name of its recipe, with its folder where several share one."""
    times = Counter(run.recipe.name for run in runs)
    return {
        run.path: run.recipe.name if times[run.recipe.name] == 1 else f"{run.recipe.name} ({run.path})"
        for run in runs
    }


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


def _gain(run: Run, tasks: dict[str, tuple[str, bool]], baseline: dict[str, float]) -> float | None:
    if set(baseline) != set(tasks):
        return None
    lower = [task for task, (_, up) in tasks.items() if not up]
    try:
        return delta_m({task: _headline(run, task) for task in tasks}, baseline, lower)
    except ConfigError as error:  # a baseline of zero, as after a few steps
        warnings.warn(f"no average gain for {run.path}: {error}", PolytaskWarning, stacklevel=2)
        return None


def _row(run: Run, name: str, gain: float | None) -> Row:
    return Row(
        name=name,
        scores={task: _headline(run, task) for task in run.tasks},
        delta_m=gain,
        total=run.cost["total"],
        trainable=run.cost["trainable"],
        macs=run.cost["macs_merged"],
        latency_ms=run.cost["latency_ms"],
        train_seconds=run.scores["train_seconds"],
        steps=run.scores["step"],
        seeds=(run.recipe.seed,),
    )


def _single_row(singles: dict[str, Run], tasks: dict[str, tuple[str, bool]]) -> Row:
    used = [_row(run, task, None) for task, run in singles.items() if task in tasks]
    latencies = [row.latency_ms for row in used if row.latency_ms is not None]
    return Row(
        name=f"single task ({len(used)} models)",
        scores={task: score for row in used for task, score in row.scores.items()},
        delta_m=0.0 if len(used) == len(tasks) else None,
        total=sum(row.total for row in used),
        trainable=sum(row.trainable for row in used),
        macs=sum(row.macs for row in used),
        latency_ms=sum(latencies) if len(latencies) == len(used) else None,
        train_seconds=sum(row.train_seconds for row in used),
        steps=sum(row.steps for row in used),
        seeds=tuple(sorted({seed for row in used for seed in row.seeds})),
    )


# --- page ------------------------------------------------------------------------------------------


def write_report(
    paths: Sequence[Path], output: Path, *, title: str = "Comparison", panels: int = 4
) -> Comparison:
    """Write a self-contained HTML page about runs; returns the comparison it shows.

    Args:
        paths: run folders.
        output: file to write.
        title: heading of the page.
        panels: how many samples to show with predictions; 0 for none.

    Raises:
        as ``compare``.
    """
    comparison = compare(paths)
    runs = [Run(path) for path in paths]
    names = labels(runs)
    colors = {names[path]: COLORS[i % len(COLORS)] for i, path in enumerate(paths)}
    page = _environment().get_template("report.html.j2")
    text = page.render(
        title=title,
        comparison=comparison,
        runs=runs,
        names=names,
        legend=legend(colors),
        charts=_charts(runs, comparison, names, colors),
        panels=[data_uri(sheet) for sheet in prediction_sheets(runs, comparison, panels)],
        recipes={names[run.path]: dump_yaml(encode(run.recipe)) for run in runs},
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads, {runs[0].cost['device']}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, polytask {polytask.__version__}",
    )
    make_folder(output.parent, "--report")
    write_text(output, text)
    return comparison


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("polytask", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def _charts(
    runs: Sequence[Run], comparison: Comparison, names: dict[Path, str], colors: dict[str, str]
) -> list[str]:
    charts = []
    for task, (metric, up) in comparison.tasks.items():
        own = [run for run in runs if task in run.tasks]
        scored = f"{task}: {metric} ({'higher' if up else 'lower'} is better)"
        for title, kind, key in (
            (scored, "eval", f"{task}/{metric}"),
            (f"{task}: training loss", "step", f"loss/{task}"),
        ):
            curves = [Curve(names[r.path], _means(_logged(r, kind, key)), colors[names[r.path]]) for r in own]
            charts.append(chart(curves, title, "training step"))
    return [svg for svg in charts if svg]


def _logged(run: Run, kind: str, key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in run.log if line["kind"] == kind and key in line]


def _means(points: list[tuple[float, float]], bins: int = 40) -> list[tuple[float, float]]:
    """Means of runs of points, so that a noisy curve can be read."""
    size = -(-len(points) // bins) or 1
    pieces = [points[i : i + size] for i in range(0, len(points), size)]
    return [(piece[-1][0], sum(y for _, y in piece) / len(piece)) for piece in pieces]


def prediction_sheets(runs: Sequence[Run], comparison: Comparison, count: int) -> list[Image.Image]:
    """For some evaluation samples: image and ground truth, then the predictions of every run."""
    if not count:
        return []
    multis = [run for run in runs if len(run.tasks) > 1]
    reference = multis[0] if multis else runs[0]
    data = reference.recipe.data
    samples = data.open(reference.scores["split"], reference.tasks, train=False)
    chosen = [i * len(samples) // count for i in range(min(count, len(samples)))]
    known = {name: reference.tasks[name] for name in comparison.tasks if name in reference.tasks}
    models = [(run, run.model()) for run in runs]
    return [_sheet(samples[index], data.pipeline, known, models) for index in dict.fromkeys(chosen)]


def _sheet(
    sample: Sample, pipeline: Pipeline, tasks: dict[str, Task], models: Sequence[tuple[Run, MultiTaskModel]]
) -> Image.Image:
    picture, names = to_picture(sample["image"], pipeline), labels([run for run, _ in models])
    values: dict[str, dict[str, Any]] = {"ground truth": sample, "single task": {}}
    for run, model in models:
        predicted = predictions(model, run.tasks, sample)
        if len(run.tasks) == 1:
            values["single task"] |= predicted
        else:
            values[names[run.path]] = predicted
    if not set(tasks) <= set(values["single task"]):
        del values["single task"]
    rows = [
        [picture, *(task_picture(t, of[name], picture) for name, t in tasks.items())]
        for of in values.values()
    ]
    return grid(rows, list(values), [str(sample["id"]), *tasks])
