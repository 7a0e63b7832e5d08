"""Any split of the data into batches and processes gives the scores of the whole."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from polytask import metrics
from polytask.metrics import Metric

IMAGES, SIZE = 7, (12, 14)
Pair = tuple[Tensor, Tensor]


def labels(g: torch.Generator, classes: int) -> Tensor:
    drawn = torch.randint(0, classes, (IMAGES, 1, *SIZE), generator=g)
    drawn[torch.rand(drawn.shape, generator=g) < 0.1] = 255
    drawn[3] = 255
    return drawn


def maps(g: torch.Generator) -> Pair:
    return torch.randint(0, 5, (IMAGES, *SIZE), generator=g), labels(g, 4)


def probabilities(g: torch.Generator) -> Pair:
    return torch.rand(IMAGES, *SIZE, generator=g), labels(g, 2)


def vectors(g: torch.Generator) -> Pair:
    target = F.normalize(torch.randn(IMAGES, 3, *SIZE, generator=g), dim=1)
    return torch.randn(IMAGES, 3, *SIZE, generator=g), target * (
        torch.rand(IMAGES, 1, *SIZE, generator=g) < 0.8
    )


def meters(g: torch.Generator) -> Pair:
    target = 5 * torch.rand(IMAGES, 1, *SIZE, generator=g) * (torch.rand(IMAGES, 1, *SIZE, generator=g) < 0.8)
    return 5 * torch.rand(IMAGES, *SIZE, generator=g), target


def classes(g: torch.Generator) -> Pair:
    return torch.randint(0, 3, (IMAGES,), generator=g), torch.randint(-1, 3, (IMAGES,), generator=g)


def attributes(g: torch.Generator) -> Pair:
    return torch.randint(0, 2, (IMAGES, 4), generator=g), torch.randint(-1, 2, (IMAGES, 4), generator=g)


def embeddings(g: torch.Generator) -> Pair:
    return F.normalize(torch.randn(IMAGES, 6, generator=g), dim=1), torch.randint(
        0, 2, (IMAGES,), generator=g
    )


def images(g: torch.Generator) -> Pair:
    return torch.rand(IMAGES, 3, *SIZE, generator=g), torch.rand(IMAGES, 3, *SIZE, generator=g)


CASES: dict[str, tuple[Callable[[], Metric], Callable[[torch.Generator], Pair]]] = {
    "MeanIoU": (lambda: metrics.MeanIoU(tuple("abcd")), maps),
    "SaliencyIoU": (metrics.SaliencyIoU, probabilities),
    "MaxF": (lambda: metrics.MaxF(255), probabilities),
    "BoundaryF": (metrics.BoundaryF, probabilities),
    "BoundaryScore": (lambda: metrics.BoundaryScore(0.1, thresholds=(0.2, 0.5, 0.8)), probabilities),
    "AngularError": (metrics.AngularError, vectors),
    "DepthError": (metrics.DepthError, meters),
    "Accuracy": (metrics.Accuracy, classes),
    "AttributeF1": (lambda: metrics.AttributeF1(4), attributes),
    "Retrieval": (lambda: metrics.Retrieval(6), embeddings),
    "ImageError": (metrics.ImageError, images),
}
quick = settings(deadline=None, max_examples=15, derandomize=True)


@pytest.mark.parametrize("name", CASES)
@quick
@given(seed=st.integers(0, 2**31), cuts=st.sets(st.integers(1, IMAGES - 1)), process=st.integers(0, IMAGES))
def test_splits_change_nothing(name: str, seed: int, cuts: set[int], process: int) -> None:
    make, draw = CASES[name]
    prediction, target = draw(torch.Generator().manual_seed(seed))
    edges = [0, *sorted(cuts), IMAGES]
    mine, other = make(), make()
    for start, end in itertools.pairwise(edges):
        (mine if start < process else other).update(prediction[start:end], target[start:end])
    mine.reduce(paired(mine, other, "sum"), paired(mine, other, "rows"))
    assert mine.compute() == pytest.approx(make().of(prediction, target), rel=1e-9, nan_ok=True)


def paired(mine: Metric, other: Metric, kind: str) -> Callable[[Tensor], Tensor]:
    """Reductions over two processes: the other one offers, in turn, what the first one reduces."""
    if kind == "rows":
        theirs = iter([other.state[name] for name in sorted(other.ROWS)])
        return lambda tensor: torch.cat((tensor, next(theirs)))
    sums = {name: value for name, value in other.state.items() if name not in other.ROWS}
    dtypes = dict.fromkeys(value.dtype for value in sums.values())
    flat = iter([torch.cat([v.reshape(-1) for v in sums.values() if v.dtype == d]) for d in dtypes])
    return lambda tensor: tensor + next(flat)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], dict[str, float]]] = {
    "MeanIoU": lambda p, t: metrics.segmentation_scores(p, t, "abcd"),
    "SaliencyIoU": metrics.saliency_iou,
    "MaxF": lambda p, t: metrics.max_f(p, t, 255),
    "BoundaryF": metrics.boundary_f,
    "BoundaryScore": lambda p, t: metrics.boundary_score(p, t, 0.1, thresholds=(0.2, 0.5, 0.8)),
    "AngularError": metrics.angular_error,
    "DepthError": metrics.depth_error,
    "Accuracy": metrics.accuracy,
    "AttributeF1": metrics.attribute_f1,
    "Retrieval": metrics.retrieval_scores,
    "ImageError": metrics.image_error,
}


@pytest.mark.parametrize("name", CASES)
def test_each_metric_has_a_function(name: str) -> None:
    make, draw = CASES[name]
    prediction, target = draw(torch.Generator().manual_seed(0))
    before = prediction.clone(), target.clone()
    found = FUNCTIONS[name](prediction, target)
    assert found == pytest.approx(make().of(prediction, target), nan_ok=True)
    assert torch.equal(prediction, before[0]) and torch.equal(target, before[1])


def test_all_metrics_are_covered() -> None:
    public = {name for name in metrics.__all__ if isinstance(getattr(metrics, name), type)}
    assert public - CASES.keys() == {"Metric", "MeanOfBatches"}


@pytest.mark.parametrize("name", CASES)
def test_of_leaves_no_trace(name: str) -> None:
    make, draw = CASES[name]
    prediction, target = draw(torch.Generator().manual_seed(0))
    metric = make()
    metric.update(prediction[:2], target[:2])
    before = metric.compute()
    assert metric.of(prediction, target) == pytest.approx(make().of(prediction, target), nan_ok=True)
    assert metric.compute() == pytest.approx(before, nan_ok=True)


def test_mean_of_batches_depends_on_them() -> None:
    prediction, target = meters(torch.Generator().manual_seed(0))
    metric = metrics.MeanOfBatches(metrics.DepthError())
    metric.update(prediction[:5], target[:5])
    metric.update(prediction[5:], target[5:])
    parts = [metrics.DepthError().of(prediction[s], target[s])["rmse"] for s in (slice(5), slice(5, None))]
    assert metric.compute()["rmse"] == pytest.approx(sum(parts) / 2, rel=1e-12)


def test_mean_of_batches_leaves_out_those_without_anything_valid() -> None:
    prediction, target = meters(torch.Generator().manual_seed(0))
    metric, some = metrics.MeanOfBatches(metrics.DepthError()), metrics.MeanOfBatches(metrics.DepthError())
    metric.update(prediction[:1], torch.zeros_like(target[:1]))
    assert all(math.isnan(value) for value in metric.compute().values())
    for batch in (slice(3), slice(3, None)):
        metric.update(prediction[batch], torch.zeros_like(target[batch]))
        metric.update(prediction[batch], target[batch])
        some.update(prediction[batch], target[batch])
    assert metric.compute() == some.compute() and math.isfinite(some.compute()["rmse"])
