"""Gramians of something smaller than the Jacobian, and single backward passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from polytask.balancers import graph
from polytask.balancers.jacobian import product
from polytask.balancers.solvers import Array
from polytask.errors import ConfigError
from polytask.parallel import total


def of_parameters(losses: Sequence[Tensor], inputs: Sequence[nn.Parameter], sketch: int = 0) -> Tensor:
    """Gramian of the gradients of some parameters, float64 ``[n, n]``, over all processes.

    Args:
        losses: n scalars; their graph is kept.
        inputs: the parameters.
        sketch: R, to keep that many sums with random signs of each gradient; 0: all of it. Inner products
            survive up to ``1 / sqrt(R)``.

    Raises:
        ConfigError: sharded parameters.
    """
    inputs = _whole(inputs)
    size, dtype = sum(p.numel() for p in inputs), torch.promote_types(torch.float32, inputs[0].dtype)
    matrix = inputs[0].new_empty(len(losses), sketch or size, dtype=dtype)
    whole = matrix.new_zeros(size + -size % sketch) if sketch else None
    for row, loss in zip(matrix, losses, strict=True):
        found = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
        pieces = [_or_zeros(g, p).reshape(-1) for g, p in zip(found, inputs, strict=True)]
        torch.cat(pieces, out=row if whole is None else whole[:size])
        if whole is not None:
            torch.sum(whole.mul_(_signs(len(whole), whole.device)).view(-1, sketch), 0, out=row)
    matrix = total(matrix)  # linear in the gradients, so that shares may be summed first
    return product(matrix, matrix)


def last_layer(
    losses: Mapping[str, Tensor], shared: Sequence[nn.Parameter], known: dict[Any, nn.Parameter]
) -> list[nn.Parameter]:
    """The last shared layer of these tasks; ``known`` keeps what was found: one walk each."""
    key = (*losses, *map(id, shared))
    if key not in known:
        known[key] = graph.last_layer([*losses.values()], _whole(shared))
    return [known[key]]


def _whole(parameters: Sequence[nn.Parameter]) -> Sequence[nn.Parameter]:
    """The same; raises ConfigError for shards."""
    if any(isinstance(p, DTensor) for p in parameters):
        what = "sharded parameters allow the modes exact, stale and features, without audit"
        raise ConfigError(what, where="balancer.mode", hint="use run.parallel=replicated")
    return parameters


@lru_cache(maxsize=1)
def _signs(size: int, device: torch.device) -> Tensor:
    draw = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    return (2 * draw - 1).to(device)


def at_features(
    losses: Sequence[Tensor], frontier: Sequence[Tensor], owned: Sequence[Sequence[nn.Parameter]]
) -> tuple[Tensor, list[list[Tensor]]]:
    """Gramian of gradients where shared computation ends, batch kept; heads get their ``.grad`` on the way.

    Returns:
        float64 ``[n, n]`` over all processes, and each task's gradients for ``below_features``.

    Raises:
        ConfigError: no tensor there that depends on trainable parameters.
    """
    ends = [z for z in frontier if z.requires_grad]
    if all(map(_of_parameter, ends)):
        raise ConfigError(
            "mode 'features' needs tensors that all tasks share and that depend on trainable parameters",
            where="balancer.mode", hint="use exact, stale:K or sketch:R",
        )  # fmt: skip
    rows, parts = [], []
    for loss, heads in zip(losses, owned, strict=True):
        found = torch.autograd.grad(loss, [*ends, *heads], retain_graph=True, allow_unused=True)
        part = [_or_zeros(g, z) for g, z in zip(found, ends, strict=False)]
        spread = [g.reshape(-1) for g, z in zip(part, ends, strict=True) if not _of_parameter(z)]
        rows.append(torch.cat(spread))
        parts.append(part)
        for parameter, gradient in zip(heads, found[len(ends) :], strict=True):
            parameter.grad = gradient
    matrix = torch.stack(rows)
    return total(product(matrix, matrix)), parts  # samples are coordinates, so that the sum is exact


def _of_parameter(end: Tensor) -> bool:
    """Whether it is a weight rather than features, of which each process has its own samples."""
    return end.is_leaf or (end._base is not None and end._base.is_leaf)


def below_features(frontier: Sequence[Tensor], parts: Sequence[Sequence[Tensor]], w: Array) -> None:
    """One backward pass of all that lies before the features, with the tasks' gradients weighted."""
    columns = zip(*parts, strict=True)
    mixed = [sum(float(x) * g for x, g in zip(w, column, strict=True)) for column in columns]
    torch.autograd.backward([z for z in frontier if z.requires_grad], mixed)


def weighted(
    losses: Sequence[Tensor], owned: Sequence[Sequence[nn.Parameter]], w: Array, factors: Array
) -> None:
    """One backward pass of the weighted sum; heads' own gradients are multiplied by ``factors``."""
    small = 1e-6 * np.abs(w).max(initial=0.0)
    apart = [i for i, x in enumerate(w) if abs(x) <= small and factors[i] != x and owned[i]]
    held = {i: torch.autograd.grad(losses[i], owned[i], retain_graph=True, allow_unused=True) for i in apart}
    torch.autograd.backward(losses, [torch.full_like(y, float(x)) for x, y in zip(w, losses, strict=True)])
    scale(owned, np.divide(factors, w, out=np.ones(len(w)), where=np.abs(w) > small))
    for i, gradients in held.items():
        for parameter, gradient in zip(owned[i], gradients, strict=True):
            parameter.grad = None if gradient is None else gradient * float(factors[i])


def scale(owned: Iterable[Sequence[nn.Parameter]], factors: Array) -> None:
    """Multiply ``.grad`` of each task's own parameters."""
    for parameters, factor in zip(owned, factors, strict=True):
        gradients: list[Any] = [p.grad for p in parameters if p.grad is not None]
        if gradients and factor != 1:
            torch._foreach_mul_(gradients, float(factor))


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient
