from __future__ import annotations

import math

import pytest
import torch

from polytask.config import decode
from polytask.errors import ConfigError
from polytask.tasks import Depth, Normals, Saliency, Segmentation
from polytask.tasks.base import Task

pytest.importorskip("torchmetrics")
AUROC = {"metric": "torchmetrics.classification.BinaryAUROC"}


def scores(task: Task, logits: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric in task.accumulators():
        for i in range(len(logits)):
            metric.update(task.predict(logits[i : i + 1]), target[i : i + 1])
        found |= metric.compute()
    return found


def test_agrees_with_ours_on_valid_pixels() -> None:
    g = torch.Generator().manual_seed(0)
    target = torch.randint(0, 3, (4, 1, 6, 7), generator=g)
    target[torch.rand(target.shape, generator=g) < 0.2] = 255
    iou = {"metric": "torchmetrics.classification.MulticlassJaccardIndex", "options": {"num_classes": 3}}
    task = decode(Segmentation, {"classes": list("abc"), "extra_metrics": {"theirs": iou}})
    found = scores(task, torch.randn(4, 3, 6, 7, generator=g), target)
    assert 100 * found["theirs"] == pytest.approx(found["mIoU"], rel=1e-5)


def test_depth_and_vectors() -> None:
    g = torch.Generator().manual_seed(0)
    mse = {"metric": "torchmetrics.regression.MeanSquaredError", "options": {"squared": False}}
    depth = torch.rand(4, 1, 6, 7, generator=g) * (torch.rand(4, 1, 6, 7, generator=g) < 0.7)
    found = scores(
        decode(Depth, {"extra_metrics": {"theirs": mse}}), torch.rand(4, 1, 6, 7, generator=g), depth
    )
    assert found["theirs"] == pytest.approx(found["rmse"], rel=1e-5)
    cosine = {"metric": "torchmetrics.regression.CosineSimilarity", "options": {"reduction": "mean"}}
    target = torch.nn.functional.normalize(torch.randn(2, 3, 6, 7, generator=g), dim=1)
    target[..., :3] = 0
    task = decode(Normals, {"extra_metrics": {"theirs": cosine}})
    assert scores(task, target + (target == 0), target)["theirs"] == pytest.approx(1, abs=1e-5)


def test_nothing_valid_and_fresh_state() -> None:
    task = decode(Saliency, {"extra_metrics": {"auroc": AUROC}})
    metric = task.accumulators()[-1]
    half, target = torch.tensor([[[0.1, 0.9]]]), torch.tensor([[[[0, 1]]]])
    assert metric.of(half, target) == {"auroc": 1.0}
    assert metric.of(1 - half, target) == {"auroc": 0.0}
    assert math.isnan(metric.of(half, target.fill_(255))["auroc"])


@pytest.mark.parametrize(
    ("plugin", "sentence"),
    [
        ({"metric": "torchmetrics.classification.BinaryAURO"}, "cannot be made"),
        ({"metric": "torchmetrics.classification.MulticlassJaccardIndex"}, "cannot be made"),
        ({"metric": "collections.OrderedDict"}, "is no torchmetrics.Metric"),
        ({"metric": "AUROC"}, "cannot be made"),
    ],
)
def test_what_cannot_be_made_is_refused_at_once(plugin: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"extra_metrics.x: .*{sentence}"):
        decode(Saliency, {"extra_metrics": {"x": plugin}})


def test_results_must_be_one_number() -> None:
    per_class = {"num_classes": 2, "average": "none"}
    iou = {"metric": "torchmetrics.classification.MulticlassJaccardIndex", "options": per_class}
    metric = decode(Segmentation, {"classes": ["a", "b"], "extra_metrics": {"x": iou}}).accumulators()[-1]
    with pytest.raises(ConfigError, match="one number"):
        metric.of(torch.zeros(1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.long))
