"""The picture of ``balancers.py``: a panel per trunk and number of tasks, a row per method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

OURS, THEIRS = "#1f6fb4", "#d9822b"
LEFT, TOP, WIDTH, ROW, GAP = 84, 64, 250, 17, 26
DASHED = 'stroke="#888" stroke-dasharray="3 3"'
LOW, HIGH = 0.95, 2.0
"""Ratios that a panel shows; what is larger stands at its edge, with its number."""


def text(x: float, y: float, words: str, anchor: str = "start", color: str = "#222", size: int = 12) -> str:
    """A line of text."""
    look = f'text-anchor="{anchor}" fill="{color}" font-size="{size}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {look}>{words}</text>'


def line(x: tuple[float, float], y: tuple[float, float], look: str) -> str:
    """A straight one."""
    return f'<line x1="{x[0]:.1f}" x2="{x[1]:.1f}" y1="{y[0]:.1f}" y2="{y[1]:.1f}" {look}/>'


def place(left: float, ratio: float) -> float:
    """Where a ratio is, in a panel that begins at ``left``."""
    return left + (min(ratio, HIGH) - LOW) / (HIGH - LOW) * WIDTH


def dots(left: float, y: float, pair: Sequence[float | None]) -> list[str]:
    """Both sides of one method."""
    known = [(x, color) for x, color in zip(pair, (OURS, THEIRS), strict=True) if x]
    spots = [place(left, x) for x, _ in known]
    parts = [line((min(spots), max(spots)), (y, y), 'stroke="#bbb"')] if spots else []
    for (ratio, color), x in reversed([*zip(known, spots, strict=True)]):  # ours over theirs
        parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="4.2" fill="{color}"/>')
        if ratio > HIGH:
            parts.append(text(x - 8, y + 4, f"{ratio:.1f}", "end", color, 11))
    return parts


def panel(
    left: float, top: float, title: str, rows: Sequence[Sequence[float | None]], target: float
) -> list[str]:
    """One panel: grid, target and dots."""
    bottom = top + ROW * len(rows)
    parts = [text(left, top - 8, title, color="#222", size=13)]
    for ratio in (1.0, 1.25, 1.5, 1.75, 2.0):
        x = place(left, ratio)
        parts.append(line((x, x), (top, bottom), f'stroke="{"#888" if ratio == 1 else "#e4e4e4"}"'))
        parts.append(text(x, bottom + 14, f"{ratio:g}", "middle", "#666", 11))
    x = place(left, target)
    parts.append(line((x, x), (top, bottom), DASHED))
    for number, pair in enumerate(rows):
        parts += dots(left, top + ROW * (number + 0.5), pair)
    return parts


def plot(
    file: Path,
    panels: Mapping[str, Mapping[str, Sequence[float | None]]],
    across: int,
    target: float,
) -> None:
    """Write an SVG.

    Args:
        file: where to.
        panels: for each title the ratios of each method, ours and theirs.
        across: panels in a row.
        target: of ours, marked.
    """
    names = list(next(iter(panels.values())))
    high, deep = ROW * len(names) + 62, -(-len(panels) // across)
    width, height = LEFT + max(across, 2) * (WIDTH + GAP), TOP + deep * high
    label = "Step times of balancers over the floor of their passes, here and in torchjd"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{label}" font-family="Helvetica, Arial, sans-serif">',
        f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>',
        text(LEFT, 24, "time of a step / floor", size=13),
        *(f'<circle cx="{LEFT + x}" cy="20" r="4.2" fill="{c}"/>' + text(LEFT + x + 9, 24, w, size=13)
          for x, c, w in ((170, OURS, "polytask"), (260, THEIRS, "torchjd"))),
        line((LEFT + 345, LEFT + 369), (20, 20), DASHED),
        text(LEFT + 375, 24, f"target, {target:g}", size=13),
    ]  # fmt: skip
    for number, (title, rows) in enumerate(panels.items()):
        top, column = TOP + number // across * high, number % across
        if not column:
            parts += [text(LEFT - 10, top + ROW * (i + 0.5) + 4, name, "end") for i, name in enumerate(names)]
        parts += panel(LEFT + column * (WIDTH + GAP), top, title, list(rows.values()), target)
    file.write_text("\n".join([*parts, "</svg>"]) + "\n")
