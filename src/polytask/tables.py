"""Tables for people, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from polytask.data.base import VerifyReport
    from polytask.report import Comparison


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


def print_verification(report: VerifyReport) -> None:
    """What is in a dataset; the problems are not here."""
    table("samples", ["split", "count"], [(split, str(count)) for split, count in report.counts.items()])
    labels = [
        (task, ", ".join([f"{v}: {n}" for v, n in sorted(seen.items())][:300]) + " …" * (len(seen) > 300))
        for task, seen in report.histograms.items()
    ]
    labels += [(task, f"{low:.4g} to {high:.4g}") for task, (low, high) in report.ranges.items()]
    table("labels", ["task", "values (pixels or images)"], labels)


def print_comparison(comparison: Comparison) -> None:
    """The table of a comparison."""
    heads = [f"{task} {metric} {'↑' if up else '↓'}" for task, (metric, up) in comparison.tasks.items()]
    rows = [
        [
            row.name,
            *(f"{row.scores[task]:.2f}" if task in row.scores else "-" for task in comparison.tasks),
            "-" if row.delta_m is None else f"{row.delta_m:+.2f}",
            f"{row.trainable / 1e6:.3f}",
            f"{row.total / 1e6:.3f}",
            f"{row.macs / 1e9:.3f}",
            f"{row.train_seconds:.0f}",
        ]
        for row in comparison.rows
    ]
    table("comparison", ["run", *heads, "Δm % ↑", "trainable M", "parameters M", "GMACs", "train s"], rows)


def print_cost(figures: Mapping[str, object]) -> None:
    """A cost report."""
    rows = [(key.replace("_", " "), _readable(key, value)) for key, value in figures.items()]
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
