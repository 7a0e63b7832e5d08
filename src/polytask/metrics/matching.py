"""Largest one-to-one matchings between the pixels of many masks and those of one map, all masks at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class _Graph:
    """Bipartite: a left node is a pixel of a mask, a right node a true pixel, once per mask."""

    mask: np.ndarray  # [left]
    shift: np.ndarray  # [left], the first right node of its mask
    first: np.ndarray  # [left], where its candidates begin
    degree: np.ndarray  # [left], how many they are
    candidates: np.ndarray  # true pixels within the radius, the nearest first
    rights: int

    def edges(self, lefts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Left and right end of all edges of some left nodes."""
        degree = self.degree[lefts]
        left = np.repeat(lefts, degree)
        places = np.arange(len(left)) + np.repeat(self.first[lefts] - (degree.cumsum() - degree), degree)
        return left, self.shift[left] + self.candidates[places]


def largest_matching(masks: np.ndarray, truth: np.ndarray, radius: float) -> np.ndarray:
    """Number of pairs in a largest matching of each mask with the truth, int64 ``[K]``.

    A pair is a pixel of the mask and one of the truth, at most ``radius`` apart; no pixel is in two pairs.
    Exact: every pixel takes its nearest free candidate, then augmenting paths (Hopcroft & Karp, 1973) are
    grown from all pixels left over at once.

    Args:
        masks: boolean ``[H, W, K]``.
        truth: boolean ``[H, W]``.
        radius: in pixels, at least 0.
    """
    graph = _graph(masks, truth, radius)
    mate = _greedy(graph)  # right node of each left node, or -1
    partner = np.full(graph.rights, -1)  # and the reverse
    partner[mate[mate >= 0]] = np.flatnonzero(mate >= 0)
    single = np.flatnonzero(mate < 0)
    while len(single):
        parent, ends = _grow(graph, partner, single)
        found = ends[single] >= 0
        path = ends[single[found]]
        while len(path):  # walk back to the root; matched edges become free ones and vice versa
            left = parent[path]
            mate[left], partner[path], path = path, left, mate[left]
            path = path[path >= 0]
        growing = np.bincount(graph.mask[single[found]], minlength=masks.shape[-1]) > 0
        single = single[~found & growing[graph.mask[single]]]  # where no path was found, there is none
    return np.bincount(graph.mask[mate >= 0], minlength=masks.shape[-1])


def _graph(masks: np.ndarray, truth: np.ndarray, radius: float) -> _Graph:
    """Edges between the pixels in reach of each other; other pixels are left out."""
    (height, width), reach = truth.shape, int(radius)
    true = np.pad(truth, reach)
    ids, count = np.full(true.size, -1, dtype=np.int32), int(true.sum())
    ids[true.ravel()] = np.arange(count)
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    square = rows**2 + columns**2
    inside = np.argsort(square, axis=None, kind="stable")[: (square <= radius**2).sum()]
    steps = (rows * true.shape[1] + columns).ravel()[inside]
    near = np.zeros(true.shape, dtype=bool)
    near.ravel()[np.flatnonzero(true)[:, None] + steps] = True
    pixels = np.flatnonzero(near[reach : reach + height, reach : reach + width] & masks.any(-1))
    centers = (pixels // width + reach) * true.shape[1] + pixels % width + reach
    around = ids[centers[:, None] + steps]  # [pixels, steps]
    degree = (around >= 0).sum(1)
    mask, pixel = np.nonzero(masks.reshape(height * width, -1)[pixels].T)
    first = (degree.cumsum() - degree)[pixel]
    candidates, rights = around[around >= 0], masks.shape[-1] * count
    return _Graph(mask, mask * count, first, degree[pixel], candidates, rights)


def _greedy(graph: _Graph) -> np.ndarray:
    """A matching to start from, by left node: in round k, whoever is single asks the k-th candidate."""
    mate, owner = np.full(len(graph.first), -1), np.full(graph.rights, -1)
    single = np.arange(len(mate))
    for k in range(int(graph.degree.max(initial=0))):
        single = single[graph.degree[single] > k]
        right = graph.shift[single] + graph.candidates[graph.first[single] + k]
        left, right = single[owner[right] < 0], right[owner[right] < 0]
        owner[right] = left  # of several that ask, the last one wins
        mate[left] = np.where(owner[right] == left, right, -1)
        single = single[mate[single] < 0]
    return mate


def _grow(graph: _Graph, partner: np.ndarray, roots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Disjoint trees of alternating paths from the roots, level by level: the left node before each right
    node, and by left node the unmatched right node at the end of a path from it; or -1."""
    parent, ends = np.full(graph.rights, -1), np.full(len(graph.first), -1)
    root = np.arange(len(ends))
    while len(roots):
        left, right = graph.edges(roots)
        left, right = left[parent[right] < 0], right[parent[right] < 0]
        parent[right] = left  # the last one wins
        won = parent[right] == left
        tree, right = root[left[won]], right[won]
        free = partner[right] < 0
        ends[tree[free]] = right[free]
        roots, tree = partner[right[~free]], tree[~free]
        root[roots] = tree
        roots = roots[ends[tree] < 0]
    return parent, ends
