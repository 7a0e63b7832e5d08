"""The page about runs, its charts and files."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from polytask.charts import COLORS, FAINT
from polytask.report import make_report, write_report
from tests.conftest import Make, rescored, reseeded, small, train_quietly


class Page(HTMLParser):
    """Collects tags and what they refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "data", "poster")]


def test_page_is_self_contained(runs: dict[str, Path], tmp_path: Path) -> None:
    page = tmp_path / "new" / "report.html"
    both = logged(runs["both"], tmp_path / "both", 1.0)
    comparison = write_report([both, runs["depth"], runs["scene"]], page, title="A <b>title</b>", panels=2)
    text = page.read_text()
    found = Page(text)
    assert len(comparison.rows) == 2
    for tag in ("table", "svg", "img", "polyline"):
        assert tag in found.tags
    assert found.tags.count("img") == 2
    assert all(link.startswith("data:image/png;base64,") for link in found.links)
    assert "script" not in found.tags
    assert "link" not in found.tags
    assert not re.search(r"url\(|@import|https?://", text)
    assert "A &lt;b&gt;title&lt;/b&gt;" in text
    for name in ("both", "single task (2 models)", "depth: rmse (lower is better)"):
        assert name in text
    assert "schema_version: 1" in text


def test_odd_names_do_not_break_the_page(runs: dict[str, Path], tmp_path: Path) -> None:
    odd = reseeded(runs["both"], tmp_path / "odd", {}, name="<script>alert('&')</script>")
    write_report([odd], tmp_path / "r.html", panels=1)
    assert "script" not in Page((tmp_path / "r.html").read_text()).tags


def test_page_without_panels(runs: dict[str, Path], tmp_path: Path) -> None:
    write_report([runs["both"]], tmp_path / "r.html", panels=0)
    assert "img" not in Page((tmp_path / "r.html").read_text()).tags


def test_score_that_is_missing(runs: dict[str, Path], tmp_path: Path, small: Make) -> None:
    nothing = rescored(runs["both"], tmp_path / "nothing", {"depth": None})  # type: ignore[dict-item]
    write_report([nothing, runs["both"]], tmp_path / "r.html", panels=0)
    assert "nan" in (tmp_path / "r.html").read_text()


STEPS = [
    {"loss/depth": 2.0, "loss/scene": 1.0, "stat/conflict": 0.0, "stat/cos/depth~scene": 0.1},
    {"loss/depth": 1.0, "loss/scene": 0.5, "stat/conflict": 1.0, "stat/cos/depth~scene": -0.1},
]


def logged(run: Path, folder: Path, factor: float, **recipe: Any) -> Path:
    """A copy of a run with two steps and two evaluations in its log."""
    reseeded(run, folder, {"depth": factor}, **recipe)
    steps = [
        {"kind": "step", "step": i, "seconds": i, "balancer": "b"}
        | {key: factor * value for key, value in step.items()}
        for i, step in enumerate(STEPS, 1)
    ]
    evals = [{"kind": "eval", "step": i, "depth/rmse": 1.0, "scene/accuracy": 5.0} for i in (1, 2)]
    lines = [json.dumps(line) for line in (*steps, *evals)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_charts(runs: dict[str, Path], tmp_path: Path) -> None:
    copies = [logged(runs["both"], tmp_path / f"{k}", k, seed=k) for k in (1, 2)]
    report = make_report([*copies, runs["depth"], runs["scene"]], panels=0)
    curves = {"score-depth", "loss-depth", "score-scene", "loss-scene", "conflict", "cosine-depth-scene"}
    assert set(report.charts) == curves  # two rows are too few for gains
    assert report.keys() == {"single task": "#000000", "both": COLORS[0]}


def test_curves_are_means_over_the_seeds(runs: dict[str, Path], tmp_path: Path) -> None:
    copies = [logged(runs["both"], tmp_path / f"{k}", k, seed=k) for k in (1, 3)]
    root = ET.fromstring(make_report(copies, panels=0).charts["loss-depth"])
    (line,) = root.iter("polyline")
    assert len(line.attrib["points"].split()) == 2
    heights = [e.text for e in root.iter("text") if e.attrib.get("text-anchor") == "end"]
    assert (heights[0], heights[-1]) == ("2", "4")  # from 2 to 1, once and thrice


def with_size(run: Path, folder: Path, size: int, **recipe: Any) -> Path:
    reseeded(run, folder, {"depth": 1.0, "scene": 5.0}, **recipe)
    cost = json.loads((folder / "cost.json").read_text()) | {"trainable": size}
    (folder / "cost.json").write_text(json.dumps(cost))
    return folder


def test_gains_and_sizes(runs: dict[str, Path], tmp_path: Path) -> None:
    singles = [runs["depth"], runs["scene"]]
    one, two = (with_size(runs["both"], tmp_path / f"{n}", n, name=f"n{n}") for n in (1000, 2000))
    assert set(make_report([one, two, *singles], panels=0).charts) >= {"gains", "pareto"}
    alike = with_size(runs["both"], tmp_path / "alike", 1000, name="alike")
    charts = make_report([one, alike, *singles], panels=0).charts
    assert "gains" in charts
    assert "pareto" not in charts
    assert not {"gains", "pareto"} & set(make_report([one, two], panels=0).charts)


def test_of_many_rows_the_best_stand_out(runs: dict[str, Path], tmp_path: Path) -> None:
    many = [
        logged(runs["both"], tmp_path / f"{k}", 1.0 + k, name=f"r{k}", optim={"lr": 1e-3 * (k + 1)})
        for k in range(12)
    ]
    report = make_report([*many, runs["depth"], runs["scene"]], panels=1)
    assert list(report.colors) == [f"r{k}" for k in range(8)]  # the smallest errors of depth
    assert report.keys()["others"] == FAINT
    assert report.charts["conflict"].count(FAINT) == 4
    (panel,) = report.panels
    assert panel.height < 32 * 14  # ground truth, single task and eight


def test_files(runs: dict[str, Path], tmp_path: Path) -> None:
    copies = [logged(runs["both"], tmp_path / f"{k}", k, seed=k) for k in (1, 2)]
    make_report(copies, panels=1).write_files(tmp_path / "out")
    assert (tmp_path / "out" / "table.md").read_text().startswith("| run | seeds |")
    figures = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert {"conflict.svg", "loss-depth.svg", "predictions-1.png"} <= figures
    for name in figures:
        if name.endswith(".svg"):
            assert ET.parse(tmp_path / "out" / "figures" / name).getroot().tag.endswith("svg")


def test_usage_of_experts(rooms: Path, tmp_path: Path) -> None:
    neck = "{type: mlore, gates: top_first, width: 8, ranks: [1, 2, 3], task_rank: 1, chosen: 2}"
    changes = f"model.neck={neck}", "model.head=upsampled", "model.adapter=null", "tasks=[semseg, depth]"
    run = tmp_path / "experts"
    train_quietly(small(*changes, "name=experts", "phases.0.steps=1"), run)
    charts = make_report([run], panels=0).charts
    root = ET.fromstring(charts["experts-experts"])
    told = [node.text or "" for node in root.iter() if node.tag.endswith("title")]
    assert len([text for text in told if text.startswith("semseg, 3: ")]) == 8  # modules
    first = [float(text.split(": ")[1]) for text in told if text.startswith("depth, ")][:3]
    assert abs(sum(first) - 1) < 1e-2
