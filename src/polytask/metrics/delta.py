"""Average relative gain of a multi-task model over single-task baselines."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Literal

from polytask.errors import ConfigError, TaskMismatchError


def delta_m(
    scores: Mapping[str, float],
    baseline: Mapping[str, float],
    lower_is_better: Collection[str],
    *,
    positive_is: Literal["better", "worse"] = "better",
) -> float:
    """Mean relative difference to the baseline over all entries of ``scores``, in percent.

    ``positive_is="better"`` is the usual gain, one headline score per task (Maninis et al., CVPR 2019):
    100 / T * sum of (-1)^[lower is better] (M - B) / B. ``"worse"`` is the opposite sign, used by the papers
    on loss balancing, which enter every metric of every task (Liu et al., NeurIPS 2021).

    Args:
        scores: score per task (or per metric), at least one; NaN makes the result NaN.
        baseline: the same of the single-task models; further entries are not used.
        lower_is_better: names of the entries that should be small.
        positive_is: meaning of a positive result.

    Raises:
        TaskMismatchError: a task has no baseline.
        ConfigError: a baseline is zero or not finite, there are no scores, or ``lower_is_better`` has a
            name that occurs nowhere.
    """
    _check(scores, baseline, lower_is_better)
    gains = [(-1 if name in lower_is_better else 1) * (scores[name] / baseline[name] - 1) for name in scores]
    return (100 if positive_is == "better" else -100) * sum(gains) / len(gains)


def delta_m_per_task(
    scores: Mapping[str, Mapping[str, float]],
    baseline: Mapping[str, Mapping[str, float]],
    lower_is_better: Mapping[str, Collection[str]],
) -> float:
    """Mean over tasks of ``delta_m`` over all metrics of the task, in percent; raises as ``delta_m``.

    Positive is better; all arguments by task, then by metric. LibMTL (Lin & Zhang, JMLR 2023) reports this
    mean as a fraction.
    """
    gains = [delta_m(own, baseline.get(t, {}), lower_is_better.get(t, ())) for t, own in scores.items()]
    if not gains:
        raise ConfigError("no scores to compare with the baseline", where="delta_m")
    return sum(gains) / len(gains)


def _check(
    scores: Mapping[str, float], baseline: Mapping[str, float], lower_is_better: Collection[str]
) -> None:
    if not scores:
        raise ConfigError("no scores to compare with the baseline", where="delta_m")
    missing = [name for name in scores if name not in baseline]
    if missing:
        names = ", ".join(baseline) or "nothing"
        hint = f"the baseline has {names}; add a single-task run of each missing task"
        raise TaskMismatchError(f"no baseline for {', '.join(missing)}", where="delta_m", hint=hint)
    for name in scores:
        value = baseline[name]
        if not math.isfinite(value) or value == 0:
            where, hint = f"delta_m baseline of {name}", "a relative gain needs a baseline that was measured"
            raise ConfigError("value cannot be divided by", where=where, got=value, hint=hint)
    unknown = [name for name in lower_is_better if name not in baseline and name not in scores]
    if unknown:
        raise ConfigError(f"`lower_is_better` names unknown {', '.join(unknown)}", where="delta_m")
