from __future__ import annotations

import math

import pytest

from polytask.errors import ConfigError, TaskMismatchError
from polytask.metrics.delta import delta_m, delta_m_per_task

BASE = {"semseg": 50.0, "depth": 0.5}


def test_by_hand() -> None:
    scores = {"semseg": 55.0, "depth": 0.6}  # +10 %, -20 %
    assert delta_m(scores, BASE, {"depth"}) == pytest.approx(-5)
    assert delta_m(scores, BASE, ["depth"], positive_is="worse") == pytest.approx(5)
    assert delta_m({"depth": 0.4}, BASE, {"depth"}) == pytest.approx(20)
    assert delta_m(BASE, BASE, {"depth"}) == 0


def test_nan_scores_show() -> None:
    assert math.isnan(delta_m({"semseg": float("nan")}, BASE, ()))


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_baseline_that_cannot_be_divided_by(bad: float) -> None:
    with pytest.raises(ConfigError, match="baseline of depth"):
        delta_m(BASE, {**BASE, "depth": bad}, {"depth"})


def test_missing_pieces() -> None:
    with pytest.raises(TaskMismatchError, match=r"no baseline for normals; the baseline has semseg, depth"):
        delta_m({**BASE, "normals": 20.0}, BASE, {"depth", "normals"})
    with pytest.raises(ConfigError, match="unknown dept"):
        delta_m(BASE, BASE, {"dept"})
    with pytest.raises(ConfigError, match="no scores"):
        delta_m({}, BASE, ())


def test_tasks_weigh_alike_whatever_number_of_metrics_they_have() -> None:
    base = {"semseg": {"mIoU": 50.0, "accuracy": 80.0}, "depth": {"rmse": 0.5}}
    scores = {"semseg": {"mIoU": 55.0, "accuracy": 80.0}, "depth": {"rmse": 0.6}}  # +10 %, 0, -20 %
    assert delta_m_per_task(scores, base, {"depth": {"rmse"}}) == pytest.approx((5 - 20) / 2)
    with pytest.raises(TaskMismatchError, match="no baseline for rmse"):
        delta_m_per_task(scores, {"semseg": base["semseg"]}, {"depth": {"rmse"}})
    with pytest.raises(ConfigError, match="no scores"):
        delta_m_per_task({}, base, {})
