"""Charts as SVG text: curves, gains with their spread, gains against sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

COLORS = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee",
    "#aa3377", "#e69f00", "#000000", "#882255", "#999999",
)  # fmt: skip
FAINT = "#b8c0c8"
"""Of what is only there for comparison."""
STYLE = (
    "svg text { font-family: system-ui, sans-serif; font-size: 10px; fill: #57606a; } "
    "svg .title { font-size: 12px; font-weight: 600; fill: #1b1f24; } svg .grid { stroke: #eaeef2; } "
    "svg .front { stroke: #1b1f24; fill: none; stroke-dasharray: 4 3; }"
)
_LINE = 18  # pixels from one line of text to the next
_LETTER = 6.2  # and about one letter


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    color: str


@dataclass(frozen=True)
class Mark:
    """A point with its standard deviation in y."""

    name: str
    x: float
    y: float
    spread: float | None
    color: str


class _Axes:
    """Where values go on the paper, and the lines and numbers around them."""

    def __init__(
        self, x: Sequence[float], y: Sequence[float], size: tuple[int, int], *, logarithmic: bool = False
    ) -> None:
        self.size, self.logarithmic = size, logarithmic
        self.x, self.y = _span([self._scaled(value) for value in x]), _span(y)
        self.left, self.right, self.top, self.bottom = 46, size[0] - 12, 28, size[1] - 32

    def _scaled(self, x: float) -> float:
        return math.log10(x) if self.logarithmic else x

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixels."""
        return self._pixels(self._scaled(x), y)

    def _pixels(self, scaled: float, y: float) -> tuple[float, float]:
        across = (scaled - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return (
            self.left + across * (self.right - self.left),
            self.bottom - up * (self.bottom - self.top),
        )

    def _x_ticks(self) -> list[float]:
        low, high = self.x
        if not self.logarithmic:
            return ticks(low, high, 3)
        if high - low < 1:
            return ticks(10**low, 10**high, 3)
        steps = (1, 2, 5) if high - low < 3 else (1,)
        decades = range(math.floor(low), math.floor(high) + 1)
        return [step * 10.0**k for k in decades for step in steps if low <= math.log10(step) + k <= high]

    def parts(self, title: str, x_label: str) -> list[str]:
        """The beginning of a picture with title, grid and numbers."""
        parts = [
            _opening(title, *self.size),
            f'<text x="{self.left}" y="14" class="title">{escape(title)}</text>',
        ]
        for tick in ticks(*self.y):
            _, y = self._pixels(self.x[0], tick)
            line = f'x1="{self.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"'
            parts += [f'<line {line} class="grid"/>', _text(self.left - 4, y + 3, f"{tick:.6g}", "end")]
        for tick in self._x_ticks():
            x, _ = self.place(tick, self.y[0])
            parts.append(_text(x, self.bottom + 14, f"{tick:.6g}", "middle"))
        return [*parts, _text((self.left + self.right) / 2, self.size[1] - 4, x_label, "middle")]


def ticks(low: float, high: float, least: int = 4) -> list[float]:
    """Round numbers from low to high, so many or up to thrice that."""
    rough = (high - low) / least
    size = 10.0 ** math.floor(math.log10(rough))
    step = max(factor for factor in (1, 2, 5) if factor * size <= rough) * size
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _opening(title: str, width: float, height: float) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" role="img" '
        f'aria-label="{escape(title)}">'
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def chart(curves: Sequence[Curve], title: str, x_label: str, width: int = 380, height: int = 240) -> str:
    """A line chart; empty if there is nothing finite to draw. Curves in ``FAINT`` lie below the others."""
    points = [p for curve in curves for p in curve.points if np.isfinite(p[1])]
    if not points:
        return ""
    axes = _Axes([x for x, _ in points], [y for _, y in points], (width, height))
    parts = axes.parts(title, x_label)
    for curve in sorted(curves, key=lambda curve: curve.color != FAINT):
        path = " ".join("{:.1f},{:.1f}".format(*axes.place(*p)) for p in curve.points if np.isfinite(p[1]))
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{curve.color}" '
            f'stroke-width="{1 if curve.color == FAINT else 1.8}">'
            f"<title>{escape(curve.name)}</title></polyline>"
        )
    return "".join([*parts, "</svg>"])


def gains(marks: Sequence[Mark], title: str, width: int = 560) -> str:
    """One line per mark in the given order: its name, y as a dot, the standard deviation as a bar."""
    left, top, height = (
        8 + _LETTER * max(len(mark.name) for mark in marks),
        28,
        28 + _LINE * (len(marks) + 1) + 8,
    )
    ends = [mark.y + side * (mark.spread or 0.0) for mark in marks for side in (-1, 1)]
    low, high = _span([*ends, 0.0])
    bottom = top + _LINE * len(marks)

    def across(value: float) -> float:
        return left + 12 + (value - low) / (high - low) * (width - left - 24)

    parts = [_opening(title, width, height), f'<text x="8" y="14" class="title">{escape(title)}</text>']
    for tick in ticks(low, high):
        x = across(tick)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="{bottom}" class="grid"/>')
        parts.append(_text(x, bottom + 14, f"{tick:.6g}", "middle"))
    zero = across(0.0)
    parts.append(f'<line x1="{zero:.1f}" x2="{zero:.1f}" y1="{top - 6}" y2="{bottom}" stroke="#8c959f"/>')
    for line, mark in enumerate(marks):
        y, spread = top + _LINE * line + 6, mark.spread or 0.0
        x1, x2 = across(mark.y - spread), across(mark.y + spread)
        parts += [
            _text(left, y + 3, mark.name, "end"),
            f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y}" y2="{y}" stroke="{mark.color}" stroke-width="2"/>',
            f'<circle cx="{across(mark.y):.1f}" cy="{y}" r="4" fill="{mark.color}"/>',
        ]
    return "".join([*parts, "</svg>"])


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other beats: as small in x and as large in y, and better in one of them; by x."""
    chosen = [
        i
        for i, (x, y) in enumerate(points)
        if not any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)
    ]
    return sorted(chosen, key=lambda i: points[i])


def trade_off(marks: Sequence[Mark], title: str, x_label: str, width: int = 560, height: int = 340) -> str:
    """Marks with x to a logarithmic scale; the Pareto front (small x, large y) is filled, joined and named.

    Up to a dozen marks are all named. Those named show their standard deviation.
    """
    sides = [min(mark.x for mark in marks) / 1.1, max(mark.x for mark in marks) * 1.1]
    ends = [mark.y + side * (mark.spread or 0.0) for mark in marks for side in (-1, 1)]
    room = 0.05 * (max(ends) - min(ends))
    axes = _Axes(sides, [min(ends) - room, max(ends) + room], (width, height), logarithmic=True)
    best = front([(mark.x, mark.y) for mark in marks])
    path = " ".join("{:.1f},{:.1f}".format(*axes.place(marks[i].x, marks[i].y)) for i in best)
    parts = [*axes.parts(title, x_label), f'<polyline points="{path}" class="front"/>']
    taken: list[tuple[float, float, float]] = []
    for i, mark in sorted(enumerate(marks), key=lambda item: -item[1].y):
        named = i in best or len(marks) <= 12
        parts += _point(axes, mark, filled=i in best, taken=taken if named else None)
    return "".join([*parts, "</svg>"])


def _point(
    axes: _Axes, mark: Mark, *, filled: bool, taken: list[tuple[float, float, float]] | None
) -> list[str]:
    """A dot, and its name unless ``taken`` (left, right and base line of the names above it) is None."""
    spread = mark.spread or 0.0
    (x, y), (_, low), (_, high) = (axes.place(mark.x, mark.y + side * spread) for side in (0, -1, 1))
    fill = mark.color if filled else "#ffffff"
    parts = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{mark.color}" stroke-width="1.5">'
        f"<title>{escape(mark.name)}</title></circle>",
    ]
    if taken is not None:
        bar = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{mark.color}"/>'
        left = x > 0.7 * axes.right  # above or below, where the front, which ascends, does not run
        start, line = (x - 7 - _LETTER * len(mark.name), y - 6) if left else (x + 7, y + 13)
        end = start + _LETTER * len(mark.name)
        while any(a < end and start < b and abs(line - base) < 11 for a, b, base in taken):
            line += 2
        taken.append((start, end, line))
        name = _text(x - 7, line, mark.name, "end") if left else _text(start, line, mark.name)
        parts = [bar, *parts, name]
    return parts


def heat_maps(panels: Mapping[str, Mapping[str, Sequence[float]]], title: str, columns: int = 2) -> str:
    """Panels by title, each with named rows of shares from white (0) to blue (the largest of all).

    Numbers below count the cells of a row from 1.
    """
    cell, gap, rows = 14, 34, list(next(iter(panels.values())))
    most = max((v for panel in panels.values() for row in panel.values() for v in row), default=0.0)
    count = max(len(row) for panel in panels.values() for row in panel.values())
    left = 8 + _LETTER * max(map(len, rows))
    width, height = left + count * cell + 16, len(rows) * cell + gap
    lines = -(-len(panels) // columns)
    parts = [_opening(title, columns * width, 24 + lines * height)]
    parts.append(f'<text x="8" y="14" class="title">{escape(title)} (darkest: {most:.2g})</text>')
    for number, (name, panel) in enumerate(panels.items()):
        x, y = left + number % columns * width, 24 + number // columns * height + 14
        parts.append(_text(x, y - 4, name))
        for line, (row, values) in enumerate(panel.items()):
            parts.append(_text(x - 4, y + cell * (line + 1) - 3, row, "end"))
            parts += [
                f'<rect x="{x + k * cell:.1f}" y="{y + line * cell}" width="{cell - 1}" height="{cell - 1}" '
                f'fill="{COLORS[0]}" fill-opacity="{value / most if most else 0:.3f}" stroke="#eaeef2">'
                f"<title>{escape(row)}, {k + 1}: {value:.3g}</title></rect>"
                for k, value in enumerate(values)
            ]
        for k in range(0, count, 2 if count > 9 else 1):
            parts.append(_text(x + (k + 0.5) * cell, y + len(rows) * cell + 10, str(k + 1), "middle"))
    return "".join([*parts, "</svg>"])


def legend(names: Mapping[str, str]) -> str:
    """Colored names (name -> color) as HTML."""
    return " ".join(
        f'<span class="key"><i style="background:{color}"></i>{escape(name)}</span>'
        for name, color in names.items()
    )


def standalone(svg: str, names: Mapping[str, str]) -> str:
    """A chart as a file of its own: fonts, a white ground, and below it what its colors mean."""
    names = {name: color for name, color in names.items() if color in svg}
    width, height = map(int, re.findall(r'viewBox="0 0 (\d+) (\d+)"', svg)[0])
    parts, x, y = [], 8.0, height + 8
    for name, color in names.items():
        needed = 24 + _LETTER * len(name)
        if x + needed > width and x > 8:
            x, y = 8.0, y + _LINE
        parts.append(f'<rect x="{x:.1f}" y="{y}" width="14" height="4" fill="{color}"/>')
        parts.append(_text(x + 19, y + 5, name))
        x += needed + 8
    ground = '<rect width="100%" height="100%" fill="#ffffff"/>'
    below = y + _LINE if names else height
    opening = _opening("", width, below).replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"')
    return "".join([opening, f"<style>{STYLE}</style>", ground, svg, *parts, "</svg>"])
