"""Scores in training logs: run folders of ours, and what the official MTLoRA code prints while it trains."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from polytask.errors import DataError
from polytask.runs import Run


@dataclass(frozen=True)
class Measure:
    """The score of a task that counts, and its column in the history."""

    metric: str
    higher_is_better: bool
    column: str


PRINTED = {
    "semseg": Measure("mIoU", True, "SemSeg_mIoU"),
    "human_parts": Measure("mIoU", True, "Human_Parts_mIoU"),
    "saliency": Measure("mIoU", True, "Saliency_mIoU"),
    "normals": Measure("mean", False, "Normals_mean"),
    "depth": Measure("rmse", False, "Depth_rmse"),
    "edge": Measure("loss", False, "Edge_loss"),
}
"""What the official code prints."""
_OWN = PRINTED | {"edge": Measure("F_tol", True, "edge_F_tol")}
"""What a log of ours holds, where there is no recipe beside it."""

_NUMBER = r"([-+]?(?:(?:\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?|nan|inf(?:inity)?))(?![\w.])"
_EPOCH = re.compile(r"EPOCH (\d+) training takes")
_LINES = [
    (re.compile(rf"{words}:?\s*{_NUMBER}", re.IGNORECASE), task)
    for words, task in (
        ("Semantic Segmentation mIoU", "semseg"),
        ("Human Parts mIoU", "human_parts"),
        ("Edge Detection Loss", "edge"),
    )
]
_HEADER = re.compile(r"Results for (.+)", re.IGNORECASE)
_BLOCKS = [
    ("saliency", "saliency", re.compile(rf"\bmIoU:\s*{_NUMBER}", re.IGNORECASE)),
    ("surface normal", "normals", re.compile(rf"\bmean:\s*{_NUMBER}", re.IGNORECASE)),
    ("depth", "depth", re.compile(rf"\brmse\b:?\s*{_NUMBER}", re.IGNORECASE)),
]


@dataclass
class Part:
    """Scores in the order of a log, between two of its marks: an epoch, or a line of ours."""

    run: int
    epoch: int | None
    found: list[tuple[str, float, int]] = field(default_factory=list)  # task, value, line
    line: int = 0

    @property
    def when(self) -> str:
        """The epoch in words."""
        return "before the first epoch" if self.epoch is None else f"of epoch {self.epoch}"


@dataclass(frozen=True)
class Log:
    """What a log holds, and which score of a task counts in it."""

    path: Path
    measures: Mapping[str, Measure]
    parts: list[Part]
    open_line: int = 0
    """Number of the last line, if it has no end."""

    def tasks(self) -> list[str]:
        """What it reports, in order."""
        return list(dict.fromkeys(task for part in self.parts for task, _, _ in part.found))


def read_scores(path: Path) -> Log:
    """Scores in a run folder, a ``metrics.jsonl`` or a printed log.

    Raises:
        DataError: it cannot be read, is cut off, or holds no evaluation.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"log cannot be read ({error.strerror})", where=str(file)) from None
    own = file.suffix == ".jsonl" or text.lstrip()[:1] == "{"
    if own:
        measures = _own_measures(file)
        log = Log(path, measures, _with_gaps([*_own_parts(text, file, measures)]))
    else:
        lines = len(text.splitlines())
        log = Log(path, PRINTED, [*_printed_parts(text)], 0 if text[-1:] in ("", "\r", "\n") else lines)
    if not log.tasks():
        hint = "the official code prints its scores on stdout, not into log_rank0.txt"
        raise DataError("the log holds no evaluation", where=str(path), hint=None if own else hint)
    return log


def _own_measures(file: Path) -> Mapping[str, Measure]:
    if not (file.parent / "recipe.yaml").is_file():
        return _OWN
    tasks = Run(file.parent).tasks
    own = {name: (task.headline, task.higher_is_better) for name, task in tasks.items()}
    return {
        name: _OWN[name] if name in _OWN and _OWN[name].metric == metric
        else Measure(metric, higher, f"{name}_{metric}")
        for name, (metric, higher) in own.items()
    }  # fmt: skip


def _with_gaps(parts: list[Part]) -> list[Part]:
    """Scores that were not finite are not in our logs: they come back as NaN."""
    reported = dict.fromkeys(task for part in parts for task, _, _ in part.found)
    for part in parts:
        here = {task for task, _, _ in part.found}
        part.found += [(task, math.nan, part.line) for task in reported if task not in here]
    return parts


def _own_parts(text: str, file: Path, measures: Mapping[str, Measure]) -> Iterator[Part]:
    """Epochs go on from phase to phase; another run begins where steps go backwards."""
    lines = text.splitlines()
    keys = {f"{task}/{measure.metric}": task for task, measure in measures.items()}
    run, step, before, epoch, was = 0, 0, 0, 0, "step"
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            kind, now, here = entry["kind"], int(entry["step"]), int(entry["epoch"])
            found = [(task, float(entry[key]), number) for key, task in keys.items() if key in entry]
        except (ValueError, KeyError, TypeError):
            what = "the log is cut off" if number == len(lines) else "this is no line of a log"
            raise DataError(what, where=f"{file}:{number}", hint="remove this line") from None
        if now < step or (now == step and kind == "step"):
            run, before, epoch = run + 1, 0, 0
        elif here < epoch or (here == epoch and was == "eval"):
            before += epoch
        step, epoch, was = now, here, kind
        if kind == "eval":
            yield Part(run, before + here, found, number)


def _printed_parts(text: str) -> Iterator[Part]:
    part, block = Part(0, None), None
    for number, line in enumerate(text.splitlines(), 1):
        if mark := _EPOCH.search(line):
            yield part
            epoch, block = int(mark[1]), None
            part = Part(part.run + (part.epoch is not None and epoch <= part.epoch), epoch)
        elif header := _HEADER.search(line):
            block = next((b for b in _BLOCKS if header[1].lower().startswith(b[0])), None)
        elif hit := next(((task, m) for pattern, task in _LINES if (m := pattern.search(line))), None):
            part.found.append((hit[0], float(hit[1][1]), number))
        elif block is not None and (value := block[2].search(line)):
            part.found.append((block[1], float(value[1]), number))
            block = None
    yield part
