"""Losses and scores of one four-task model output against those of the official MTLoRA training code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from polytask.losses import balanced_bce
from polytask.metrics.normals import AngularError
from polytask.tasks import Normals, Saliency, Segmentation, TaskSet
from polytask.tasks.base import identity

GOLDEN = Path(__file__).parent / "golden" / "mtlora"
OUTPUT = json.loads((GOLDEN / "loss_metric_io.json").read_text())
TASKS = TaskSet(
    {
        "semseg": Segmentation(classes=tuple(map(str, range(21))), absent="zero"),
        "human_parts": Segmentation(classes=tuple(map(str, range(7))), absent="zero", weight=2.0),
        "sal": Saliency(double_sigmoid=True, weight=5.0),
        "normals": Normals(normalize_target=False, weight=10.0),
    }
)


def model_output() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    tensors = load_file(GOLDEN / "loss_metric_io.safetensors")
    logits = {task: tensors[f"logits.{task}"] for task in TASKS}
    batch = {task: tensors[f"target.{task}"].long() for task in TASKS}
    normals = tensors["target.normals"]
    return logits, batch | {"normals": torch.where(normals == 255, 0.0, normals)}


def test_losses_of_a_model_output() -> None:
    logits, batch = model_output()
    losses = {task: float(loss) for task, loss in TASKS.losses(logits, batch).items()}
    assert losses == pytest.approx({task: OUTPUT["losses"][task] for task in losses}, rel=1e-6)
    total = sum(TASKS[task].weight * loss for task, loss in losses.items())
    assert total == pytest.approx(OUTPUT["total"], rel=1e-6)
    edge = balanced_bce(logits["sal"], batch["sal"], identity, positive_weight=0.95)
    assert edge is not None
    assert float(edge) == pytest.approx(OUTPUT["losses"]["edge_w0.95_on_sal"], rel=1e-6)


@pytest.mark.parametrize(
    ("task", "name", "theirs", "percent"),
    [
        ("semseg", "mIoU", "mIoU", 100),
        ("human_parts", "mIoU", "mIoU", 100),
        ("sal", "mIoU", "mIoU", 100),
        ("sal", "maxF1", "maxF", 100),
        ("sal", "maxF", "Beta maxF", 100),
        ("normals", "mean", "mean", 1),
        ("normals", "mean", "rmse", 1),
    ],
)
def test_scores_of_a_model_output(task: str, name: str, theirs: str, percent: float) -> None:
    logits, batch = model_output()
    ours: dict[str, float] = {}
    for metric in TASKS[task].metrics():
        metric.update(TASKS[task].predict(logits[task]), batch[task])
        ours |= metric.compute()
    assert ours[name] == pytest.approx(percent * OUTPUT["scores"][task][theirs], rel=1e-6)


def test_clean_normals_of_a_model_output() -> None:
    logits, batch = model_output()
    metric = AngularError()
    metric.update(Normals().predict(logits["normals"]), batch["normals"])
    assert metric.compute()["mean"] == pytest.approx(OUTPUT["scores"]["normals"]["mean_v2"], abs=1e-5)
