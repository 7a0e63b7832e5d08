"""Comparison of runs: rows over seeds, gains, what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from polytask.comparison import compare
from polytask.errors import CheckpointError, ConfigError, PolytaskWarning, TaskMismatchError
from polytask.runs import Run
from polytask.tables import markdown
from tests.conftest import rescored, reseeded


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
        compare([tmp_path / "nowhere"])


def test_other_tasks(runs: dict[str, Path], trained: Path) -> None:
    with pytest.raises(TaskMismatchError, match="runs have different tasks"):
        compare([runs["both"], trained])


def test_runs_of_one_name_are_told_apart(runs: dict[str, Path], tmp_path: Path) -> None:
    other = rescored(runs["both"], tmp_path / "other", {})
    rows = compare([runs["both"], other]).rows
    assert [row.name for row in rows] == [f"both ({runs['both']})", f"both ({other})"]


def seeds(runs: dict[str, Path], folder: Path, scores: dict[str, list[dict[str, float]]]) -> list[Path]:
    """Copies of runs, one for each seed from 0 on, with these headline scores."""
    return [
        reseeded(runs[name], folder / f"{name}-{seed}", of_seed, seed=seed)
        for name, of_seeds in scores.items()
        for seed, of_seed in enumerate(of_seeds)
    ]


BOTH = [{"depth": 3.0, "scene": 30.0}, {"depth": 4.0, "scene": 60.0}]


def test_runs_that_differ_in_the_seed_are_one_row(runs: dict[str, Path], tmp_path: Path) -> None:
    folders = seeds(runs, tmp_path, {"both": BOTH})
    other = reseeded(runs["both"], tmp_path / "other", {}, name="other", seed=5)
    rows = compare([folders[1], other, folders[0]]).rows
    assert [(row.name, row.seeds) for row in rows] == [("both", (0, 1)), ("other", (5,))]
    assert rows[0].scores == {"depth": 3.5, "scene": 45.0}
    assert rows[0].spreads == pytest.approx({"depth": np.sqrt(0.5), "scene": np.sqrt(450)})
    assert rows[1].spreads == {}
    assert rows[0].total == rows[1].total


def test_gains_are_over_the_baselines_of_the_same_seed(runs: dict[str, Path], tmp_path: Path) -> None:
    single = {"depth": [{"depth": 4.0}, {"depth": 5.0}], "scene": [{"scene": 40.0}, {"scene": 50.0}]}
    folders = seeds(runs, tmp_path, {"both": BOTH, **single})
    row, multi = compare(folders).rows
    gains = [(25 - 25) / 2, (20 + 20) / 2]
    assert multi.delta_m == pytest.approx(np.mean(gains))
    assert multi.delta_m_spread == pytest.approx(np.std(gains, ddof=1))
    assert (row.delta_m, row.seeds, row.scores) == (0.0, (0, 1), {"depth": 4.5, "scene": 45.0})
    assert row.spreads == pytest.approx({"depth": np.sqrt(0.5), "scene": np.sqrt(50)})
    assert row.total == sum(Run(runs[name]).cost["total"] for name in single)


def test_without_them_over_the_mean_of_the_baselines(runs: dict[str, Path], tmp_path: Path) -> None:
    single = {"depth": [{"depth": 4.0}, {"depth": 6.0}], "scene": [{"scene": 40.0}]}
    multi = compare(seeds(runs, tmp_path, {"both": BOTH, **single})).rows[1]
    gains = [(25 - 25) / 2, (100 * (1 - 4 / 5) + 50) / 2]  # seed 0 has both, seed 1 only depth
    assert multi.delta_m == pytest.approx(np.mean(gains))


def test_baselines_of_two_recipes(runs: dict[str, Path], tmp_path: Path) -> None:
    other = reseeded(runs["depth"], tmp_path / "other", {}, seed=1, optim={"lr": 0.5})
    with pytest.raises(ConfigError, match=r"two single-task runs have the same task.*once with each seed"):
        compare([runs["depth"], other])


def test_folder_of_runs(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = runs["both"].parent
    (tmp_path / "notes.txt").write_text("x")
    assert compare([folder]) == compare([*sorted(folder.iterdir())])


def with_log(run: Path, folder: Path, steps: list[dict[str, float]]) -> Path:
    rescored(run, folder, {})
    lines = [json.dumps({"kind": "step", "step": i, **step}) for i, step in enumerate(steps, 1)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_time_and_conflicts_of_a_step(runs: dict[str, Path], tmp_path: Path) -> None:
    steps = [{"seconds": 5.0, "cpu_seconds": 9.0}, {"seconds": 6.0, "cpu_seconds": 9.5}]
    steps += [{"seconds": 9.0, "cpu_seconds": 9.7, "stat/conflict": 1.0}]
    run = with_log(runs["both"], tmp_path / "a", [*steps, {**steps[2], "stat/conflict": 0.0}])
    assert Run(run).conflict == 0.5
    assert Run(run).step_seconds == pytest.approx(0.7 / 3)  # the first warms up
    old = with_log(runs["both"], tmp_path / "b", [{"seconds": 5.0}, {"seconds": 6.0}])
    assert Run(old).step_seconds == 1.0
    assert Run(old).conflict is None
    rows = compare([run, old]).rows
    assert [row.conflict for row in rows] == [0.5, None]
    assert [row.step_ms for row in rows] == pytest.approx([700 / 3, 1000])
    assert compare([with_log(runs["both"], tmp_path / "c", steps[:1])]).rows[0].step_ms is None


def test_what_training_logs_of_time_and_balancer(runs: dict[str, Path]) -> None:
    run = Run(runs["both"])
    assert run.balancer.startswith("fixed: one backward pass per step")
    assert all(line["cpu_seconds"] > 0 for line in run.log if line["kind"] == "step")


def test_markdown(runs: dict[str, Path], tmp_path: Path) -> None:
    single = {"depth": [{"depth": 4.0}, {"depth": 5.0}], "scene": [{"scene": 40.0}, {"scene": 50.0}]}
    folders = seeds(runs, tmp_path, {"both": BOTH, **single})
    worse = reseeded(runs["both"], tmp_path / "worse", {"depth": 9.0, "scene": 9.0}, name="a|b")
    head, rule, *lines = markdown(compare([worse, *folders])).splitlines()[:5]
    assert head.startswith("| run | seeds | depth rmse ↓ | scene accuracy ↑ | Δm % ↑ | ms/step | conflict |")
    assert rule.count("|") == head.count("|")
    assert lines[0].startswith("| both | 2 | 3.50 ± 0.71 | 45.00 ± 21.21 | +10.00 ± 14.14 |")
    assert lines[1].startswith("| single task (2 models) | 2 | 4.50 ± 0.71 | 45.00 ± 7.07 | +0.00 |")
    assert lines[2].startswith(r"| a\|b | 1 | 9.00 | 9.00 | -")
