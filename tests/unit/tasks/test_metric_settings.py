"""Settings of tasks that say how they are scored."""

from __future__ import annotations

import torch

from polytask.metrics import AngularError, MaxF, MeanIoU, MeanOfBatches, SaliencyIoU
from polytask.tasks import Normals, Saliency, Segmentation


def test_settings_reach_the_metrics() -> None:
    iou, best, fine = Saliency(rowwise=True, levels=255, double_sigmoid=True).metrics()
    assert isinstance(iou, SaliencyIoU) and iou.rowwise
    assert isinstance(best, MaxF) and best.double_sigmoid and len(best.thresholds) == 255
    assert isinstance(fine, MaxF) and fine.name == "maxF_256" and not fine.double_sigmoid
    (angles,) = Normals(sum_test=True, normalize_target=False).metrics()
    assert isinstance(angles, AngularError) and angles.sum_test and not angles.normalize_target


def test_mean_of_batches_is_for_every_task() -> None:
    task = Segmentation(classes=("a", "b"))
    (pooled,) = task.accumulators()
    (averaged,) = task.model_copy(update={"mean_of_batches": True}).accumulators()
    assert isinstance(pooled, MeanIoU) and isinstance(averaged, MeanOfBatches)
    target = torch.tensor([[[[0, 0]]], [[[0, 1]]]])
    for metric in (pooled, averaged):
        for prediction, truth in zip(torch.zeros(2, 1, 2), target, strict=True):
            metric.update(prediction[None], truth[None])
    assert pooled.compute()["mIoU"] == 100 * (3 / 4 + 0) / 2
    assert averaged.compute()["mIoU"] == 100 * (1 + (1 / 2 + 0) / 2) / 2


def test_vectors_that_the_sum_test_loses() -> None:
    target = torch.tensor([[1.0, 0, 0], [0.5, -0.5, 0]]).T.reshape(1, 3, 1, 2)
    prediction = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand_as(target)
    means = [AngularError(sum_test=on).of(prediction, target)["mean"] for on in (False, True)]
    assert [round(mean, 3) for mean in means] == [22.5, 0]


def test_rmse_as_published_repeats_the_mean() -> None:
    target, prediction = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).T.reshape(1, 3, 1, 2), torch.ones(1, 3, 1, 2)
    prediction[:, 1:, :, 0] = 0
    found = AngularError().of(prediction, target)
    assert found["rmse"] > found["mean"] + 1
    published = AngularError(rmse_as_published=True).of(prediction, target)
    assert published == {**found, "rmse": found["mean"]}
