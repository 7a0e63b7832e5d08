"""Recall and MAP at R against their definitions, worked out pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polytask.metrics.retrieval import Retrieval, nearest


def scored(vectors: Tensor, ids: list[int], batch: int = 3) -> dict[str, float]:
    metric = Retrieval(vectors.shape[1])
    for chunk, some in zip(vectors.split(batch), torch.tensor(ids).split(batch), strict=True):
        metric.update(chunk, some)
    return metric.compute()


def by_definition(vectors: Tensor, ids: list[int]) -> dict[str, float]:
    hits: dict[str, list[float]] = {f"recall_{k}": [] for k in (1, 2, 4, 8)} | {"MAP_R": []}
    known = [i for i, identity in enumerate(ids) if identity >= 0]
    for query in known:
        others = [i for i in known if i != query]
        wanted = sum(ids[i] == ids[query] for i in others)
        if not wanted:
            continue
        ranked = sorted(others, key=lambda i: (-float(vectors[query] @ vectors[i]), i))
        right = [ids[i] == ids[query] for i in ranked]
        for k in (1, 2, 4, 8):
            hits[f"recall_{k}"].append(any(right[:k]))
        precision = [sum(right[: i + 1]) / (i + 1) if right[i] else 0.0 for i in range(wanted)]
        hits["MAP_R"].append(sum(precision) / wanted)
    return {name: 100 * sum(values) / len(values) for name, values in hits.items()}


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.lists(st.integers(-1, 4), min_size=6, max_size=30), st.integers(0, 99))
def test_scores_follow_the_definition(ids: list[int], seed: int) -> None:
    """Whole numbers, so that many products are equal: the lower index comes first."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randint(-2, 3, (len(ids), 3), generator=generator).float()
    ids[:2] = [0, 0]
    assert scored(vectors, ids) == pytest.approx(by_definition(vectors, ids))


def test_a_worked_example() -> None:
    angles = torch.tensor([0.0, 10, 25, 45, 70])  # nearest: of 0 1, of 1 0, of 2 1, of 3 2, of 4 3
    vectors = torch.stack((angles.deg2rad().cos(), angles.deg2rad().sin()), 1)
    found = scored(vectors, [7, 3, 7, 3, 9])
    assert found["recall_1"] == 0
    assert found["recall_2"] == pytest.approx(100 / 4)  # of 0 the second one is right; 4 is no query
    assert found["recall_4"] == 100
    assert found["MAP_R"] == 0  # R = 1


def test_neighbors_are_in_order_and_never_oneself() -> None:
    vectors = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    query = torch.tensor([5, 299, 0])
    products = vectors[query] @ vectors.T
    products[torch.arange(3), query] = -torch.inf
    assert torch.equal(nearest(vectors, query, 299), products.argsort(1, descending=True)[:, :299])
    same = nearest(torch.zeros(6, 2), torch.arange(6), 3)  # all products are 0, some of them -0
    assert same.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("ids", [[-1, -1], [1, 2], [3, -1]])
def test_without_queries_it_is_nan(ids: list[int]) -> None:
    assert all(math.isnan(score) for score in scored(torch.ones(2, 2), ids).values())


def test_many_images_of_few_identities() -> None:
    vectors = torch.eye(2)[torch.arange(300) % 2]
    perfect = scored(vectors, [i % 2 for i in range(300)], batch=64)
    assert list(perfect.values()) == pytest.approx([100] * 5)
