"""A look at every file of a dataset: what is wrong, and what is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polytask.data.base import DatasetSpec, Record
from polytask.data.maps import plain
from polytask.errors import DataError, PolytaskError
from polytask.progress import track
from polytask.tasks.base import Task


@dataclass
class VerifyReport:
    """What a look at every file of a dataset found.

    Attributes:
        counts: samples per split.
        problems: one sentence each; empty if all is well.
        histograms: per label map or image-level task, how often each class occurs (255 and -1 included); of
            attributes, how many images have each, and under -1 how many of their values are unknown.
        ranges: per map of real values ``min`` and ``max`` of the valid ones, and how many pixels are
            ``valid`` and ``invalid``.
    """

    counts: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    histograms: dict[str, Counter[int]] = field(default_factory=dict)
    ranges: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> None:
        """Count one target."""
        sheet = plain(value)
        if sheet.is_floating_point():
            self._widen(name, sheet)
        elif sheet.ndim == 1:  # attributes
            unknown = int((sheet == -1).sum())
            tally = dict(enumerate((sheet == 1).int().tolist())) | ({-1: unknown} if unknown else {})
            self.histograms.setdefault(name, Counter()).update(tally)
        else:
            values, counts = torch.unique(sheet, return_counts=True)
            tally = dict(zip(values.tolist(), counts.tolist(), strict=True))
            self.histograms.setdefault(name, Counter()).update(tally)

    def _widen(self, name: str, sheet: Tensor) -> None:
        start = {"min": float("inf"), "max": float("-inf"), "valid": 0, "invalid": 0}
        seen, valid = self.ranges.setdefault(name, start), (sheet != 0).any(0)
        seen["valid"] += int(valid.sum())
        seen["invalid"] += int((~valid).sum())
        if valid.any():
            values = sheet[:, valid]
            seen["min"] = min(seen["min"], float(values.min()))
            seen["max"] = max(seen["max"], float(values.max()))


def verify(
    spec: DatasetSpec, splits: Sequence[str] | None = None, tasks: Mapping[str, Task] | None = None
) -> VerifyReport:
    """Read every field of every record, collecting the problems.

    Args:
        spec: the dataset.
        splits: by default all.
        tasks: those to read the labels of, by default all of the dataset.

    Raises:
        ConfigError: unknown split.
        MissingDependencyError: a package is needed to read the files.
    """
    tasks = spec.labels() if tasks is None else tasks
    report, seen, spec = VerifyReport(), set[str](), spec.model_copy(update={"label_cache": "never"})
    for split in splits or spec.split_names():
        spec.check_split(split)
        try:
            records = spec.records(split)
        except PolytaskError as error:
            report.problems.append(str(error))
            continue
        report.counts[split] = len(records)
        report.problems += [] if records else [f"{split}: no samples"]
        repeated = [name for name, times in Counter(record.id for record in records).items() if times > 1]
        report.problems += [f"{split}: id {name!r} occurs more than once" for name in repeated]
        report.problems += spec.audit(split, tasks)
        for record in track([r for r in records if r.id not in seen], f"verifying {split}"):
            _verify_record(spec, record, tasks, report)
        seen.update(record.id for record in records)  # a split may be the union of others
    report.problems = list(dict.fromkeys(report.problems))  # what is wrong with all is said once
    report.histograms = {name: Counter(dict(sorted(h.items()))) for name, h in report.histograms.items()}
    return report


def _verify_record(
    spec: DatasetSpec, record: Record, tasks: Mapping[str, Task], report: VerifyReport
) -> None:
    image: Tensor | None = None
    try:
        image = spec.read(record, "image")
    except DataError as error:
        report.problems.append(str(error))
    for name, task in tasks.items():
        try:
            if not task.of_image:
                report.add(name, spec.label(record, name, task, image))
        except DataError as error:
            report.problems.append(str(error))
