"""Scores of a model on a split."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sized

import torch

from polytask.errors import PolytaskError
from polytask.model import MultiTaskModel
from polytask.parallel import gather, total
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
    final: bool = False,
    description: str = "evaluate",
) -> Scores:
    """Scores of all tasks; exact over processes and independent of the batch size.

    Args:
        model: the model; its mode is restored afterwards.
        tasks: what to predict and score.
        batches: labeled batches (this process's part of the split).
        bf16: run the model under bfloat16 autocast.
        final: also the scores that take long, such as odsF (up to a second per image).
        description: words before the progress bar.
    """
    device = next(model.parameters()).device
    metrics = {name: task.accumulators(final=final) for name, task in tasks.items()}
    was_training = model.training
    model.eval()
    total_batches = len(batches) if isinstance(batches, Sized) else None
    for batch in track(plain_errors(batches), description, total_batches):
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
            metric.reduce(lambda part: total(part.to(device)).cpu(), gather)
            scores[name] |= metric.compute()
    return scores


def plain_errors(batches: Iterable[Sample]) -> Iterator[Sample]:
    """The batches; an error that a loader process reports with its traceback becomes one sentence again."""
    try:
        yield from batches
    except PolytaskError as error:
        sentence = re.search(rf"\n(?:\w+\.)*{type(error).__name__}: (.*)", str(error))
        if sentence is None:
            raise
        raise type(error)(sentence[1]) from None


def headlines(scores: Scores, tasks: TaskSet) -> dict[str, float]:
    """The one number per task that enters the average relative gain."""
    return {name: scores[name][task.headline] for name, task in tasks.items()}
