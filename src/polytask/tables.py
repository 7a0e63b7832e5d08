"""Tables for people, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from polytask.metrics.base import IGNORE
from polytask.tasks import Attributes, Classification, Embedding, Segmentation

if TYPE_CHECKING:
    from polytask.comparison import Comparison, Row
    from polytask.data.verification import VerifyReport
    from polytask.deltam import History
    from polytask.tasks import Task


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; columns are not folded in a log file."""
    grid = Table(title=title, title_justify="left")
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*row)
    wide = None if sys.stderr.isatty() else 200
    Console(stderr=True, width=wide).print(grid)


def print_scores(scores: dict[str, dict[str, float]]) -> None:
    """Every metric of every task."""
    rows = [(task, name, f"{value:.3f}") for task, values in scores.items() for name, value in values.items()]
    table("scores", ["task", "metric", "value"], rows)


def print_verification(report: VerifyReport, tasks: Mapping[str, Task]) -> None:
    """What is in a dataset; the problems are not here."""
    table("samples", ["split", "count"], [(split, f"{count:,}") for split, count in report.counts.items()])
    rows = [(name, _frequencies(tasks[name], seen)) for name, seen in report.histograms.items()]
    rows += [(name, _range(seen)) for name, seen in report.ranges.items()]
    table("labels", ["task", "shares of pixels, or numbers of images"], rows)


def _frequencies(task: Task, seen: Mapping[int, int]) -> str:
    if isinstance(task, Embedding):
        known = [times for number, times in seen.items() if number >= 0]
        each = f", {min(known):,} to {max(known):,} images of each" if known else ""
        return f"{len(known):,} identities{each}" + (f", {seen[-1]:,} unknown" if -1 in seen else "")
    names = {**dict(enumerate(_class_names(task))), IGNORE: "unlabeled", -1: "unknown"}
    total = sum(seen.values())
    share = {n: f"{100 * times / total:.3g} %" if task.dense else f"{times:,}" for n, times in seen.items()}
    return ", ".join(f"{names.get(number, number)}: {text}" for number, text in share.items())


def _class_names(task: Task) -> tuple[str, ...]:
    if isinstance(task, Attributes):
        return task.names
    return task.classes if isinstance(task, (Segmentation, Classification)) else ()


def _range(seen: Mapping[str, float]) -> str:
    percent = 100 * seen["valid"] / (seen["valid"] + seen["invalid"])
    return f"{seen['min']:.4g} to {seen['max']:.4g}, {percent:.3g} % valid" if percent else "none valid"


def print_comparison(comparison: Comparison) -> None:
    """The table of a comparison."""
    table("comparison", _heads(comparison), [_cells(row, comparison) for row in comparison.rows])


def markdown(comparison: Comparison) -> str:
    """The table of a comparison for a page of documentation, largest Δm first, and what its columns mean."""
    heads, cells = _heads(comparison), [_cells(row, comparison) for row in comparison.ranked()]
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)], *cells]
    shown = [[cell.replace("|", "\\|") for cell in line[:-2]] for line in lines]  # parameters and time: no
    text = "\n".join(f"| {' | '.join(line)} |" for line in shown)
    return f"{text}\n\n{NOTE}\n"


NOTE = (
    "Means over the seeds ± their sample standard deviation. Δm: average relative gain over the single-task "
    "models of the same seed, or over the mean of all single-task models where that seed has none. Conflict: "
    "part of the pairs of tasks whose gradients oppose each other, mean over the training of methods that "
    "compare gradients. ms/step: CPU time of a training step where trained on CPU, without loading data."
)


def _heads(comparison: Comparison) -> list[str]:
    heads = [f"{task} {metric} {'↑' if up else '↓'}" for task, (metric, up) in comparison.tasks.items()]
    costs = ["ms/step", "conflict", "trainable M", "GMACs", "parameters M", "train s"]
    return ["run", "seeds", *heads, "Δm % ↑", *costs]


def _cells(row: Row, comparison: Comparison) -> list[str]:
    return [
        row.name,
        str(len(row.seeds)),
        *(number(row.scores.get(task), ".2f", row.spreads.get(task)) for task in comparison.tasks),
        number(row.delta_m, "+.2f", row.delta_m_spread),
        number(row.step_ms, ".1f"),
        number(row.conflict, ".2f"),
        f"{row.trainable / 1e6:.3f}",
        f"{row.macs / 1e9:.3f}",
        f"{row.total / 1e6:.3f}",
        f"{row.train_seconds:.0f}",
    ]


def print_history(history: History) -> None:
    """Every evaluation with its gain, then the best one of each run."""
    heads = [
        f"{task} {m.metric} {'↑' if m.higher_is_better else '↓'}" for task, m in history.measures.items()
    ]
    for title, evaluations in (("evaluations", history.evaluations), ("best", history.best_of_runs())):
        rows = [
            [
                evaluation.run,
                "-" if evaluation.epoch is None else str(evaluation.epoch),
                *(f"{evaluation.scores[task]:.4f}" for task in history.measures),
                f"{evaluation.delta_m:+.2f}",
            ]
            for evaluation in evaluations
        ]
        table(title, ["run", "epoch", *heads, "Δm % ↑"], rows)


def number(value: float | None, form: str, spread: float | None = None) -> str:
    """A figure with its standard deviation, if there is one; a dash if there is none."""
    if value is None:
        return "-"
    return format(value, form) + ("" if spread is None else f" ± {spread:.2f}")


def print_cost(figures: Mapping[str, object]) -> None:
    """A cost report."""
    known = {key: value for key, value in figures.items() if value is not None}
    rows = [(key.replace("_", " "), _readable(key, value)) for key, value in known.items()]
    table("cost of one image (1 MAC = 2 FLOPs)", ["figure", "value"], rows)


def _readable(key: str, value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value / 1e9:.3f} G" if key.startswith("macs") else f"{value:,}"
    if isinstance(value, float):
        return f"{value:.1f}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {v:,}" for k, v in value.items())
    joint = " x " if key == "image_size" else ", "
    return joint.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
