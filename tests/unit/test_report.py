"""Comparison of runs, as a table and as a page."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from polytask.errors import CheckpointError, ConfigError, PolytaskWarning, TaskMismatchError
from polytask.files import dump_yaml, load_yaml
from polytask.report import compare, write_report
from polytask.runs import Run
from tests.conftest import Make, train_quietly


@pytest.fixture(scope="module")
def runs(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A multi-task run and the two single-task ones."""
    from tests.conftest import small

    folder = tmp_path_factory.mktemp("runs")
    for name, tasks in (("both", "[depth, scene]"), ("depth", "[depth]"), ("scene", "[scene]")):
        train_quietly(small(f"tasks={tasks}", f"name={name}", "phases.0.steps=1"), folder / name)
    scores = json.loads((folder / "scene" / "scores.json").read_text())
    scores["scores"]["scene"]["accuracy"] = 12.5  # after one step it may be zero, which allows no gain
    (folder / "scene" / "scores.json").write_text(json.dumps(scores))
    return {path.name: path for path in folder.iterdir()}


def rescored(run: Path, folder: Path, scores: dict[str, float], **changes: Any) -> Path:
    """A copy of a run with other headline scores; changes go into ``scores.json``."""
    shutil.copytree(run, folder, symlinks=True)
    content = json.loads((folder / "scores.json").read_text()) | changes
    for task, value in scores.items():
        content["scores"][task][content["tasks"][task]["headline"]] = value
    (folder / "scores.json").write_text(json.dumps(content))
    return folder


def renamed(run: Path, folder: Path, name: str) -> Path:
    shutil.copytree(run, folder, symlinks=True)
    (folder / "recipe.yaml").write_text(dump_yaml({**load_yaml(run / "recipe.yaml"), "name": name}))
    return folder


def test_gain_counts_each_task_in_its_direction(runs: dict[str, Path], tmp_path: Path) -> None:
    both = rescored(runs["both"], tmp_path / "both", {"depth": 3.0, "scene": 30.0})
    depth = rescored(runs["depth"], tmp_path / "depth", {"depth": 4.0})
    scene = rescored(runs["scene"], tmp_path / "scene", {"scene": 40.0})
    comparison = compare([scene, both, depth])
    assert comparison.tasks == {"depth": ("rmse", False), "scene": ("accuracy", True)}
    single, multi = comparison.rows
    assert multi.delta_m == pytest.approx((25 - 25) / 2)
    better = rescored(runs["both"], tmp_path / "better", {"depth": 3.0, "scene": 50.0})
    assert compare([better, depth, scene]).rows[1].delta_m == pytest.approx((25 + 25) / 2)
    worse = rescored(runs["both"], tmp_path / "worse", {"depth": 5.0, "scene": 20.0})
    assert compare([worse, depth, scene]).rows[1].delta_m == pytest.approx((-25 - 50) / 2)
    assert single.delta_m == 0
    assert single.name == "single task (2 models)"
    assert single.scores == {"scene": 40.0, "depth": 4.0}
    assert single.total == Run(depth).cost["total"] + Run(scene).cost["total"]
    assert single.macs == Run(depth).cost["macs_merged"] + Run(scene).cost["macs_merged"]
    assert (multi.steps, single.steps) == (1, 2)


def test_no_gain_without_all_baselines(runs: dict[str, Path]) -> None:
    assert compare([runs["both"]]).rows[0].delta_m is None
    single, multi = compare([runs["both"], runs["depth"]]).rows
    assert (single.delta_m, multi.delta_m) == (None, None)
    assert compare([runs["depth"]]).rows[0].name == "single task (1 models)"


def test_baseline_of_zero_is_told(runs: dict[str, Path], tmp_path: Path) -> None:
    scene = rescored(runs["scene"], tmp_path / "scene", {"scene": 0.0})
    with pytest.warns(PolytaskWarning, match="no average gain for .*both.*scene"):
        assert compare([runs["both"], runs["depth"], scene]).rows[1].delta_m is None


def test_what_cannot_be_compared(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare([])
    with pytest.raises(ConfigError, match="named twice"):
        compare([runs["both"], runs["both"]])
    with pytest.raises(ConfigError, match="two single-task runs have the same task"):
        compare([runs["depth"], rescored(runs["depth"], tmp_path / "again", {})])
    with pytest.raises(TaskMismatchError, match=r"different data \(samples\), expected 8, got 7"):
        compare([runs["both"], rescored(runs["depth"], tmp_path / "fewer", {}, samples=7)])
    with pytest.raises(TaskMismatchError, match=r"different data \(split\)"):
        compare([runs["both"], rescored(runs["depth"], tmp_path / "split", {}, split="test")])
    with pytest.raises(CheckpointError, match="no run folder"):
        compare([tmp_path])


def test_other_tasks(runs: dict[str, Path], trained: Path) -> None:
    with pytest.raises(TaskMismatchError, match="runs have different tasks"):
        compare([runs["both"], trained])


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
    comparison = write_report(list(runs.values()), page, title="A <b>title</b>", panels=2)
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


def test_runs_of_one_name_are_told_apart(runs: dict[str, Path], tmp_path: Path) -> None:
    other = rescored(runs["both"], tmp_path / "other", {})
    rows = compare([runs["both"], other]).rows
    assert [row.name for row in rows] == [f"both ({runs['both']})", f"both ({other})"]
    write_report([runs["both"], other], tmp_path / "r.html", panels=1)
    assert (tmp_path / "r.html").read_text().count("<details>") == 2


def test_odd_names_do_not_break_the_page(runs: dict[str, Path], tmp_path: Path) -> None:
    odd = renamed(runs["both"], tmp_path / "odd", "<script>alert('&')</script>")
    write_report([odd], tmp_path / "r.html", panels=1)
    assert "script" not in Page((tmp_path / "r.html").read_text()).tags


def test_page_without_panels(runs: dict[str, Path], tmp_path: Path) -> None:
    write_report([runs["both"]], tmp_path / "r.html", panels=0)
    assert "img" not in Page((tmp_path / "r.html").read_text()).tags


def test_score_that_is_missing(runs: dict[str, Path], tmp_path: Path, small: Make) -> None:
    nothing = rescored(runs["both"], tmp_path / "nothing", {"depth": None})  # type: ignore[dict-item]
    write_report([nothing, runs["both"]], tmp_path / "r.html", panels=0)
    assert "nan" in (tmp_path / "r.html").read_text()
