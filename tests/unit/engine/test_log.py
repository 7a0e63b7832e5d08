"""The log of a run and other trackers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from polytask.engine.log import RunLog, check_trackers, make_trackers, read_log, truncate
from polytask.errors import MissingDependencyError
from tests.conftest import Make, train_quietly


class Recorder:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.closed = False

    def log(self, values: Any, step: int) -> None:
        self.lines.append((step, dict(values)))

    def close(self) -> None:
        self.closed = True


def test_lines_and_trackers(tmp_path: Path) -> None:
    tracker = Recorder()
    log = RunLog(tmp_path / "m.jsonl", 0, [tracker])
    log.write("step", 1, {"loss/a": 0.5, "phase": "train", "epoch": 1, "bad": float("nan"), "flag": True})
    log.write("eval", 1, {"a/mIoU": 3.0})
    assert len(read_log(tmp_path / "m.jsonl")) == 2  # on disk at once
    log.close()
    assert tracker.lines == [(1, {"loss/a": 0.5, "epoch": 1.0}), (1, {"a/mIoU": 3.0})]
    assert tracker.closed
    first = {"kind": "step", "step": 1, "loss/a": 0.5, "phase": "train", "epoch": 1, "flag": True}
    assert read_log(tmp_path / "m.jsonl")[0] == first


def test_going_on_drops_later_lines_and_goes_into_the_same_file(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    log = RunLog(file)
    for step in (1, 2, 3):
        log.write("step", step, {})
    log.close()
    log = RunLog(file, 2)
    log.write("step", 3, {"again": 1})
    log.close()
    assert [line["step"] for line in read_log(file)] == [1, 2, 3]
    assert read_log(file)[2]["again"] == 1
    RunLog(file).close()
    assert read_log(file) == []


@pytest.mark.parametrize(
    "tail", [b'{"kind": "st', b"\x00\x00", b'{"kind": "step"}', b"3\n", b"\xff\xfe", b"\n\n"]
)
def test_damaged_end(tmp_path: Path, tail: bytes) -> None:
    file = tmp_path / "m.jsonl"
    file.write_bytes(b'{"kind": "step", "step": 1}\n' + tail)
    assert [line["step"] for line in read_log(file)] == [1]
    truncate(file, 5)
    assert file.read_bytes() == b'{"kind": "step", "step": 1}\n'


def test_no_file_is_an_empty_log(tmp_path: Path) -> None:
    truncate(tmp_path / "none", 3)
    assert read_log(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("tracker", "package", "extra"),
    [
        ("tensorboard", "torch.utils.tensorboard", "tb"),
        ("wandb", "wandb", "wandb"),
        ("trackio", "trackio", "trackio"),
        ("mlflow", "mlflow", "mlflow"),
    ],
)
def test_missing_package(
    small: Make,
    rooms: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tracker: str,
    package: str,
    extra: str,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'polytask\[{extra}\]'"):
        check_trackers([tracker])
    with pytest.raises(MissingDependencyError):
        make_trackers([tracker], tmp_path, {})
    run = tmp_path / "run"
    with pytest.raises(MissingDependencyError):
        train_quietly(small(f"run.trackers=[{tracker}]"), run)
    assert not run.exists()  # so that the same command works after installing


def test_tensorboard(small: Make, rooms: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed")
    train_quietly(small("run.trackers=[tensorboard]"), tmp_path / "run")
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    content = events.read_bytes()
    for name in (b"loss/semseg", b"lr", b"semseg/mIoU", b"weight/depth"):
        assert name in content


class FakeRun:
    """What wandb.init returns."""

    def __init__(self) -> None:
        self.logged: list[Any] = []

    def log(self, values: Any, step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.logged.append("finished")


def test_wandb_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, started = FakeRun(), {}

    class Package:
        @staticmethod
        def init(**options: Any) -> FakeRun:
            started.update(options)
            return run

    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, Package)  # type: ignore[arg-type]
        (tracker,) = make_trackers([name], tmp_path / "run7", {"seed": 1})
        tracker.log({"a": 1.0}, 3)
        tracker.close()
        assert run.logged[-2:] == [(3, {"a": 1.0}), "finished"]
        assert started["name"] == "run7"
        assert started["config"] == {"seed": 1}


def test_mlflow_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Package:
        @staticmethod
        def start_run(run_name: str) -> None:
            calls.append(run_name)

        @staticmethod
        def log_param(name: str, value: Any) -> None:
            calls.append((name, value))

        @staticmethod
        def log_metrics(values: Any, step: int) -> None:
            calls.append((step, values))

        @staticmethod
        def end_run() -> None:
            calls.append("end")

    monkeypatch.setitem(sys.modules, "mlflow", Package)  # type: ignore[arg-type]
    (tracker,) = make_trackers(["mlflow"], tmp_path / "run7", {"name": "r"})
    tracker.log({"a": 1.0}, 3)
    tracker.close()
    assert calls == ["run7", ("recipe", "r"), (3, {"a": 1.0}), "end"]
