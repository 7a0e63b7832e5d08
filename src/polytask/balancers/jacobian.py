"""Task gradients as rows of one matrix, and ``.grad`` as views of one vector."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from polytask.balancers.solvers import Array
from polytask.parallel import total, world
from polytask.types import Partition

_CHUNK = 1 << 12
"""Columns multiplied at a time, but in one call: chunks stay in the cache, and sums of them are float64."""


def _chunks(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Views of its columns: ``[count, n, _CHUNK]``, and those that are left over, ``[n, rest]``."""
    count = matrix.shape[1] // _CHUNK
    even = matrix[:, : count * _CHUNK]
    return even.view(len(matrix), count, _CHUNK).transpose(0, 1), matrix[:, count * _CHUNK :]


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T`` of wide matrices ``[n, P]``, accumulated in float64."""
    if left.numel() <= 16 * _CHUNK:
        return left.double() @ right.double().T
    (a, rest), (b, other) = _chunks(left), _chunks(right)
    return torch.bmm(a, b.transpose(1, 2)).sum(0, dtype=torch.float64) + rest.double() @ other.double().T


def mix(weights: Array, rows: Tensor, out: Tensor) -> None:
    """``out`` ``[P]`` becomes the weighted sum of the rows ``[n, P]``."""
    w = torch.as_tensor(weights, dtype=rows.dtype, device=rows.device)[None]
    (chunks, rest), (into, last) = _chunks(rows), _chunks(out[None])
    torch.bmm(w.expand(len(chunks), *w.shape), chunks, out=into)
    torch.mm(w, rest, out=last)


def _kind(parameters: Sequence[nn.Parameter]) -> tuple[torch.device, torch.dtype]:
    """Their device, and a type that holds them all, float32 at least."""
    dtypes = {parameter.dtype for parameter in parameters}
    return parameters[0].device, reduce(torch.promote_types, dtypes, torch.float32)


class Jacobian:
    """Task gradients ``[T, P]``: parameters that all processes hold first, then this process's shards.

    Args:
        parameters: the shared parameters, of one device.
        rows: T.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], rows: int) -> None:
        self.parameters = sorted(parameters, key=lambda p: isinstance(p, DTensor))  # stable
        local = [p.to_local() if isinstance(p, DTensor) else p for p in self.parameters]
        self.sizes, self.shapes = [p.numel() for p in local], [p.shape for p in local]
        self.sharded = any(isinstance(p, DTensor) for p in parameters)
        self.whole = sum(
            n for n, p in zip(self.sizes, self.parameters, strict=True) if not isinstance(p, DTensor)
        )
        self.kind = _kind(parameters)
        self.matrix = torch.zeros(rows, sum(self.sizes), device=self.kind[0], dtype=self.kind[1])
        self.direction = self.matrix.new_zeros(sum(self.sizes))
        self._views, self._parts = [self._split(row) for row in self.matrix], self._split(self.direction)
        self._reached: set[int] = set()  # places of parameters that got a gradient since the last `put`

    def fits(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether these are its parameters, where and as precise as they were."""
        return {*map(id, parameters)} == {*map(id, self.parameters)} and _kind(parameters) == self.kind

    def _split(self, flat: Tensor) -> list[Tensor]:
        pieces = torch.split(flat, self.sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def take(self, row: int, *, add: bool = False) -> None:
        """Gradients go from ``.grad`` into a row (or are added to it)."""
        found: list[Any] = [p.grad for p in self.parameters]
        here = [i for i, gradient in enumerate(found) if gradient is not None]
        if not add and len(here) < len(found):
            self.matrix[row] = 0.0
        local = [found[i].to_local() if isinstance(found[i], DTensor) else found[i] for i in here]
        views = [self._views[row][i] for i in here]
        if add:
            torch._foreach_add_(views, local)
        else:
            torch._foreach_copy_(views, local)
        for i in here:
            self.parameters[i].grad = None
        self._reached.update(here)

    def exchange(self, rows: int) -> None:
        """Sum over processes what all of them hold; shards have been summed by the backward pass."""
        if world() == 1 or not self.whole:
            return
        if self.sharded:
            self.matrix[:rows, : self.whole] = total(self.matrix[:rows, : self.whole].contiguous())
        else:
            dist.all_reduce(self.matrix[:rows])

    def gramian(self, rows: int, other: Jacobian | None = None) -> Array:
        """``J Jᵀ`` (or ``J`` times the transpose of another one), float64 on the CPU."""
        left, right = self.matrix[:rows], (other or self).matrix[:rows]
        gram = product(left[:, : self.whole], right[:, : self.whole])
        if self.sharded:
            gram = gram + total(product(left[:, self.whole :], right[:, self.whole :]))
        result = np.asarray(gram.cpu().numpy(), dtype=float)
        return result if other else (result + result.T) / 2

    def mix(self, weights: Array) -> None:
        """``direction`` becomes ``Jᵀ w``."""
        mix(weights, self.matrix[: len(weights)], self.direction)

    def put(self) -> None:
        """``.grad`` of the parameters becomes this process's part of ``direction``."""
        if world() > 1:
            self.direction[: self.whole] /= world()
        for parameter, view in ((self.parameters[i], self._parts[i]) for i in self._reached):
            gradient = view.to(parameter.dtype)
            if isinstance(parameter, DTensor):
                gradient = DTensor.from_local(
                    gradient, parameter.device_mesh, parameter.placements, shape=parameter.shape,
                    stride=parameter.stride(),
                )  # fmt: skip
            parameter.grad = gradient
        self._reached.clear()


def put_away(partition: Partition, jacobians: Sequence[Jacobian]) -> list[tuple[nn.Parameter, Tensor]]:
    """What ``.grad`` holds already; those of the last step are copied, as their memory is used again."""
    own = {j.direction.untyped_storage().data_ptr() for j in jacobians}
    before = [(p, p.grad) for _, p in partition.trainable() if p.grad is not None]
    for parameter, _ in before:
        parameter.grad = None
    return [
        (p, g if isinstance(g, DTensor) or g.untyped_storage().data_ptr() not in own else g.clone())
        for p, g in before
    ]


def put_back(before: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """Add it to what ``.grad`` holds now."""
    for parameter, gradient in before:
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
