"""Gains out of logs: what the official code prints, appended logs, and logs of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from polytask.deltam import PAPER, History, history, write_csv
from polytask.errors import ConfigError, DataError, PolytaskError, PolytaskWarning, TaskMismatchError
from polytask.metrics import delta_m

SCORES = {"semseg": 68.38, "human_parts": 59.58, "saliency": 63.85, "normals": 16.76}
PRINTED = """
Semantic Segmentation mIoU: {semseg}

background          92.6226
aeroplane           80.0000

Results for Surface Normal Estimation
mean: {normals}
rmse: 99.0
mean_v2: 98.0
rmse_v2: 97.0

Results for Saliency Estimation
Beta maxF: 70.958
maxF: 72.142
mIoU: {saliency}

Human Parts mIoU: {human_parts}

background     62.6506
"""
DEPTH = "Results for depth prediction\nlog_rmse      0.2000\nrmse          0.6000\n"
ST = [f"{task}={value}" for task, value in PAPER.items() if task != "depth"]


def printed(**changes: Any) -> str:
    return PRINTED.format(**{**SCORES, **changes})


def mark(epoch: int) -> str:
    return f"[2024-06-06 10:00:00 swin] (main.py 300): INFO EPOCH {epoch} training takes 0:03:21\n"


@pytest.fixture
def log(tmp_path: Path) -> Any:
    def write(text: str, name: str = "train.log") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def epochs(found: History) -> list[int | None]:
    return [evaluation.epoch for evaluation in found.evaluations]


def test_every_evaluation_of_a_printed_log(log: Any) -> None:
    text = printed(semseg="2.5") + mark(0) + printed(semseg=60.0) + mark(1) + mark(2) + printed() + printed()
    found = history([log(text)], given=ST)
    assert epochs(found) == [None, 0, 2, 2]
    assert [e.scores["semseg"] for e in found.evaluations] == [2.5, 60.0, 68.38, 68.38]
    assert found.best.scores == SCORES
    assert found.best.delta_m == pytest.approx(1.77, abs=0.005)  # published with these scores
    assert found.best.delta_m == delta_m(SCORES, PAPER, ["normals"])


def test_depth_and_edge(log: Any) -> None:
    file = log(mark(3) + DEPTH + "Edge Detection Loss 0.512\n")
    found = history([file], given=["depth=0.5", "edge=0.5"])
    assert found.best.scores == {"depth": 0.6, "edge": 0.512}
    assert found.best.delta_m == pytest.approx(-11.2)


def test_numbers_in_any_notation(log: Any) -> None:
    file = log(printed(semseg="6.7e+01", human_parts="7", saliency="6.1E1", normals=".5"))
    scores = history([file], given=ST).best.scores
    assert scores == {"semseg": 67.0, "human_parts": 7.0, "saliency": 61.0, "normals": 0.5}


def test_appended_runs_are_told_apart(log: Any) -> None:
    one = mark(0) + printed(semseg=50.0) + mark(5) + printed(semseg=70.0)
    two = mark(0) + printed(semseg=55.0) + mark(0) + printed(semseg=52.0)
    found = history([log(one + two)], given=ST)
    runs = [evaluation.run.rpartition(" ")[2] for evaluation in found.evaluations]
    assert runs == ["1)", "1)", "2)", "3)"]
    assert [e.scores["semseg"] for e in found.best_of_runs()] == [70.0, 55.0, 52.0]
    assert found.best.epoch == 5


def test_order_and_lines_between_do_not_matter(log: Any) -> None:
    text = (
        printed().replace("mean: ", "noise nan\nrmse: 5\nmean: ").replace("mIoU: 63", "Human Parts\nmIoU: 63")
    )
    assert history([log(text)], given=ST).best.scores == SCORES


def test_tasks_are_those_with_a_baseline(log: Any) -> None:
    file = log(printed() + DEPTH)
    assert list(history([file], given=["human=61.93"]).measures) == ["human_parts"]
    assert list(history([file], given=ST).measures) == ["semseg", "normals", "saliency", "human_parts"]
    assert set(history([file], paper=True).baselines) == set(PAPER)
    assert set(history([log(printed(), "other.log")], paper=True).baselines) == set(SCORES)
    assert set(history([file], paper=True, tasks=["sal", "Normals_mean"]).baselines) == {
        "saliency",
        "normals",
    }


def test_baselines_precede_each_other(log: Any, tmp_path: Path) -> None:
    file = tmp_path / "st.json"
    file.write_text(json.dumps({"semseg": 60, "normals_rmse": 18.0, "human": "59"}))
    found = history([log(printed())], given=["semseg=61"], file=file, paper=True)
    assert found.baselines == {"semseg": 61.0, "normals": 18.0, "saliency": 62.35, "human_parts": 59.0}


def test_csv(log: Any, tmp_path: Path) -> None:
    text = printed(semseg=6.0) + mark(0) + printed(semseg=60.0) + mark(5) + printed()
    out = tmp_path / "history.csv"
    write_csv(history([log(text)], given=ST, tasks=["semseg", "human", "saliency", "normals"]), out)
    assert out.read_text().splitlines() == [
        "epoch,SemSeg_mIoU,Human_Parts_mIoU,Saliency_mIoU,Normals_mean,Delta_m_percent",
        ",6,59.58,63.85,16.76,-21.4320",
        "0,60,59.58,63.85,16.76,-1.3457",
        "5,68.38,59.58,63.85,16.76,1.7714",
        "",
        "BEST(epoch 5),68.38,59.58,63.85,16.76,1.7714",
    ]
    write_csv(history([log(text + mark(0) + printed(), "two.log")], given=["semseg=60"]), out)
    lines = out.read_text().splitlines()
    assert lines[0] == "run,epoch,SemSeg_mIoU,Delta_m_percent"
    assert [line.split(",")[1] for line in lines[-2:]] == ["BEST(epoch 5)", "BEST(epoch 0)"]
    with pytest.raises(ConfigError, match="--csv: history cannot be written"):
        write_csv(history([log(text)], given=ST), tmp_path / "nowhere" / "x.csv")


# --- logs of ours -----------------------------------------------------------------------------------------


def line(kind: str, step: int, epoch: int, **values: float) -> str:
    values = {name.replace("__", "/"): value for name, value in values.items()}
    return json.dumps({"kind": kind, "step": step, "phase": "train", "epoch": epoch, **values}) + "\n"


def test_log_of_a_run(trained: Path) -> None:
    entries = [json.loads(text) for text in (trained / "metrics.jsonl").read_text().splitlines()]
    last = [entry for entry in entries if entry["kind"] == "eval"][-1]
    for path in (trained, trained / "metrics.jsonl"):
        found = history([path], given=["scene=50", "depth=2"])
        assert found.best.scores == {"depth": last["depth/rmse"], "scene": last["scene/accuracy"]}
        assert found.best.epoch == 1
    assert found.measures["scene"].column == "scene_accuracy"


def test_phases_go_on_counting_and_steps_backwards_are_another_run(log: Any) -> None:
    text = (
        line("step", 1, 1) + line("eval", 1, 1, depth__rmse=1.0) + line("step", 2, 2)
        + line("eval", 2, 2, depth__rmse=0.9) + line("step", 3, 1) + line("eval", 3, 1, depth__rmse=0.8)
        + line("step", 4, 1) + line("eval", 4, 1, depth__rmse=0.8)
        + line("step", 1, 1) + line("eval", 1, 1, depth__rmse=0.7)
    )  # fmt: skip
    found = history([log(text, "metrics.jsonl")], given=["depth=1"])
    assert epochs(found) == [1, 2, 3, 4, 1]
    assert len(found.best_of_runs()) == 2


# --- refused -----------------------------------------------------------------------------------------------


def refused(kind: type[PolytaskError], match: str, *logs: Path, **options: Any) -> None:
    with pytest.raises(kind, match=match) as caught:
        history(logs, **{"given": ST, **options})
    assert len(str(caught.value).splitlines()) == 1


def test_logs_that_are_refused(log: Any, tmp_path: Path) -> None:
    whole = mark(0) + printed()
    refused(DataError, "holds no evaluation; the official code prints", log(mark(0) + mark(1)))
    refused(DataError, "holds no evaluation", log(line("step", 1, 1), "metrics.jsonl"))
    refused(DataError, "holds no evaluation", log(""))
    refused(DataError, "log cannot be read", tmp_path / "missing.log")
    refused(DataError, "log cannot be read", tmp_path.parent)  # a folder without a run
    refused(DataError, "cut off in the evaluation of epoch 1: it lacks saliency, human_parts",
            log(whole + mark(1) + printed().partition("Results for Sal")[0]))  # fmt: skip
    refused(
        DataError,
        "it lacks an end of its last line",
        log(mark(0) + printed().partition("\n\nbackground     62")[0]),
    )
    refused(DataError, "never reports a score of 'human_parts'", log(whole.replace("Human", "")))
    refused(DataError, r"semseg mIoU of epoch 0 is nan", log(mark(0) + printed(semseg="nan")))
    refused(
        DataError,
        r"train.log:9: normals mean of epoch 0 is -inf",
        log(mark(0) + printed(normals="-Inf")),
    )
    own = line("eval", 1, 1, depth__rmse=1.0, semseg__mIoU=50.0)
    depth: dict[str, Any] = {"given": ["depth=1"]}
    refused(DataError, "metrics.jsonl:2: the log is cut off", log(own + own[:9], "metrics.jsonl"), **depth)
    refused(DataError, "metrics.jsonl:1: this is no line", log("{}\n" + own, "metrics.jsonl"), **depth)
    gap = line("eval", 2, 2, semseg__mIoU=51.0)
    refused(
        DataError, "metrics.jsonl:2: depth rmse of epoch 2 is nan", log(own + gap, "metrics.jsonl"), **depth
    )
    edges = log(line("eval", 1, 1, edge__F_tol=60.0), "edges.jsonl")
    refused(TaskMismatchError, "different scores of 'edge'", log("Edge Detection Loss 0.5\n"), edges,
            given=["edge=1"])  # fmt: skip


def test_baselines_that_are_refused(log: Any, tmp_path: Path) -> None:
    file, other = log(printed()), tmp_path / "st.json"
    refused(ConfigError, "no single-task scores, expected some of semseg, normals", file, given=[])
    refused(ConfigError, "no single-task score of human_parts", file, given=["semseg=1"], tasks=["human"])
    refused(ConfigError, "name at least one log")
    refused(ConfigError, "a baseline looks like semseg=67.21", file, given=["train.log"])
    refused(ConfigError, "--baseline semseg: a score is a number", file, given=["semseg=x"])
    refused(ConfigError, "cannot be divided by", file, given=["semseg=0"])
    refused(ConfigError, "cannot be divided by", file, given=["semseg=nan"])
    refused(ConfigError, "baselines cannot be read", file, file=other)
    for text, match in (("{", "cannot be read"), ("[1]", "no mapping"), ('{"semseg": [1]}', "is a number")):
        other.write_text(text)
        refused(ConfigError, match, file, file=other)


def test_evaluation_of_a_killed_run_is_left_out(log: Any) -> None:
    half = printed().partition("Results for Sal")[0]
    file = log(mark(0) + printed() + mark(1) + half + mark(0) + printed())
    with pytest.warns(
        PolytaskWarning, match="of epoch 1 has no score of saliency, human_parts and is left out"
    ):
        found = history([file], given=ST)
    assert epochs(found) == [0, 0]
    twice = log(half + printed())
    with pytest.warns(PolytaskWarning, match="before the first epoch"):
        assert history([twice], given=ST).best.scores == SCORES
