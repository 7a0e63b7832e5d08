"""What every registered kind of task promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from polytask.config import decode, encode, registered
from polytask.metrics.base import Metric
from polytask.tasks import Task, TaskSet

N, H, W = 5, 12, 16
Raw = Callable[[torch.Generator], Tensor]

SETTINGS: dict[str, dict[str, Any]] = {
    "segmentation": {"classes": ["a", "b", "c", "d"]},
    "classification": {"classes": ["a", "b", "c"]},
    "attributes": {"names": ["a", "b", "c"]},
    "embedding": {"dimension": 3},
}


def label_map(g: torch.Generator, classes: int) -> Tensor:
    """Blobs of classes with a stripe of 255, uint8 ``[H, W]``."""
    coarse = torch.randint(0, classes, (1, 1, 3, 4), generator=g).float()
    labels = F.interpolate(coarse, (H, W))[0, 0].to(torch.uint8)
    labels[:2] = 255
    return labels


def vectors(g: torch.Generator) -> Tensor:
    raw = F.normalize(torch.randn(H, W, 3, generator=g), dim=-1)
    raw[:2] = 0
    return raw


def meters(g: torch.Generator) -> Tensor:
    raw = 0.5 + 5 * torch.rand(H, W, generator=g)
    raw[:2] = 0
    return raw


RAW: dict[str, Raw] = {
    "segmentation": lambda g: label_map(g, 4),
    "saliency": lambda g: label_map(g, 2),
    "edge": lambda g: label_map(g, 2),
    "normals": vectors,
    "depth": meters,
    "classification": lambda g: torch.randint(0, 3, (), generator=g),
    "attributes": lambda g: torch.randint(0, 2, (3,), generator=g),
    "embedding": lambda g: torch.randint(0, 2, (), generator=g),
    "reconstruction": lambda g: torch.randint(0, 256, (3, H, W), generator=g).to(torch.uint8),
}
PREDICTION = {"normals": (3, H, W), "reconstruction": (3, H, W), "attributes": (3,), "embedding": (3,)}
"""Shape of the prediction for one image, where it is not one number, or one per pixel."""


def make(kind: str) -> Task:
    task = decode(registered("task")[kind], SETTINGS.get(kind, {}))
    assert isinstance(task, Task)
    return task


def targets(kind: str, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return stacked([make(kind).encode(RAW[kind](g)) for _ in range(N)])


def stacked(encoded: list[Tensor]) -> Tensor:
    """Targets as in a batch: plain, and ids as long."""
    batch = torch.stack(encoded).as_subclass(Tensor)
    return batch if batch.is_floating_point() else batch.long()


def without(kind: str, target: Tensor, which: slice) -> Tensor:
    """The targets, some of them unknown."""
    task = make(kind)
    if not task.of_image:
        target[which] = task.encode(task.unknown(H, W)).as_subclass(Tensor)
    return target


def random_logits(task: Task, seed: int = 0) -> Tensor:
    shape = (N, task.channels, H, W) if task.dense else (N, task.channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))


def perfect_logits(task: Task, target: Tensor) -> Tensor:
    if target.is_floating_point():
        return target.clone()
    labels = target.reshape(N, *target.shape[2:]) if task.dense else target
    known = torch.where((labels < 0) | (labels == 255), 0, labels)
    if task.channels == 1 or task.type == "attributes":
        return 40.0 * known.reshape(N, task.channels, *known.shape[1 + (task.channels > 1) :]) - 20
    return 20 * F.one_hot(known, task.channels).movedim(-1, 1).float()


def scores(task: Task, logits: Tensor, target: Tensor) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric in task.metrics():
        metric.update(task.predict(logits), target)
        new = metric.compute()
        assert not found.keys() & new.keys()
        found |= new
    return found


kinds = pytest.mark.parametrize("kind", sorted(RAW))


def test_every_kind_is_covered() -> None:
    assert set(registered("task")) == set(RAW)


@kinds
def test_spec(kind: str) -> None:
    task = make(kind)
    assert task.type == kind
    assert decode(type(task), encode(task)) == task
    assert task.channels >= 1 and isinstance(task.higher_is_better, bool)


@kinds
def test_encode_gives_the_canonical_form(kind: str) -> None:
    raw = RAW[kind](torch.Generator().manual_seed(0))
    before = raw.clone()
    task, encoded = make(kind), make(kind).encode(raw)
    assert torch.equal(raw, before)
    if task.dense:
        assert encoded.shape[-2:] == (H, W) and encoded.shape[0] in (1, 3)
        assert encoded.dtype in (torch.uint8, torch.int64, torch.float32)
        assert type(encoded).__name__ in ("ClassMap", "ValueMap", "VectorMap", "Mirror")
    else:
        assert encoded.shape == raw.shape and encoded.dtype == torch.int64


@kinds
def test_unknown_is_a_raw_label_that_does_not_count(kind: str) -> None:
    task = make(kind)
    if not task.of_image:
        unknown = stacked([task.encode(task.unknown(H, W)) for _ in range(N)])
        assert unknown.shape == targets(kind).shape
        assert task.loss(random_logits(task), unknown) is None


@kinds
def test_perfect_logits_have_the_lower_loss_and_the_best_scores(kind: str) -> None:
    task, target = make(kind), targets(kind)
    perfect, random = perfect_logits(task, target), random_logits(task)
    good, bad = task.loss(perfect, target), task.loss(random, target)
    assert good is not None and bad is not None
    assert good.shape == () and good.dtype == torch.float32
    assert float(good) < float(bad)
    assert float(good) < 1e-5 or kind == "embedding"  # which cannot tell its positives apart
    best, worse = scores(task, perfect, target), scores(task, random, target)
    assert all(math.isfinite(score) for score in (best | worse).values())
    assert best[task.headline] == pytest.approx(100 if task.higher_is_better else 0, abs=1e-4)
    assert (best[task.headline] > worse[task.headline]) == task.higher_is_better


@kinds
def test_predict(kind: str) -> None:
    task = make(kind)
    prediction = task.predict(random_logits(task))
    assert prediction.shape == (N, *PREDICTION.get(kind, (H, W) if task.dense else ()))
    assert prediction.dtype == torch.int64 or prediction.dtype == torch.float32


@kinds
def test_nothing_valid(kind: str) -> None:
    task, empty = make(kind), without(kind, targets(kind), slice(None))
    if task.of_image:
        return  # it is always there
    assert task.loss(random_logits(task), empty) is None
    assert TaskSet({"t": task}).losses({"t": random_logits(task)}, {"t": empty}) == {}
    assert all(math.isnan(score) for score in scores(task, random_logits(task), empty).values())


@kinds
def test_loss_shares_add_up(kind: str) -> None:
    task, target = make(kind), targets(kind)
    logits = random_logits(task)
    target = without(kind, target, slice(1, 2))
    halves = (slice(0, 2), slice(2, N))
    sent: list[Tensor] = []
    for half in halves:
        task.loss(logits[half], target[half], lambda counts: sent.append(counts.clone()) or counts)
    assert len(sent) == 2  # one exchange per process
    shares = [task.loss(logits[half], target[half], lambda _: sent[0] + sent[1]) for half in halves]
    whole = task.loss(logits, target)
    assert whole is not None and shares[0] is not None and shares[1] is not None
    if kind != "embedding":  # whose images are compared within a process
        torch.testing.assert_close(shares[0] + shares[1], whole)


@kinds
@settings(max_examples=10, deadline=None)
@given(cuts=st.sets(st.integers(1, N - 1)), seed=st.integers(0, 3))
def test_metrics_do_not_depend_on_the_split(kind: str, cuts: set[int], seed: int) -> None:
    task, target = make(kind), targets(kind, seed)
    prediction = task.predict(random_logits(task, seed))
    bounds = [0, *sorted(cuts), N]
    for whole, split in zip(task.metrics(), task.metrics(), strict=True):
        whole.update(prediction, target)
        for start, end in pairwise(bounds):
            split.update(prediction[start:end], target[start:end])
        same_state(split, whole)


@kinds
def test_states_of_two_processes_merge(kind: str) -> None:
    task, target = make(kind), targets(kind)
    prediction = task.predict(random_logits(task))
    trios = zip(task.metrics(), task.metrics(), task.metrics(), strict=True)
    for whole, left, right in trios:
        whole.update(prediction, target)
        left.update(prediction[:2], target[:2])
        right.update(prediction[2:], target[2:])
        sent: list[Tensor] = []
        rows: list[Tensor] = []
        right.reduce(
            lambda flat, sent=sent: sent.append(flat) or flat,  # what the other process sends
            lambda part, rows=rows: rows.append(part) or part,
        )
        left.reduce(
            lambda flat, sent=sent: flat + next(t for t in sent if t.dtype == flat.dtype),
            lambda part, rows=rows: torch.cat((part, rows.pop(0))),
        )
        same_state(left, whole)


def same_state(metric: Metric, other: Metric) -> None:
    assert metric.state.keys() == other.state.keys()
    for name, value in metric.state.items():
        assert value.dtype in (torch.int64, torch.float64) or name in metric.ROWS
        assert value.device.type == "cpu"
        exact = 0 if value.dtype == torch.int64 else 1e-9
        torch.testing.assert_close(value, other.state[name], rtol=exact, atol=exact)
    assert metric.compute() == pytest.approx(other.compute(), rel=1e-6, nan_ok=True)


@kinds
def test_metrics_are_fresh(kind: str) -> None:
    task, target = make(kind), targets(kind)
    first = scores(task, random_logits(task), target)
    assert scores(task, random_logits(task), target) == first


@kinds
def test_colorize(kind: str) -> None:
    task, target = make(kind), targets(kind)
    for maps in (task.predict(random_logits(task)), target):
        image = maps[0].numpy()
        before = image.copy()
        picture = task.colorize(image)
        assert picture.dtype == np.uint8 and np.array_equal(image, before)
        assert picture.shape == ((H, W, 3) if task.dense else (1, max(image.size, 1), 3))
    assert bool(task.caption(image)) != task.dense


@kinds
def test_learns(kind: str) -> None:
    task, target = make(kind), targets(kind)
    logits = random_logits(task).requires_grad_()
    before = task.loss(logits, target)
    assert before is not None
    (gradient,) = torch.autograd.grad(before, logits)
    assert gradient.isfinite().all() and gradient.any()
    after = task.loss(logits - 0.1 * gradient / gradient.norm(), target)
    assert after is not None and after < before
