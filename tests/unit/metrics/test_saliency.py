from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from polytask.metrics.saliency import MaxF, SaliencyIoU, passed


def draw(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    target = (torch.rand(5, 1, 9, 8, generator=g) < 0.3).long()
    prediction = (0.4 * target[:, 0] + 0.6 * torch.rand(5, 9, 8, generator=g)).clamp(0, 1)
    prediction[0, 0, :4] = torch.tensor([0.2, 0.25, 0.5, 0.9])  # ties with thresholds
    target[torch.rand(target.shape, generator=g) < 0.1] = 255
    target[3] = torch.where(target[3] == 255, 255, 0)
    target[4] = 255
    return prediction, target


def test_passed_counts_by_comparison() -> None:
    values, groups = torch.tensor([0.1, 0.2, 0.2, 0.9]), torch.tensor([0, 0, 1, 1])
    thresholds = torch.tensor([0.1, 0.2, 0.5])
    assert passed(values, groups, 2, thresholds).tolist() == [[2, 2, 1, 0], [2, 2, 2, 1]]
    assert passed(values, groups, 2, thresholds, strict=True).tolist() == [[2, 1, 0, 0], [2, 2, 1, 1]]


def test_max_f_is_that_of_a_loop() -> None:
    prediction, target = draw()
    metric = MaxF()
    metric.update(prediction, target)
    valid = target[:, 0] != 255
    p, y = prediction[valid], target[:, 0][valid] == 1
    best = 0.0
    for k in range(1, 20):
        positive = p >= torch.tensor(k / 20)
        hits = float((positive & y).sum())
        if hits:
            precision, recall = hits / float(positive.sum()), hits / float(y.sum())
            best = max(best, 1.3 * precision * recall / (0.3 * precision + recall))
    assert metric.compute()["maxF"] == pytest.approx(100 * best, rel=1e-9)


def test_256_thresholds_are_those_of_bytes() -> None:
    g = torch.Generator().manual_seed(0)
    stored = torch.randint(0, 256, (2, 9, 9), dtype=torch.uint8, generator=g)
    target = (stored[:, None] + 60 * torch.randn(2, 1, 9, 9, generator=g) > 140).long()
    true, best = target[:, 0] == 1, 0.0
    for t in range(256):
        hits, chosen = float(((stored >= t) & true).sum()), float((stored >= t).sum())
        if hits:
            precision, recall = hits / chosen, hits / float(true.sum())
            best = max(best, 1.3 * precision * recall / (0.3 * precision + recall))
    assert MaxF(256, ends=True).of(stored / 255, target) == {"maxF_256": pytest.approx(100 * best, rel=1e-9)}
    assert MaxF().of(stored / 255, target)["maxF"] < 100 * best


def test_iou_is_that_of_a_loop() -> None:
    prediction, target = draw()
    metric = SaliencyIoU()
    metric.update(prediction, target)
    rows = []
    for p, y in zip(prediction[:4], target[:4, 0], strict=True):  # the fifth has no valid pixel
        row = []
        for t in np.linspace(0.2, 0.9, 15):
            pred, true = (p > torch.tensor(t, dtype=torch.float32))[y != 255], (y == 1)[y != 255]
            union = float((pred | true).sum())
            row.append(float((pred & true).sum()) / union if union else 1.0)
        rows.append(row)
    assert int(metric.state["images"]) == 4
    assert metric.compute()["mIoU"] == pytest.approx(100 * np.mean(rows, axis=0).max(), rel=1e-9)


def test_double_sigmoid_sees_four_thresholds() -> None:
    prediction, target = torch.tensor([[[0.1, 0.3, 0.5, 0.7]]]), torch.tensor([[[[0, 0, 1, 1]]]])
    metric = MaxF(double_sigmoid=True)
    metric.update(prediction, target)
    reached = metric.state["passed"].sum(0)
    assert reached[1:11].tolist() == [4] * 10 and not reached[14:].any()


def test_empty_truth() -> None:
    metric = SaliencyIoU()
    metric.update(torch.zeros(1, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.long))
    assert metric.compute()["mIoU"] == 100
    pooled = MaxF()
    pooled.update(torch.zeros(1, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.long))
    assert pooled.compute()["maxF"] == 0


def test_nothing_seen_is_nan() -> None:
    for metric in (MaxF(), SaliencyIoU()):
        metric.update(torch.zeros(1, 4, 4), torch.full((1, 1, 4, 4), 255))
        assert all(math.isnan(score) for score in metric.compute().values())


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "thresholds",
    [torch.arange(1, 256) / 256, torch.arange(256) / 255, torch.linspace(0.2, 0.9, 15),
     torch.tensor([0.1, 0.2, 0.9]), torch.tensor([0.5])],
    ids=["bytes", "ends", "saliency", "uneven", "one"],
)  # fmt: skip
def test_passed_is_exact_next_to_every_threshold(thresholds: torch.Tensor, strict: bool) -> None:
    up, down = (torch.nextafter(thresholds, torch.tensor(x)) for x in (9.0, -9.0))
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1.0])
    values = torch.cat([torch.linspace(-0.2, 1.2, 5001), thresholds, up, down, odd])
    reached = torch.bucketize(values, thresholds, right=not strict)
    expected = torch.stack([(reached >= k).sum() for k in range(len(thresholds) + 1)])
    groups = torch.zeros(len(values), dtype=torch.int64)
    assert torch.equal(passed(values, groups, 1, thresholds, strict=strict)[0], expected)
