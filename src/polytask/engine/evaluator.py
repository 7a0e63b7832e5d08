"""Scores of a model on a split."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from polytask.model import MultiTaskModel
from polytask.parallel import total
from polytask.progress import track
from polytask.tasks.base import TaskSet
from polytask.types import Sample, to_device

Scores = dict[str, dict[str, float]]
"""Task -> metric -> value, in the metric's unit."""


@torch.no_grad()
def evaluate(
    model: MultiTaskModel,
    tasks: TaskSet,
    batches: Iterable[Sample],
    *,
    bf16: bool = False,
    max_batches: int | None = None,
    description: str = "evaluate",
) -> Scores:
    """Scores of all tasks; exact over processes and independent of the batch size.

    Args:
        model: the model; its mode is restored afterwards.
        tasks: what to predict and score.
        batches: labeled batches (this process's part of the split).
        bf16: run the model under bfloat16 autocast.
        max_batches: stop after so many batches.
        description: words before the progress bar.
    """
    device = next(model.parameters()).device
    metrics = {name: task.metrics() for name, task in tasks.items()}
    was_training = model.training
    model.eval()
    for number, batch in enumerate(track(batches, description)):
        if number == max_batches:
            break
        moved = to_device(batch, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = model(moved["image"], tuple(tasks))
        for name, task in tasks.items():
            prediction = task.predict(output.logits[name].float())
            for metric in metrics[name]:
                metric.update(prediction, moved[name])
    model.train(was_training)
    scores: Scores = {}
    for name, accumulators in metrics.items():
        scores[name] = {}
        for metric in accumulators:
            metric.reduce(total)
            scores[name] |= metric.compute()
    return scores


def headlines(scores: Scores, tasks: TaskSet) -> dict[str, float]:
    """The one number per task that enters the average relative gain."""
    return {name: scores[name][task.headline] for name, task in tasks.items()}
