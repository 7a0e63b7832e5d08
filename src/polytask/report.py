"""A self-contained page about runs: scores, learning curves, conflicts, costs, predictions, recipes."""

from __future__ import annotations

import math
import platform
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image

import polytask
from polytask.charts import (
    COLORS,
    FAINT,
    STYLE,
    Curve,
    Mark,
    chart,
    gains,
    heat_maps,
    legend,
    standalone,
    trade_off,
)
from polytask.comparison import Comparison, Group, compare_groups, grouped
from polytask.config import encode
from polytask.data.pipelines import Pipeline
from polytask.errors import DatasetNotFoundError, PolytaskWarning
from polytask.files import dump_yaml, make_folder, write_text
from polytask.model import MultiTaskModel
from polytask.progress import track
from polytask.runs import Run
from polytask.tables import NOTE, markdown, number
from polytask.tasks.base import Task
from polytask.types import Sample
from polytask.viz import data_uri, grid, predictions, save_picture, task_picture, to_picture

_SINGLE = "#000000"
_PALETTE = [color for color in COLORS if color not in (_SINGLE, "#999999")]
_MAX_COSINES = 6
"""Of more pairs of tasks than that, cosines are not drawn."""


@dataclass(frozen=True)
class Report:
    """What a page shows: rows, charts by name, pictures of predictions.

    ``colors`` holds the rows that stand out, eight at most: those with the largest Δm if there are more.
    """

    groups: list[Group]
    comparison: Comparison
    colors: dict[str, str]
    charts: dict[str, str]
    panels: list[Image.Image]

    def write_page(self, output: Path, title: str) -> None:
        """One HTML file, which needs no other."""
        firsts = {group.name: group.runs[0] for group in self.groups}
        shown = next(iter(firsts.values()))
        text = _environment().get_template("report.html.j2").render(
            title=title,
            comparison=self.comparison,
            groups=self.groups,
            first=shown,
            seeds=sorted({run.recipe.seed for group in self.groups for run in group.runs}),
            note=NOTE,
            number=number,
            style=STYLE,
            legend=legend(self.keys()),
            many="others" in self.keys(),
            charts=list(self.charts.values()),
            panels=[data_uri(sheet) for sheet in self.panels],
            recipes={name: dump_yaml(encode(run.recipe)) for name, run in firsts.items()},
            machine=_machine(shown),
        )  # fmt: skip
        make_folder(output.parent, "--report")
        write_text(output, text)

    def write_files(self, folder: Path) -> None:
        """``table.md``, and in ``figures`` every chart as SVG and the predictions as PNG."""
        figures = folder / "figures"
        make_folder(figures, "--output")
        for name, svg in self.charts.items():
            write_text(
                figures / f"{name}.svg",
                standalone(svg, {} if name == "gains" or name.startswith("experts-") else self.keys()),
            )
        for number_, picture in enumerate(self.panels, 1):
            save_picture(picture, figures / f"predictions-{number_}.png")
        write_text(folder / "table.md", markdown(self.comparison))

    def keys(self) -> dict[str, str]:
        """Names and colors for a legend."""
        rows = [row.baseline for row in self.comparison.rows]
        singles = {"single task": _SINGLE} if any(rows) else {}
        return singles | self.colors | ({"others": FAINT} if rows.count(False) > len(self.colors) else {})


def write_report(
    paths: Sequence[Path], output: Path, *, title: str = "Comparison", panels: int = 4
) -> Comparison:
    """Write a self-contained HTML page about runs; returns the comparison it shows.

    Args:
        paths: run folders, or folders that hold some.
        output: file to write.
        title: heading of the page.
        panels: how many samples to show with predictions; 0 for none.

    Raises:
        as ``compare``.
    """
    report = make_report(paths, panels=panels)
    report.write_page(output, title)
    return report.comparison


def make_report(paths: Sequence[Path], *, panels: int = 4) -> Report:
    """What a page about runs shows; arguments and errors as of ``write_report``."""
    groups = grouped(paths)
    comparison = compare_groups(groups)
    many = len(groups) > len(_PALETTE)
    names = [row.name for row in (comparison.ranked() if many else comparison.rows) if not row.baseline]
    colors = dict(zip(names, _PALETTE, strict=False))
    charts = _charts(groups, comparison, colors) | usage_charts(groups)
    return Report(groups, comparison, colors, charts, prediction_sheets(groups, comparison, colors, panels))


def _machine(run: Run) -> str:
    return (
        f"{platform.machine()}, {torch.get_num_threads()} threads, {run.cost['device']}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, polytask {polytask.__version__}"
    )


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("polytask", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


# --- charts ----------------------------------------------------------------------------------------


def _charts(groups: Sequence[Group], comparison: Comparison, colors: Mapping[str, str]) -> dict[str, str]:
    """By file name, those with something to draw."""
    tasks, charts = comparison.tasks, _gain_charts(comparison, colors)
    for task, (metric, up) in tasks.items():
        scored = f"{task}: {metric} ({'higher' if up else 'lower'} is better)"
        charts[f"score-{task}"] = _curves(groups, colors, "eval", f"{task}/{metric}", scored)
        charts[f"loss-{task}"] = _curves(groups, colors, "step", f"loss/{task}", f"{task}: training loss")
    title = "pairs of tasks in conflict"
    charts["conflict"] = _curves(groups, colors, "step", "stat/conflict", title)
    pairs = [*combinations(tasks, 2)]
    for a, b in pairs if len(pairs) <= _MAX_COSINES else []:
        title = f"cosine of gradients: {a}, {b}"
        charts[f"cosine-{a}-{b}"] = _curves(groups, colors, "step", f"stat/cos/{a}~{b}", title)
    return {name: svg for name, svg in charts.items() if svg}


def _curves(groups: Sequence[Group], colors: Mapping[str, str], kind: str, key: str, title: str) -> str:
    """A curve for each recipe, mean over its seeds; empty unless one has two points."""
    bins = 20 if key.startswith("stat/") else 40
    curves = [
        Curve(group.name, _means(_logged(group, kind, key), bins), _color(group, colors)) for group in groups
    ]
    drawn = [curve for curve in curves if curve.points]
    return chart(drawn, title, "training step") if any(len(curve.points) > 1 for curve in drawn) else ""


def _color(group: Group, colors: Mapping[str, str]) -> str:
    return _SINGLE if group.task else colors.get(group.name, FAINT)


def _logged(group: Group, kind: str, key: str) -> list[tuple[float, float]]:
    """A figure by training step, mean over the seeds."""
    found: dict[float, list[float]] = {}
    for line in (line for run in group.runs for line in run.log if line["kind"] == kind and key in line):
        found.setdefault(line["step"], []).append(line[key])
    return [(step, sum(values) / len(values)) for step, values in sorted(found.items())]


def _means(points: list[tuple[float, float]], bins: int) -> list[tuple[float, float]]:
    """Means of runs of points, so that a noisy curve can be read."""
    edges = np.linspace(0, len(points), min(bins, len(points)) + 1).round().astype(int).tolist()
    pieces = [points[start:end] for start, end in pairwise(edges)]
    return [(piece[-1][0], sum(y for _, y in piece) / len(piece)) for piece in pieces]


def _gain_charts(comparison: Comparison, colors: Mapping[str, str]) -> dict[str, str]:
    """Gains of all rows, and gains against sizes where these differ."""
    marks = [
        Mark(row.name, row.trainable / 1e6, row.delta_m, row.delta_m_spread, color)
        for row in comparison.ranked()
        for color in [_SINGLE if row.baseline else colors.get(row.name, FAINT)]
        if row.delta_m is not None and math.isfinite(row.delta_m)
    ]
    charts = {"gains": gains(marks, "Δm in percent over the single-task models")} if len(marks) > 2 else {}
    if marks and len({row.trainable for row in comparison.rows if not row.baseline}) > 1:
        title = "Δm in percent, and the Pareto front"
        charts["pareto"] = trade_off(marks, title, "million trainable parameters")
    return charts


@torch.no_grad()
def usage_charts(groups: Sequence[Group], count: int = 32) -> dict[str, str]:
    """How much the experts of networks that have some act for each task, on so many evaluation samples."""
    charts = {}
    for group in groups:
        run = group.runs[0]
        if not run.recipe.model.neck.EXPERTS:
            continue
        try:
            samples = run.recipe.data.open(run.scores["split"], run.tasks, train=False)
        except DatasetNotFoundError as error:
            text = f"the use of experts of {group.name} is not shown: {error}"
            warnings.warn(text, PolytaskWarning, stacklevel=3)
            continue
        model = run.model()
        panels: dict[str, dict[str, Any]] = {}
        chosen = [*dict.fromkeys(i * len(samples) // count for i in range(count))]
        for index in track(chosen, f"experts of {group.name}"):
            model(samples[index]["image"][None])
            for name, tasks in model.neck.usage().items():
                panel = panels.setdefault(name, dict.fromkeys(tasks, 0.0))
                panels[name] = {t: panel[t] + gates.cpu().numpy() / len(chosen) for t, gates in tasks.items()}
        title = f"{group.name}: mean gate of each expert, {len(chosen)} images"
        title += f", seed {run.recipe.seed}" if len(group.runs) > 1 else ""
        charts[f"experts-{group.name}"] = heat_maps(panels, title)
    return charts


# --- predictions -----------------------------------------------------------------------------------


def prediction_sheets(
    groups: Sequence[Group], comparison: Comparison, names: Collection[str], count: int
) -> list[Image.Image]:
    """For some evaluation samples: image and ground truth, then predictions of single-task and named runs.

    Of several seeds, the first.
    """
    if not count:
        return []
    shown = [group for group in groups if group.task or group.name in names]
    reference = next((group for group in shown if group.task is None), shown[0]).runs[0]
    data = reference.recipe.data
    samples = data.open(reference.scores["split"], reference.tasks, train=False)
    chosen = [i * len(samples) // count for i in range(min(count, len(samples)))]
    known = {name: reference.tasks[name] for name in comparison.tasks if name in reference.tasks}
    models = [(group.name, group.runs[0], group.runs[0].model()) for group in shown]
    return [_sheet(samples[index], data.pipeline, known, models) for index in dict.fromkeys(chosen)]


def _sheet(
    sample: Sample,
    pipeline: Pipeline,
    tasks: dict[str, Task],
    models: Sequence[tuple[str, Run, MultiTaskModel]],
) -> Image.Image:
    picture = to_picture(sample["image"], pipeline)
    values: dict[str, dict[str, Any]] = {"ground truth": sample, "single task": {}}
    for name, run, model in models:
        predicted = predictions(model, run.tasks, sample)
        if len(run.tasks) == 1:
            values["single task"] |= predicted
        else:
            values[name] = predicted
    if not set(tasks) <= set(values["single task"]):
        del values["single task"]
    rows = [
        [picture, *(task_picture(t, of[name], picture) for name, t in tasks.items())]
        for of in values.values()
    ]
    return grid(rows, list(values), [str(sample["id"]), *tasks])
