"""The log of a run: one JSON object per line, always on; other trackers on request."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from polytask.errors import MissingDependencyError


class Tracker(Protocol):
    """Somewhere else that figures go."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record figures of one step."""

    def close(self) -> None:
        """Flush and end."""


class RunLog:
    """``metrics.jsonl`` plus trackers. Lines have ``kind`` (``step`` or ``eval``) and ``step``.

    Args:
        path: the file.
        step: the step to go on from; lines of later ones are dropped.
        trackers: where figures go besides.
    """

    def __init__(self, path: Path, step: int = 0, trackers: Sequence[Tracker] = ()) -> None:
        truncate(path, step)
        self.trackers = trackers
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line and pass the numbers on; what is not finite (nothing valid seen) is left out."""
        values = {k: v for k, v in values.items() if not isinstance(v, float) or math.isfinite(v)}
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        numbers = {
            k: float(v) for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)
        }
        for tracker in self.trackers:
            tracker.log(numbers, step)

    def close(self) -> None:
        """Close the file and the trackers."""
        self._file.close()
        for tracker in self.trackers:
            tracker.close()


def truncate(path: Path, step: int) -> None:
    """Drop lines after ``step`` and a half-written last line, so that a resumed run repeats nothing."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if _step_of(line) <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def read_log(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a log."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if _step_of(line) < float("inf")]


def make_trackers(names: Sequence[str], run: Path, settings: Mapping[str, Any]) -> list[Tracker]:
    """The named trackers.

    Raises:
        MissingDependencyError: its package is not installed.
    """
    return [_TRACKERS[name](run, settings) for name in names]


def check_trackers(names: Sequence[str]) -> None:
    """Raise MissingDependencyError unless the package of every named tracker is installed."""
    for name in names:
        _package(*_PACKAGES[name])


def _package(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"tracker needs the package {module.split('.')[0]!r} ({error})", where="run.trackers",
            hint=f"pip install 'polytask[{extra}]'",
        ) from None  # fmt: skip


class TensorBoard:
    """Event files in ``<run>/tensorboard``."""

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:  # noqa: ARG002
        self.writer = _package(*_PACKAGES["tensorboard"]).SummaryWriter(str(run / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One scalar per figure."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the event file."""
        self.writer.close()


class WandbLike:
    """Weights & Biases, or trackio, which copies its interface."""

    def __init__(self, module: str, run: Path, settings: Mapping[str, Any]) -> None:
        package = _package(*_PACKAGES[module])
        folder = {"dir": str(run)} if module == "wandb" else {}
        self.run = package.init(project="polytask", name=run.name, config=dict(settings), **folder)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One call per step."""
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


class MLflow:
    """An MLflow run under the ambient tracking URI."""

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        self.mlflow = _package(*_PACKAGES["mlflow"])
        self.mlflow.start_run(run_name=run.name)
        self.mlflow.log_param("recipe", settings.get("name", run.name))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One call per step; MLflow allows no spaces but slashes in names."""
        self.mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        """End the run."""
        self.mlflow.end_run()


_PACKAGES = {
    "tensorboard": ("torch.utils.tensorboard", "tb"),
    "wandb": ("wandb", "wandb"),
    "trackio": ("trackio", "trackio"),
    "mlflow": ("mlflow", "mlflow"),
}
_TRACKERS: dict[str, Any] = {
    "tensorboard": TensorBoard,
    "wandb": lambda run, settings: WandbLike("wandb", run, settings),
    "trackio": lambda run, settings: WandbLike("trackio", run, settings),
    "mlflow": MLflow,
}
