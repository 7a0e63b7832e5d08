"""One frozen linear map with a shared and several task branches, as a single autograd operation.

The plain formulation makes a tensor per product, adds them and concatenates the streams; on wide token maps
that memory traffic costs more than the branches' arithmetic. Here every stream is written once, in place.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class Layout(NamedTuple):
    """How streams pass the layer.

    Attributes:
        streams: S, the shared stream and one per task.
        narrow: the input holds the shared stream only; every branch reads it.
        shared_in_tasks: task streams get the shared branch too (mode ``matrixv2``).
    """

    streams: int
    narrow: bool
    shared_in_tasks: bool


def branched_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shared: tuple[Tensor, Tensor] | None,
    tasks: tuple[Tensor, Tensor] | None,
    drop: Tensor | None,
    layout: Layout,
) -> Tensor:
    """``y_0 = W x_0 + B_s A_s x_0`` and ``y_t = W x_0 + B_t A_t x_t``, stacked stream-major.

    Args:
        x: ``[S * M, in]``, or ``[M, in]`` if narrow.
        weight: ``[out, in]``, frozen.
        bias: ``[out]`` or None, frozen.
        shared: A ``[r, in]`` and B ``[out, r]`` (scaled), or None to leave the branch out.
        tasks: A ``[T, r, in]`` and B ``[T, out, r]`` (scaled); None with one stream.
        drop: what dropout drops of the shared branch's input ``[M, in]`` (of all branches if narrow), see
            ``draw_dropped``; the rest must be scaled up in the factors.
        layout: see ``Layout``.

    Returns:
        ``[S * M, out]``. Differentiable once, in x and the branches.
    """
    none = (None, None)
    tensors = [x, weight, bias, *(shared or none), *(tasks or none)]
    if torch.is_autocast_enabled(x.device.type):  # as torch does for its own linear layers
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = [tensor if tensor is None else tensor.to(dtype) for tensor in tensors]
    y: Tensor = _BranchedLinear.apply(*tensors, drop, layout)
    return y


class _BranchedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None,
        shared_a: Tensor | None, shared_b: Tensor | None, task_a: Tensor | None, task_b: Tensor | None,
        drop: Tensor | None, layout: Layout,
    ) -> Tensor:  # fmt: skip
        streams, narrow, _ = layout
        rows = x.shape[0] if narrow else x.shape[0] // streams
        first = x[:rows]
        dropped = _drop(first, drop)
        y = x.new_empty(streams, rows, weight.shape[0])
        base = y[0]
        torch.mm(first, weight.t(), out=base)
        if bias is not None:  # apart: `addmm` first fills its output with the bias, which costs more
            base += bias
        shared_low = None if shared_a is None else dropped @ shared_a.t()
        if layout.shared_in_tasks and shared_low is not None and shared_b is not None:
            base.addmm_(shared_low, shared_b.t())
        task_low = None
        if task_a is not None and task_b is not None:
            if narrow:
                low = dropped @ task_a.flatten(0, 1).t()
                task_low = low.view(rows, *task_a.shape[:2]).transpose(0, 1).contiguous()
            else:
                task_low = torch.bmm(x.view(streams, rows, -1)[1:], task_a.transpose(1, 2))  # [T, M, r]
            torch.baddbmm(base.expand(streams - 1, -1, -1), task_low, task_b.transpose(1, 2), out=y[1:])
        if not layout.shared_in_tasks and shared_low is not None and shared_b is not None:
            base.addmm_(shared_low, shared_b.t())
        ctx.layout = layout
        ctx.save_for_backward(x, weight, shared_a, shared_b, task_a, task_b, drop, shared_low, task_low)
        return y.view(streams * rows, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Any, ...]:
        x, weight, shared_a, shared_b, task_a, task_b, drop, shared_low, task_low = ctx.saved_tensors  # type: ignore[attr-defined]
        streams, narrow, shared_in_tasks = ctx.layout  # type: ignore[attr-defined]
        rows = x.shape[0] if narrow else x.shape[0] // streams
        g = gradient.reshape(streams, rows, -1)
        first = x[:rows]
        dropped = _drop(first, drop)
        base = g.sum(0) if streams > 1 else g[0]
        grad_shared_a = grad_shared_b = grad_a = grad_b = lows = None
        into_shared = []
        if shared_a is not None:
            reaching = base if shared_in_tasks else g[0]
            low = reaching @ shared_b  # [M, r]
            grad_shared_a, grad_shared_b = low.t() @ dropped, (shared_low.t() @ reaching).t()
            into_shared.append((low, shared_a))
        if task_a is not None:
            lows = torch.bmm(g[1:], task_b)  # [T, M, r]
            grad_b = torch.bmm(task_low.transpose(1, 2), g[1:]).transpose(
                1, 2
            )  # thin factor first: 5 x faster
        if lows is not None and narrow:
            flat = lows.transpose(0, 1).reshape(rows, -1)
            grad_a = (flat.t() @ dropped).view_as(task_a)
            into_shared.append((flat, task_a.flatten(0, 1)))
        grad_x = torch.empty_like(x)
        _write_branches(grad_x[:rows], into_shared, drop)
        grad_x[:rows].addmm_(base, weight, beta=1 if into_shared else 0)  # 0 also where it holds no number
        if lows is not None and not narrow:
            grad_a = torch.bmm(lows.transpose(1, 2), x.view(streams, rows, -1)[1:])
            torch.bmm(lows, task_a, out=grad_x.view(streams, rows, -1)[1:])
        return grad_x, None, None, grad_shared_a, grad_shared_b, grad_a, grad_b, None, None


def _write_branches(grad_x: Tensor, branches: list[tuple[Tensor, Tensor]], drop: Tensor | None) -> None:
    """Write what flows back through branches that read the (dropped) shared stream."""
    if not branches:
        return
    left = torch.cat([low for low, _ in branches], 1) if len(branches) > 1 else branches[0][0]
    right = torch.cat([a for _, a in branches]) if len(branches) > 1 else branches[0][1]
    torch.mm(left, right, out=grad_x)
    if drop is not None:
        _drop_(grad_x, drop)


def draw_dropped(like: Tensor, probability: float) -> Tensor:
    """What dropout drops: on CUDA a bool mask, else flat places in ascending order, ``[n]``.

    Each element is dropped on its own with this probability: the gaps between such places are geometric.
    Drawing a few gaps and writing a few zeros costs a third of drawing and applying a mask.
    """
    if like.is_cuda:
        return torch.rand_like(like, dtype=torch.float32) < probability
    count, mean = like.numel(), like.numel() * probability
    enough = int(mean + 10 * math.sqrt(mean)) + 20  # ten standard deviations
    places = torch.empty(enough, dtype=torch.int64).geometric_(probability).cumsum_(0).sub_(1)
    return places[: int(torch.searchsorted(places, count))]


def _drop(x: Tensor, drop: Tensor | None) -> Tensor:
    return x if drop is None else _drop_(x.clone(memory_format=torch.contiguous_format), drop)


def _drop_(x: Tensor, drop: Tensor) -> Tensor:
    """In place; x is contiguous."""
    if drop.dtype == torch.bool:
        return x.masked_fill_(drop, 0.0)
    x.view(-1).scatter_(0, drop, 0.0)
    return x
