"""Task gradients as rows of one matrix, and ``.grad`` as views of one vector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from polytask.balancers.solvers import Array
from polytask.parallel import total, world

_CHUNK = 1 << 16
"""Columns multiplied at a time: the chunk stays in the processor's cache, and sums of chunks are float64."""


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T`` of wide matrices ``[n, P]``, accumulated in float64."""
    result = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    precise = len(left) * left.shape[1] <= _CHUNK
    for start in range(0, left.shape[1], _CHUNK):
        a, b = left[:, start : start + _CHUNK], right[:, start : start + _CHUNK]
        result += a.double() @ b.double().T if precise else a @ b.T
    return result


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
        dtype = torch.promote_types(torch.float32, local[0].dtype)
        self.matrix = torch.zeros(rows, sum(self.sizes), device=local[0].device, dtype=dtype)
        self.direction = self.matrix.new_zeros(sum(self.sizes))
        self._views = [self._split(row) for row in self.matrix]
        self._reached: set[int] = set()  # parameters that got a gradient since the last `put`

    def fits(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether these are its parameters."""
        return {*map(id, parameters)} == {*map(id, self.parameters)}

    def _split(self, flat: Tensor) -> list[Tensor]:
        pieces = torch.split(flat, self.sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    @contextmanager
    def filling(self, row: int, *, add: bool = False) -> Iterator[None]:
        """Gradients of the backward pass inside go into a row (or are added to it), not to ``.grad``."""
        views = dict(zip(map(id, self.parameters), self._views[row], strict=True))
        fresh = set() if add else set(views)

        def move(parameter: Tensor) -> None:
            gradient, view = parameter.grad, views[id(parameter)]
            if gradient is None:
                return
            gradient = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            view.copy_(gradient) if id(parameter) in fresh else view.add_(gradient)
            fresh.discard(id(parameter))
            self._reached.add(id(parameter))
            parameter.grad = None

        # while they are in the cache, and before the next ones are made
        hooks = [p.register_post_accumulate_grad_hook(move) for p in self.parameters]  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        for parameter in self.parameters:  # FSDP sets `.grad` past the hooks
            move(parameter)
        for key in fresh:
            views[key].zero_()

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
        w = torch.as_tensor(weights, dtype=self.matrix.dtype, device=self.matrix.device)
        torch.mv(self.matrix[: len(w)].T, w, out=self.direction)

    def put(self) -> None:
        """``.grad`` of the parameters becomes this process's part of ``direction``."""
        self.direction[: self.whole] /= world()
        for parameter, view in zip(self.parameters, self._split(self.direction), strict=True):
            if id(parameter) not in self._reached:
                continue
            gradient = view.to(parameter.dtype)
            if isinstance(parameter, DTensor):
                gradient = DTensor.from_local(
                    gradient, parameter.device_mesh, parameter.placements, shape=parameter.shape,
                    stride=parameter.stride(),
                )  # fmt: skip
            parameter.grad = gradient
        self._reached.clear()
