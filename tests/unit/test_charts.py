"""Charts as SVG."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polytask.charts import (
    FAINT,
    Curve,
    Mark,
    chart,
    front,
    gains,
    legend,
    standalone,
    ticks,
    trade_off,
)

SVG = "{http://www.w3.org/2000/svg}"
MARKS = [
    Mark("large & <good>", 4.0, 3.0, 0.5, "#111111"),
    Mark("small", 0.5, 1.0, None, "#222222"),
    Mark("beaten", 1.0, -2.0, 1.0, "#333333"),
]


def test_chart_is_valid_whatever_the_names() -> None:
    curves = [
        Curve("a<b & 'c'", [(0, 1.0), (10, float("nan")), (20, 3.0)], "#123456"),
        Curve("flat", [(5, 2.0)], "red"),
    ]
    svg = chart(curves, 'mIoU <& "best">', "step & more")
    root = ET.fromstring(svg)
    lines = [element for element in root.iter() if element.tag.endswith("polyline")]
    assert len(lines) == 2
    assert len(lines[0].attrib["points"].split()) == 2  # what is not finite is left out
    titles = [element.text for element in root.iter() if element.tag.endswith("title")]
    assert "a<b & 'c'" in titles


def test_nothing_to_draw() -> None:
    assert chart([], "t", "x") == ""
    assert chart([Curve("a", [(1, float("inf"))], "red")], "t", "x") == ""


def test_flat_and_single_points() -> None:
    for points in ([(1, 1.0)], [(0, 2.0), (1, 2.0)], [(0, 0.0)]):
        assert "polyline" in chart([Curve("a", points, "red")], "t", "x")


def test_legend_escapes() -> None:
    assert "a&lt;b" in legend({"a<b": "red"})


def test_curves_for_comparison_lie_below() -> None:
    curves = [Curve("seen", [(0, 1), (1, 2)], "red"), Curve("other", [(0, 1), (1, 3)], FAINT)]
    lines = [e for e in ET.fromstring(chart(curves, "t", "x")).iter() if e.tag == "polyline"]
    assert [line.attrib["stroke"] for line in lines] == [FAINT, "red"]
    assert [line.attrib["stroke-width"] for line in lines] == ["1", "1.8"]


def test_gains_show_value_and_spread() -> None:
    root = ET.fromstring(gains(MARKS, "title"))
    x = [float(e.attrib["cx"]) for e in root.iter("circle")]
    assert x[0] > x[1] > x[2]
    bars = [e.attrib for e in root.iter("line") if e.attrib.get("stroke-width") == "2"]
    widths = [float(bar["x2"]) - float(bar["x1"]) for bar in bars]
    scale = (x[0] - x[2]) / 5
    assert widths == pytest.approx([scale * 1, 0, scale * 2], abs=0.3)
    assert "large & <good>" in [e.text for e in root.iter("text")]


def test_front() -> None:
    assert front([(2, 5), (1, 1), (3, 4), (1, 2), (4, 5), (2, 5)]) == [3, 0, 5]
    assert front([]) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1))
def test_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    best = front([(float(x), float(y)) for x, y in points])
    for i, (x, y) in enumerate(points):
        beaten = any(a <= x and b >= y and (a < x or b > y) for a, b in points)
        assert (i in best) != beaten


def test_trade_off_fills_and_joins_the_front() -> None:
    root = ET.fromstring(trade_off(MARKS, "title", "millions"))
    fills = [e.attrib["fill"] for e in root.iter("circle")]
    assert fills == ["#111111", "#222222", "#ffffff"]
    (line,) = root.iter("polyline")
    assert len(line.attrib["points"].split()) == 2
    named = [e.text for e in root.iter("text")]
    assert {"large & <good>", "small", "beaten", "1", "2", "3", "4"} <= set(named)


def test_of_many_only_the_front_is_named() -> None:
    many = [*MARKS, *(Mark(f"m{i}", 8.0, -i, 0.1, "#444444") for i in range(20))]
    named = {e.text for e in ET.fromstring(trade_off(many, "t", "x")).iter("text")}
    assert "small" in named
    assert not {"beaten", "m3"} & named


def test_decades() -> None:
    marks = [Mark("a", 0.02, 0, None, "red"), Mark("b", 30, 1, None, "red")]
    texts = [e.text for e in ET.fromstring(trade_off(marks, "t", "x")).iter("text")]
    assert {"0.1", "1", "10"} <= set(texts)


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e6))
def test_ticks_are_few_and_inside(low: float, length: float) -> None:
    found = ticks(low, low + length)
    assert 3 <= len(found) <= 12
    slack = 1e-6 * (length + abs(low))
    assert low - slack <= found[0] <= found[-1] <= low + length + slack
    step = found[1] - found[0]
    assert round(step / 10 ** math.floor(math.log10(step * 1.001)), 3) in (1, 2, 5)


def test_a_file_of_its_own_has_fonts_and_a_legend_of_what_it_shows() -> None:
    svg = chart([Curve("a", [(0, 1), (1, 2)], "#123456")], "t", "x")
    assert "xmlns" not in svg  # pages have it inline
    text = standalone(
        svg, {"a<b": "#123456", "elsewhere": "#654321"} | {f"n{i}": "#123456" for i in range(20)}
    )
    root = ET.fromstring(text)
    assert root.tag == f"{SVG}svg"
    assert root.find(f"{SVG}style") is not None
    texts = [e.text for e in root.iter(f"{SVG}text")]
    assert "a<b" in texts
    assert "elsewhere" not in texts
    boxes = [e for e in root.findall(f"{SVG}rect")][1:]
    assert max(float(e.attrib["x"]) for e in boxes) < 380
    assert float(root.attrib["height"]) > max(float(e.attrib["y"]) for e in boxes)
