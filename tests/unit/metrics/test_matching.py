from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching

from polytask.metrics.matching import largest_matching


def by_scipy(mask: np.ndarray, truth: np.ndarray, radius: float) -> int:
    ours, true = np.argwhere(mask), np.argwhere(truth)
    near = ((ours[:, None] - true[None]) ** 2).sum(-1) <= radius**2
    return int((maximum_bipartite_matching(csr_matrix(near), perm_type="column") >= 0).sum())


@pytest.mark.parametrize("radius", [0, 1, 1.5, 2.9, 4.5, 30])
@pytest.mark.parametrize("dense", [0.02, 0.15, 0.5])
def test_as_large_as_that_of_scipy(radius: float, dense: float) -> None:
    g = np.random.default_rng(int(10 * radius + 100 * dense))
    truth = g.random((17, 23)) < dense
    masks = g.random((17, 23, 70)) < np.linspace(0, 2 * dense, 70)
    expected = [by_scipy(masks[..., k], truth, radius) if masks[..., k].any() else 0 for k in range(70)]
    assert largest_matching(masks, truth, radius).tolist() == expected


def test_greedy_choices_are_taken_back() -> None:
    """Each of three pixels in a row is nearest to a pixel that another one needs."""
    mask, truth = np.zeros((1, 9, 1), bool), np.zeros((1, 9), bool)
    mask[0, [2, 4, 6], 0] = truth[0, [0, 3, 5]] = True
    assert largest_matching(mask, truth, 2).tolist() == [3]


def test_nothing_to_match() -> None:
    empty, full = np.zeros((4, 5), bool), np.ones((4, 5), bool)
    assert largest_matching(full[..., None], empty, 2).tolist() == [0]
    assert largest_matching(np.stack([empty, full], -1), full, 0).tolist() == [0, 20]
    assert largest_matching(np.zeros((4, 5, 0), bool), full, 1).tolist() == []
