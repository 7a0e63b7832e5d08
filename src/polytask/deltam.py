"""Average relative gain at every evaluation of training logs, with its history as CSV.

With the tasks, options and columns of a script in a fork of the official MTLoRA code.
"""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polytask.errors import ConfigError, DataError, PolytaskError, PolytaskWarning, TaskMismatchError
from polytask.files import write_text
from polytask.logs import PRINTED, Log, Measure, Part, read_scores
from polytask.metrics.delta import delta_m

PAPER = {"semseg": 67.21, "human_parts": 61.93, "saliency": 62.35, "normals": 17.97, "depth": 0.6436}
"""Single-task models (Swin-T) of the paper on PASCAL-Context; depth as the fork of its code has it."""
_ALIASES = {m.column.lower(): task for task, m in PRINTED.items()} | {
    "human": "human_parts", "parts": "human_parts", "sal": "saliency", "normals_rmse": "normals",
}  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """Scores of one evaluation and their gain in percent; no epoch before the first one."""

    run: str
    epoch: int | None
    scores: dict[str, float]
    delta_m: float


@dataclass(frozen=True)
class History:
    """All evaluations of the logs, in their order."""

    measures: dict[str, Measure]
    baselines: dict[str, float]
    evaluations: list[Evaluation]

    @property
    def best(self) -> Evaluation:
        """The one with the largest gain."""
        return max(self.evaluations, key=lambda evaluation: evaluation.delta_m)

    def best_of_runs(self) -> list[Evaluation]:
        """The best of each run."""
        runs = dict.fromkeys(evaluation.run for evaluation in self.evaluations)
        return [max((e for e in self.evaluations if e.run == run), key=lambda e: e.delta_m) for run in runs]

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        tasks = {
            task: {
                "metric": measure.metric,
                "higher_is_better": measure.higher_is_better,
                "baseline": self.baselines[task],
            }
            for task, measure in self.measures.items()
        }
        return {"tasks": tasks, "evaluations": [*map(vars, self.evaluations)], "best": vars(self.best)}

    def csv(self) -> str:
        """A row per evaluation, a blank one, the best of each run; with several, a column for the run."""
        best, text = self.best_of_runs(), io.StringIO()
        writer, several = csv.writer(text, lineterminator="\n"), len(best) > 1
        columns = [measure.column for measure in self.measures.values()]
        writer.writerow([*["run"] * several, "epoch", *columns, "Delta_m_percent"])

        def row(evaluation: Evaluation, epoch: str) -> list[str]:
            values = [f"{evaluation.scores[task]:.10g}" for task in self.measures]
            return [*[evaluation.run] * several, epoch, *values, f"{evaluation.delta_m:.4f}"]

        writer.writerows(row(e, "" if e.epoch is None else str(e.epoch)) for e in self.evaluations)
        writer.writerow([])
        writer.writerows(row(e, f"BEST(epoch {'-' if e.epoch is None else e.epoch})") for e in best)
        return text.getvalue()


def history(
    logs: Sequence[Path],
    *,
    given: Sequence[str] = (),
    file: Path | None = None,
    paper: bool = False,
    tasks: Sequence[str] = (),
) -> History:
    """Gains over single-task scores at every evaluation in some logs.

    Args:
        logs: run folders, ``metrics.jsonl`` files, or text printed by the official code. Where its epochs go
            backwards another run begins; what is evaluated before that run's first epoch counts to the last
            epoch of the run before.
        given: baselines ``task=score``, which precede those of ``file``, and those the paper's.
        file: JSON with baselines by task.
        paper: take ``PAPER`` for what is reported and has no other baseline.
        tasks: default: those with a baseline.

    Raises:
        ConfigError: no log, baselines missing or unusable.
        DataError: a log that cannot be read, is cut off, or has no evaluation; a score that is not finite.
        TaskMismatchError: logs with different scores of a task.
    """
    if not logs:
        raise ConfigError("name at least one log", where="delta-m")
    read = [read_scores(path) for path in logs]
    reported = list(dict.fromkeys(task for log in read for task in log.tasks()))
    known = [*dict.fromkeys([*reported, *PRINTED])]
    baselines = {_name(task, known): value for task, value in _baselines(given, file).items()}
    if paper:
        baselines = {task: value for task, value in PAPER.items() if task in reported} | baselines
    asked = [_name(task, known) for task in tasks] or sorted(baselines, key=[*reported, *baselines].index)
    chosen = [*dict.fromkeys(asked)]
    missing = [task for task in chosen if task not in baselines]
    if missing or not chosen:
        hint = "name some with --baseline TASK=SCORE, in a file with --baselines, or take --paper"
        what = f"no single-task score of {', '.join(missing)}" if missing else "no single-task scores"
        raise ConfigError(what, where="delta-m", expected=f"some of {', '.join(reported)}", hint=hint)
    measures = _measures(read, chosen)
    lower = [task for task, measure in measures.items() if not measure.higher_is_better]
    found = []
    for log in read:
        for run, epoch, scores in _evaluations(log, chosen):
            found.append(Evaluation(run, epoch, scores, delta_m(scores, baselines, lower)))
    return History(measures, {task: baselines[task] for task in chosen}, found)


def write_csv(found: History, path: Path) -> None:
    """Write the history; raises ConfigError where it cannot be written."""
    try:
        write_text(path, found.csv())
    except OSError as error:
        raise ConfigError(f"history cannot be written ({error})", where="--csv", got=str(path)) from None


# --- baselines -------------------------------------------------------------------------------------------


def _name(word: str, known: Collection[str]) -> str:
    return word if word in known else _ALIASES.get(word.lower(), word)


def _baselines(given: Sequence[str], file: Path | None) -> dict[str, float]:
    baselines = {} if file is None else _from_file(file)
    for text in given:
        task, equals, value = text.partition("=")
        if not equals or not task:
            raise ConfigError("a baseline looks like semseg=67.21", where="--baseline", got=text)
        baselines[task] = _score(value, f"--baseline {task}")
    return baselines


def _from_file(file: Path) -> dict[str, float]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"baselines cannot be read ({error})", where=str(file)) from None
    if not isinstance(content, dict):
        raise ConfigError("no mapping of tasks to scores", where=str(file), got=type(content).__name__)
    return {task: _score(value, f"{file}: {task}") for task, value in content.items()}


def _score(value: Any, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError("a score is a number", where=where, got=value) from None


# --- evaluations -----------------------------------------------------------------------------------------


def _measures(logs: Sequence[Log], tasks: Sequence[str]) -> dict[str, Measure]:
    for log in logs:
        reported = log.tasks()
        for task in (task for task in tasks if task not in reported):
            hint = "leave out its baseline, or choose others with --tasks"
            what = f"the log never reports a score of {task!r}"
            raise DataError(what, where=str(log.path), got=", ".join(reported), hint=hint)
        for task in (task for task in tasks if log.measures[task] != logs[0].measures[task]):
            raise TaskMismatchError(
                f"the logs have different scores of {task!r}", where=str(log.path),
                got=log.measures[task].metric, expected=logs[0].measures[task].metric,
            )  # fmt: skip
    return {task: logs[0].measures[task] for task in tasks}


def _evaluations(log: Log, tasks: Sequence[str]) -> Iterator[tuple[str, int | None, dict[str, float]]]:
    """Run, epoch and scores; an evaluation is complete when all tasks have been seen."""
    several = log.parts[-1].run > 0
    for part in log.parts:
        scores: dict[str, float] = {}
        for task, value, line in (entry for entry in part.found if entry[0] in tasks):
            if task in scores:
                _leave_out(log, part, scores, tasks)
                scores = {}
            if not math.isfinite(value):
                what = f"{task} {log.measures[task].metric} {part.when} is {value}, which allows no gain"
                raise DataError(what, where=f"{log.path}:{line}", hint="leave the task out with --tasks")
            scores[task] = value
            if len(scores) == len(tasks):
                yield f"{log.path} (run {part.run + 1})" if several else str(log.path), part.epoch, scores
                scores = {}
        is_end = part is log.parts[-1]
        if scores and is_end:
            raise _cut_off(log, part, scores, tasks)
        _leave_out(log, part, scores, tasks)
        if is_end and log.open_line and part.found and part.found[-1][2] == log.open_line:
            raise _cut_off(log, part, tasks, tasks)


def _leave_out(log: Log, part: Part, scores: Mapping[str, float], tasks: Sequence[str]) -> None:
    if scores:
        missing = ", ".join(task for task in tasks if task not in scores)
        text = f"{log.path}: the evaluation {part.when} has no score of {missing} and is left out"
        warnings.warn(text, PolytaskWarning, stacklevel=2)


def _cut_off(log: Log, part: Part, scores: Collection[str], tasks: Sequence[str]) -> PolytaskError:
    missing = ", ".join(task for task in tasks if task not in scores) or "an end of its last line"
    hint = "remove what follows the last complete evaluation; end a complete last line with a line break"
    what = f"the log is cut off in the evaluation {part.when}: it lacks {missing}"
    return DataError(what, where=str(log.path), hint=hint)
