"""Scores against the values that the official evaluators return for the same inputs.

Where an official evaluator has a quirk, the test asserts its value in the mode of that name (or imitates the
quirk here) and the clean value next to it. ``test_every_value_is_asserted`` lists what is asserted where.

Two kinds of values are met less exactly than to 1e-6, for a reason: medians to half a bin of the histogram
that makes them additive, and boundary scores to the noise of the official matcher, which draws at random.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polytask.data.thinning import contours, thin
from polytask.losses import balanced_bce
from polytask.metrics.attributes import AttributeF1
from polytask.metrics.base import MeanOfBatches, Metric
from polytask.metrics.boundary import BoundaryScore, boundary_counts, orientation, rates, suppress, thinned
from polytask.metrics.delta import delta_m, delta_m_per_task
from polytask.metrics.depth import DepthError
from polytask.metrics.edge import BoundaryF
from polytask.metrics.normals import AngularError
from polytask.metrics.saliency import MaxF, SaliencyIoU
from polytask.metrics.segmentation import MeanIoU
from polytask.tasks.base import identity

GOLDEN = Path(__file__).parent / "golden"
META = json.loads((GOLDEN / "metrics" / "meta.json").read_text())
EXPECTED: dict[str, Any] = META["expected"]
BATCHES: list[tuple[int, int]] = [tuple(pair) for pair in META["batches"]]
ONES = [(i, i + 1) for i in range(5)]
_DENSE = np.load(GOLDEN / "metrics" / "dense.npz")


def dense(name: str) -> Tensor:
    values = _DENSE[name]
    return torch.from_numpy(values.astype(np.int64 if values.dtype.kind in "ui" else np.float32))


def value(source: str, case: str, *keys: str) -> Any:
    found = EXPECTED[source][case]["value"]
    for key in keys:
        found = found[key]
    return found


def scores(metric: Metric, prediction: Tensor, target: Tensor, batches: Sequence[tuple[int, int]] = BATCHES):
    for start, end in batches:
        metric.update(prediction[start:end], target[start:end])
    return metric.compute()


def canonical_normals(target: Tensor) -> Tensor:
    return torch.where(target == 255, 0.0, target)


# --- segmentation ----------------------------------------------------------------------------------


def labels(case: str, absent: str) -> MeanIoU:
    name, size = {"semseg_pascal21": ("semseg", 21), "semseg_nyud40": ("nyud40", 40)}.get(case, ("parts", 7))
    metric = MeanIoU(tuple(map(str, range(size))), absent)  # type: ignore[arg-type]
    scores(metric, dense(f"{name}_pred"), dense(f"{name}_gt"))
    return metric


SEGMENTATION_CASES = [
    (source, case)
    for source in ("mtlora", "adamtl", "mlore", "invpt", "taskprompter", "mtinet")
    for case in ("semseg_pascal21", "semseg_nyud40", "human_parts7")
    if case in EXPECTED[source]
]


@pytest.mark.parametrize(("source", "case"), SEGMENTATION_CASES)
def test_segmentation_with_absent_classes_as_zero(source: str, case: str) -> None:
    metric = labels(case, "zero")
    percent = 1 if source in ("mlore", "taskprompter") else 100
    assert metric.compute()["mIoU"] == pytest.approx(percent * value(source, case, "mIoU"), rel=1e-9)
    per_class = EXPECTED[source][case]["value"].get("jaccards_all_categs")
    if per_class:
        ours = [0.0 if math.isnan(iou) else iou for iou in metric.per_class().values()]
        assert ours == pytest.approx([100 * iou for iou in per_class], rel=1e-9)


@pytest.mark.parametrize("case", ["semseg_pascal21", "human_parts7"])
def test_segmentation_of_atrc(case: str) -> None:
    assert labels(case, "zero").compute()["mIoU"] == pytest.approx(100 * value("atrc", case), rel=1e-6)


def test_segmentation_with_absent_classes_skipped() -> None:
    metric, expected = labels("semseg_pascal21", "skip"), value("efficientmtl", "semseg_pascal21")
    ours = metric.compute()
    assert ours["mIoU"] == pytest.approx(38.00409, abs=1e-4)
    assert round(ours["mIoU"], 2) == expected["reported_mIoU"]
    assert round(ours["mean_accuracy"], 2) == expected["reported_mAcc"]
    assert round(ours["pixel_accuracy"], 2) == expected["reported_pixAcc"]
    assert ours["pixel_accuracy"] == pytest.approx(100 * expected["all_acc"], rel=1e-9)
    iou = [float("nan") if v is None else 100 * v for v in expected["iou"]]
    assert list(metric.per_class().values()) == pytest.approx(iou, rel=1e-9, nan_ok=True)
    parts = labels("human_parts7", "skip").compute()["mIoU"]
    assert parts == pytest.approx(100 * value("efficientmtl", "human_parts7", "mIoU"), rel=1e-9)


@pytest.mark.parametrize("source", ["libmtl", "mtan"])
def test_segmentation_of_the_mtan_family(source: str) -> None:
    target = torch.where(dense("mtan_seg_gt") < 0, 255, dense("mtan_seg_gt"))
    ours = scores(MeanIoU(tuple("abcdefghijklm"), "nan"), dense("mtan_seg_logit").argmax(1), target)
    assert [ours["mIoU"], ours["pixel_accuracy"]] == pytest.approx(
        [100 * v for v in value(source, "seg13")], rel=1e-6
    )


def test_an_absent_class_makes_the_mtan_mean_nan() -> None:
    logits, target = dense("mtan_seg_logit"), dense("mtan_seg_gt")
    logits[:, 12], target = -60, torch.where((target < 0) | (target == 12), 255, target)
    ours = scores(MeanIoU(tuple("abcdefghijklm"), "nan"), logits.argmax(1), target)
    expected = value("libmtl", "seg13_one_class_absent")
    assert expected[0] is None and math.isnan(ours["mIoU"])
    assert ours["pixel_accuracy"] == pytest.approx(100 * expected[1], rel=1e-6)
    clean = scores(MeanIoU(tuple("abcdefghijklm")), logits.argmax(1), target)["mIoU"]
    iou = torch.tensor(list(labels_of(logits.argmax(1), target).values()), dtype=torch.float64)
    assert clean == pytest.approx(float(iou[:12].mean()), rel=1e-9)


def labels_of(prediction: Tensor, target: Tensor) -> dict[str, float]:
    metric = MeanIoU(tuple("abcdefghijklm"))
    metric.update(prediction, target)
    return metric.per_class()


# --- saliency --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["mtlora", "adamtl", "mtinet"])
@pytest.mark.parametrize("batches", [BATCHES, ONES], ids=["3+2", "1 each"])
def test_saliency_iou(source: str, batches: list[tuple[int, int]]) -> None:
    ours = scores(SaliencyIoU(), dense("sal_logit1").sigmoid(), dense("sal_gt01"), batches)
    assert ours["mIoU"] == pytest.approx(100 * value(source, "saliency_batches_3_2", "mIoU"), rel=1e-6)
    assert ours["maxF1"] == pytest.approx(100 * value(source, "saliency_batches_3_2", "maxF"), rel=1e-6)


def test_saliency_iou_per_threshold() -> None:
    metric = SaliencyIoU()
    scores(metric, dense("sal_logit1").sigmoid(), dense("sal_gt01"))
    for name, theirs in (("iou", "mIoUs"), ("precision", "mPrec"), ("recall", "mRec")):
        expected = value("adamtl", "saliency_batches_3_2", theirs)
        assert (metric.state[name] / metric.state["images"]).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("source", ["mtlora", "adamtl"])
def test_saliency_scored_row_by_row(source: str) -> None:
    """At batch size 1 their meter loses the batch axis, so that every row counts as an image."""
    probability, target = dense("sal_logit1").sigmoid(), dense("sal_gt01")
    rows = scores(SaliencyIoU(rowwise=True), probability, target, ONES)
    assert rows["mIoU"] == pytest.approx(100 * value(source, "saliency_batch_of_1", "mIoU"), rel=1e-6)
    assert rows["maxF1"] == pytest.approx(100 * value(source, "saliency_batch_of_1", "maxF"), rel=1e-6)


@pytest.mark.parametrize("case", ["saliency_batches_3_2", "saliency_batch_of_1"])
def test_saliency_f_of_one_channel(case: str) -> None:
    probability, target = dense("sal_logit1").sigmoid(), dense("sal_gt01")
    legacy = scores(MaxF(double_sigmoid=True), probability, target)["maxF"]
    assert legacy == pytest.approx(100 * value("mtlora", case, "Beta maxF"), rel=1e-6)
    assert scores(MaxF(), probability, target)["maxF"] == pytest.approx(79.253867, abs=1e-5)


@pytest.mark.parametrize("source", ["mlore", "invpt", "taskprompter", "efficientmtl"])
def test_saliency_f_of_two_channels(source: str) -> None:
    probability, target = dense("sal_logit2").softmax(1)[:, 1], dense("sal_gt255")
    legacy = scores(MaxF(double_sigmoid=True), probability, target)["maxF"]
    percent = 1 if source in ("mlore", "taskprompter") else 100
    assert legacy == pytest.approx(percent * value(source, "saliency", "maxF"), rel=1e-6)


def test_saliency_f_of_atrc_is_clean() -> None:
    ours = scores(MaxF(), dense("sal_logit2").softmax(1)[:, 1], dense("sal_gt255"))["maxF"]
    assert ours == pytest.approx(100 * value("atrc", "saliency"), rel=1e-6)


# --- normals ---------------------------------------------------------------------------------------


def normals(*, normalize_target: bool) -> dict[str, float]:
    metric = AngularError(normalize_target=normalize_target, rmse_as_published=not normalize_target)
    return scores(metric, dense("normals_pred"), canonical_normals(dense("normals_gt")))


def test_normals_without_normalizing_the_target() -> None:
    ours = normals(normalize_target=False)
    for source, case in (("mtlora", "normals"), ("mtlora", "normals_v1_all"), ("adamtl", "normals")):
        assert ours["mean"] == pytest.approx(value(source, case, "mean"), abs=1e-5)
        assert ours["rmse"] == pytest.approx(value(source, case, "rmse"), abs=1e-5)  # repeats the mean
    shares = [value("adamtl", "normals", t) for t in ("11.25", "22.5", "30")]
    assert [ours[f"within_{t}"] for t in ("11.25", "22.5", "30")] == pytest.approx(shares, rel=1e-9)


def test_normals() -> None:
    ours = normals(normalize_target=True)
    assert ours["mean"] == pytest.approx(value("mtlora", "normals", "mean_v2"), abs=1e-5)
    assert ours["mean"] == pytest.approx(value("mtlora", "normals", "rmse_v2"), abs=1e-5)
    for source, case in (("mlore", "normals"), ("invpt", "normals"), ("efficientmtl", "normals_meter")):
        assert ours["mean"] == pytest.approx(value(source, case, "mean"), abs=1e-5)
    assert ours["mean"] == pytest.approx(value("taskprompter", "normals", "mean"), abs=1e-5)
    assert ours["mean"] == pytest.approx(value("atrc", "normals"), abs=1e-5)
    assert ours["rmse"] == pytest.approx(20.454091, abs=1e-5)  # the true one, in no official evaluator


@pytest.mark.parametrize("pooled", [True, False])
def test_normals_of_the_mtan_family(pooled: bool) -> None:
    metric = AngularError(sum_test=True)
    maps = dense("mtan_normal_pred"), dense("mtan_normal_gt")
    ours = scores(metric if pooled else MeanOfBatches(metric), *maps)
    expected = value("libmtl", "normal") if pooled else value("mtan", "normal_mean_over_batches")
    assert ours["mean"] == pytest.approx(expected[0], abs=1e-5)
    assert ours["median"] == pytest.approx(expected[1], abs=0.005)  # resolution of the histogram
    shares = [100 * v for v in expected[2:]]
    assert [ours[f"within_{t}"] for t in ("11.25", "22.5", "30")] == pytest.approx(shares, rel=1e-6)


# --- depth -----------------------------------------------------------------------------------------

DEPTH_CASES = [
    ("mtlora", "depth_ignore255", None),
    ("adamtl", "depth_ignore255", None),
    ("mtinet", "depth_ignore255", None),
    ("invpt", "depth_ignore255", None),
    ("mlore", "depth_0_80", 80.0),
    ("taskprompter", "depth_0_80", 80.0),
]


@pytest.mark.parametrize(("source", "case", "cap"), DEPTH_CASES)
def test_depth(source: str, case: str, cap: float | None) -> None:
    ours = scores(DepthError(cap), dense("depth_pred")[:, 0], dense("depth_gt0"))
    expected = value(source, case)
    assert {name: ours[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_depth_of_atrc() -> None:
    ours = scores(DepthError(), dense("depth_pred")[:, 0], dense("depth_gt0"))["rmse"]
    assert ours == pytest.approx(value("atrc", "depth_labels_with_0"), rel=1e-6)
    holes = torch.where(dense("depth_gt0") == 0, 255.0, dense("depth_gt0"))  # holes scored as 255 m
    defect = scores(DepthError(), dense("depth_pred")[:, 0], holes)["rmse"]
    assert defect == pytest.approx(value("atrc", "depth_labels_with_255"), rel=1e-6)


@pytest.mark.parametrize("pooled", [True, False])
def test_depth_of_the_mtan_family(pooled: bool) -> None:
    prediction, target = dense("mtan_depth_pred")[:, 0], dense("mtan_depth_gt")
    ours = scores(DepthError() if pooled else MeanOfBatches(DepthError()), prediction, target)
    expected = value("libmtl", "depth") if pooled else value("mtan", "depth_mean_over_batches")
    assert [ours["abs_err"], ours["abs_rel"]] == pytest.approx(expected, rel=1e-6)


# --- edges -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("mtlora", "edge_gt01"),
        ("mlore", "edge_gt255"),
        ("invpt", "edge_gt255"),
        ("taskprompter", "edge_gt255"),
    ],
)
def test_edge_proxy(source: str, target: str) -> None:
    """Their figure during training: the loss of the *probability*, taken as a logit, averaged over images."""
    probability = dense("edge_logit").sigmoid()
    total = 0.0
    for start, end in BATCHES:
        batch = probability[start:end], dense(target)[start:end]
        loss = balanced_bce(*batch, identity, positive_weight=0.95)
        assert loss is not None
        total += (end - start) * float(loss) / 5
    assert total == pytest.approx(value(source, "edge_loss_w0.95", "loss"), rel=1e-6)


@pytest.mark.parametrize(("target", "expected"), [("edge_gt01", 88.451022), ("edge_gt255", 88.942198)])
def test_tolerant_f_of_the_edges(target: str, expected: float) -> None:
    ours = scores(BoundaryF(), dense("edge_logit").sigmoid()[:, 0], dense(target))
    assert ours["F_tol"] == pytest.approx(expected, abs=1e-5)


# --- boundaries ------------------------------------------------------------------------------------

_EDGES = np.load(GOLDEN / "metrics" / "edges.npz")
_SHAPE = (192, 256)
_MODES = {"pascal": 0.0075, "nyud": 0.011}


def bits(name: str) -> np.ndarray:
    return np.unpackbits(_EDGES[name]).reshape(_SHAPE).astype(bool)


def strength(i: int) -> np.ndarray:
    found: np.ndarray = _EDGES[f"pred_png_{i}"].astype(np.float32) / np.float32(255)
    return found


def test_stages_of_the_boundary_score() -> None:
    apart = np.abs(orientation(strength(0)) - _EDGES["orientation_0"])
    assert np.minimum(apart, np.pi - apart).max() < 2e-3
    for i in range(4):
        assert np.abs(suppress(strength(i)) - _EDGES[f"nms_{i}"]).max() < 1e-4
        labels, png = _EDGES[f"label_map_{i}"], _EDGES[f"nyud_edge_png_{i}"]
        assert np.array_equal(contours(labels), bits(f"seg2bmap_pascal_{i}"))
        assert np.array_equal(thin(contours(labels)), bits(f"gt_thin_pascal_{i}"))
        assert np.array_equal(thin(contours(png)), bits(f"gt_thin_nyud_{i}"))


def test_contours_need_no_relabeling() -> None:
    """Giving each connected region its own id first, as the official code does, changes nothing."""
    labels, regions = _EDGES["label_map_0"], _EDGES["relabel_0"]
    assert len(np.unique(regions)) > len(np.unique(labels))
    assert np.array_equal(contours(regions), contours(labels))


def boundaries(i: int, mode: str) -> np.ndarray:
    return thin(contours(_EDGES[f"{'label_map' if mode == 'pascal' else 'nyud_edge_png'}_{i}"]))


@pytest.mark.parametrize("mode", ["pascal", "nyud"])
def test_boundary_counts(mode: str) -> None:
    thresholds, official = _EDGES["thresholds"], _EDGES[f"counts_{mode}_maxdist_{_MODES[mode]}"]
    total = np.zeros((len(thresholds), 3))
    for i in range(4):
        ours = boundary_counts(strength(i), boundaries(i, mode), _MODES[mode], thresholds)
        theirs = official[i][:, [3, 6, 4]]  # F, precision, recall, cntR, sumR, cntP, sumP
        assert np.array_equal(ours[:, 1:], theirs[:, 1:])
        lost = ours[:, 0] - theirs[:, 0]  # the official matcher misses pairs, never finds more
        assert (lost >= 0).all() and (lost <= np.maximum(3, 0.004 * theirs[:, 0])).all()
        total += ours
    precision, recall, f = rates(total)
    expected = value("seism", mode)
    assert f == pytest.approx(expected["F_per_threshold"], abs=2e-3)
    best = int(np.argmin(np.abs(thresholds - expected["ods_threshold"])))
    assert precision[best] == pytest.approx(expected["ods_precision"], abs=2e-3)
    assert recall[best] == pytest.approx(expected["ods_recall"], abs=2e-3)


@pytest.mark.parametrize("mode", ["pascal", "nyud"])
def test_boundary_score(mode: str) -> None:
    metric = BoundaryScore(_MODES[mode], "lines" if mode == "pascal" else "contours", _EDGES["thresholds"])
    for i in range(4):
        lines = boundaries(i, mode) if mode == "pascal" else _EDGES[f"nyud_edge_png_{i}"] > 0
        metric.update(torch.from_numpy(strength(i))[None], torch.from_numpy(lines)[None, None].long())
    ours = metric.compute()
    assert ours["odsF"] == pytest.approx(100 * value("seism", mode, "odsF"), abs=0.2)
    assert ours["oisF"] == pytest.approx(100 * value("seism", mode, "oisF"), abs=0.3)
    assert ours["ods_threshold"] == pytest.approx(value("seism", mode, "ods_threshold"), abs=0.051)


def test_thinned_masks_are_those_of_each_threshold() -> None:
    thresholds = _EDGES["thresholds"]
    masks = thinned(_EDGES["nms_1"], thresholds)
    for k in (0, 2, 8, 21):
        assert np.array_equal(masks[..., k], thin(_EDGES["nms_1"] > np.float32(thresholds[k])))


# --- attributes ------------------------------------------------------------------------------------


def test_attributes() -> None:
    metric = AttributeF1(40)
    ours = scores(metric, (dense("celeba_prob") > 0.5).long(), dense("celeba_y"), [(0, 16), (16, 30)])
    f1, accuracy = metric.per_attribute()
    assert f1.tolist() == pytest.approx(value("famo", "celeba_f1_per_attribute"), abs=1e-6)
    assert f1[5] == 0  # no positives
    assert accuracy.tolist() == pytest.approx(value("mgda", "celeba_accuracy_per_attribute"), abs=1e-6)
    assert ours["error"] == pytest.approx(value("mgda", "celeba_average_error_percent"), rel=1e-6)


# --- average relative gain -------------------------------------------------------------------------


def named(values: Sequence[float]) -> dict[str, float]:
    return {str(i): value for i, value in enumerate(values)}


@pytest.mark.parametrize(
    ("source", "case", "row", "baseline", "lower"),
    [
        ("mtlora", "delta_m_r64", (67.90, 59.84, 65.40, 16.60), (67.21, 61.93, 62.35, 17.97), {"3"}),
        (
            "mtinet",
            "delta_m_nyud_SAK",
            (59.93, 0.4942, 17.60, 78.60),
            (51.15, 0.5792, 19.77, 77.35),
            {"1", "2"},
        ),
    ],
)
def test_gain(
    source: str, case: str, row: Sequence[float], baseline: Sequence[float], lower: set[str]
) -> None:
    ours = delta_m(named(row), named(baseline), lower)
    assert ours == pytest.approx(value(source, case), rel=1e-9)
    assert ours == pytest.approx(float(EXPECTED[source][case]["note"].split()[-1]), abs=0.15)


PRINTED = {  # in the tables, from inputs with more digits
    "delta_m_nyuv2_LS": 5.59,
    "delta_m_nyuv2_Nash-MTL": -4.04,
    "delta_m_nyuv2_FairGrad": -4.66,
    "delta_m_cityscapes_LS": 22.60,
    "delta_m_cityscapes_Nash-MTL": 6.82,
    "delta_m_cityscapes_FairGrad": 5.18,
}


@pytest.mark.parametrize("case", PRINTED)
def test_gain_of_the_balancer_papers(case: str) -> None:
    row = json.loads(EXPECTED["famo"][case]["note"].removeprefix("input "))
    rooms = (38.30, 63.76, 0.6754, 0.2780, 25.01, 19.21, 30.14, 57.20, 69.15), {"2", "3", "4", "5"}
    streets = (0.7401, 0.9316, 0.0125, 27.77), {"2", "3"}
    baseline, lower = rooms if "nyuv2" in case else streets
    ours = delta_m(named(row), named(baseline), lower, positive_is="worse")
    assert ours == pytest.approx(value("famo", case), rel=1e-9)
    assert ours == pytest.approx(PRINTED[case], abs=0.15)


def test_gain_of_libmtl() -> None:
    """The example of its documentation; there, weight 1 says that higher is better."""
    base, new = {"A": {"x": 96, "y": 98}, "B": {"z": 0.2}}, {"A": {"x": 93, "y": 99}, "B": {"z": 0.5}}
    ours = delta_m_per_task(new, base, {"A": {"y"}})
    assert ours / 100 == pytest.approx(value("libmtl", "count_improvement"), rel=1e-9)


# --- all of it -------------------------------------------------------------------------------------

ASSERTED = {
    "mtlora": "semseg_pascal21 semseg_nyud40 human_parts7 saliency_batches_3_2 saliency_batch_of_1 normals "
    "normals_v1_all depth_ignore255 edge_loss_w0.95 delta_m_r64",
    "adamtl": "semseg_pascal21 semseg_nyud40 human_parts7 saliency_batches_3_2 saliency_batch_of_1 normals "
    "depth_ignore255",
    "mlore": "semseg_pascal21 semseg_nyud40 human_parts7 saliency normals depth_0_80 edge_loss_w0.95",
    "invpt": "semseg_pascal21 semseg_nyud40 human_parts7 saliency normals depth_ignore255 edge_loss_w0.95",
    "taskprompter": "semseg_pascal21 semseg_nyud40 human_parts7 saliency normals depth_0_80 edge_loss_w0.95",
    "mtinet": "semseg_pascal21 semseg_nyud40 saliency_batches_3_2 depth_ignore255 delta_m_nyud_SAK",
    "efficientmtl": "human_parts7 semseg_pascal21 saliency normals_meter",
    "atrc": "semseg_pascal21 human_parts7 saliency normals depth_labels_with_0 depth_labels_with_255",
    "libmtl": "seg13 seg13_one_class_absent depth normal count_improvement",
    "mtan": "seg13 depth_mean_over_batches normal_mean_over_batches",
    "famo": "delta_m_nyuv2_LS delta_m_nyuv2_Nash-MTL delta_m_nyuv2_FairGrad delta_m_cityscapes_LS "
    "delta_m_cityscapes_Nash-MTL delta_m_cityscapes_FairGrad celeba_f1_per_attribute",
    "mgda": "celeba_accuracy_per_attribute celeba_average_error_percent",
    "seism": "pascal nyud",
}
NOT_PORTED = {
    ("efficientmtl", "normals_proxy_batch0"): "angles of vectors moved to 0..255, ignored pixels included: "
    "a figure without meaning, in no table",
}


def test_every_value_is_asserted() -> None:
    asserted = {(source, case) for source, cases in ASSERTED.items() for case in cases.split()}
    assert asserted | NOT_PORTED.keys() == {(s, c) for s, cases in EXPECTED.items() for c in cases}
