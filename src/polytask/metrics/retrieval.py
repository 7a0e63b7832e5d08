"""Scores of embeddings: does the nearest image show the same identity?"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from polytask.metrics.base import Metric

_CHUNK = 128  # queries at a time, so few that their products with all images stay in the cache


class Retrieval(Metric):
    """``recall_1 / 2 / 4 / 8`` and ``MAP_R`` in percent, exact, the whole split being queries and gallery.

    Recall at k: is the identity among the k nearest other images? MAP_R: precision at the hits among the R
    nearest, summed over R, where R counts the other images of the identity (Musgrave et al., ECCV 2020).
    Identities of one image are no queries; unknown ones (-1) take no part. Ties go to the lower index.
    """

    ROWS: ClassVar[frozenset[str]] = frozenset({"vectors", "ids"})
    depths = (1, 2, 4, 8)

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        super().__init__()

    def zeros(self) -> dict[str, Tensor]:
        return {"vectors": torch.zeros(0, self.dimension), "ids": torch.zeros(0, dtype=torch.int64)}

    def counts(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        known = target >= 0
        return {"vectors": prediction[known], "ids": target[known]}

    def compute(self) -> dict[str, float]:
        vectors, ids = self.state["vectors"], self.state["ids"]
        _, identity, images = torch.unique(ids, return_inverse=True, return_counts=True)
        others = images[identity] - 1
        queries = others.nonzero()[:, 0]
        depth = min(max(int(others.amax()), *self.depths), len(ids) - 1) if len(queries) else 0
        sums = torch.zeros(len(self.depths) + 1, dtype=torch.float64)
        for query in queries.split(_CHUNK):
            hit = ids[nearest(vectors, query, depth)] == ids[query, None]  # [n, depth]
            rank, wanted = torch.arange(1, depth + 1), others[query, None]
            precision = hit.cumsum(1).double() / rank
            within = hit & (rank <= wanted)
            found = [hit[:, :k].any(1).double() for k in self.depths]
            sums += torch.stack([*found, (precision * within / wanted).sum(1)]).sum(1)
        names = [*(f"recall_{k}" for k in self.depths), "MAP_R"]
        return dict(zip(names, (100 * sums / len(queries)).tolist(), strict=True))


def nearest(vectors: Tensor, query: Tensor, depth: int) -> Tensor:
    """Indices of the rows of ``[N, D]`` with the largest products with the rows ``query``, without these."""
    bits = (vectors[query] @ vectors.T + 0.0).view(torch.int32)  # + 0: there is a negative zero
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers that sort as the floats do
    key = order.long().mul_(1 << 32).sub_(torch.arange(len(vectors)))
    key.scatter_(1, query[:, None], torch.iinfo(torch.int64).min)  # not itself
    return key.topk(depth).indices
