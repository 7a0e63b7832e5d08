"""Methods that look at single coordinates of the gradients, or remember whole gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from polytask.balancers.jacobian import product
from polytask.balancers.scalar import softmax
from polytask.balancers.solvers import Array, project_simplex
from polytask.balancers.weighting import Problem, Rowwise
from polytask.config import register

_CHUNK = 1 << 15
"""Columns that are worked on at a time, so that intermediate results stay in the processor's cache."""


def _chunks(size: int) -> Iterator[slice]:
    return (slice(start, start + _CHUNK) for start in range(0, size, _CHUNK))


def _remembered(memory: dict[str, Tensor], name: str, tasks: int, like: Tensor) -> Tensor:
    """One remembered gradient per task, ``[T, P]``; zeros at first, and when other parameters train."""
    kept = memory.get(name)
    if kept is None or kept.shape[1] != like.shape[1]:
        kept = torch.zeros(tasks, like.shape[1])
    memory[name] = kept.to(like)
    return memory[name]


def _mix(w: Array, rows: Tensor, out: Tensor) -> None:
    torch.mv(rows.T, torch.as_tensor(w, dtype=rows.dtype, device=rows.device), out=out)


def _per_task(memory: dict[str, Tensor], name: str, tasks: int, start: float) -> Any:
    """One remembered number per task, float64 ``[T]``, to be changed in place."""
    return memory.setdefault(name, torch.full((tasks,), start, dtype=torch.float64)).numpy()


@register("balancer", "graddrop")
class GradDrop(Rowwise):
    """Keep gradients of one sign per coordinate, drawn by its purity (Chen et al., NeurIPS 2020)."""

    type: Literal["gsd"] = "gsd"
    leak: float = Field(default=0.0, ge=0.0, le=1.0, description="part of each gradient that always passes")

    def direct(
        self,
        matrix: Tensor,
        problem: Problem,
        memory: dict[str, Tensor],  # noqa: ARG002
        out: Tensor,
    ) -> Array:
        generator = torch.Generator().manual_seed(problem.seed)
        self.drop(matrix, torch.rand(matrix.shape[1], generator=generator).to(matrix), out)
        return np.ones(len(problem))

    def drop(self, matrix: Tensor, draw: Tensor, out: Tensor) -> None:
        """Sum the rows ``[n, P]`` masked by uniform draws ``[P]`` into ``out``."""
        for part in _chunks(len(out)):
            summed, size = matrix[:, part].sum(0), matrix[:, part].abs().sum(0)
            purity = 0.5 * (1 + torch.nan_to_num(summed / size))  # 0 / 0: undecided
            positive = (size + summed) * (purity > draw[part])  # twice the sum of the positive entries
            negative = (summed - size) * (purity < draw[part])
            out[part] = self.leak * summed + (1 - self.leak) / 2 * (positive + negative)


@register("balancer")
class MoCo(Rowwise):
    """Tracked gradients and weights that follow them (Fernando et al., ICLR 2023).

    ``legacy`` divides each gradient by its norm, multiplies it by its loss and takes a softmax for the
    projection, as a much used implementation does.
    """

    type: Literal["moco"] = "moco"
    beta: float = Field(
        default=0.5, gt=0.0, le=1.0, description="rate of the tracking, divided by step^beta_sigma"
    )
    beta_sigma: float = Field(default=0.5, ge=0.0)
    gamma: float = Field(default=0.1, gt=0.0, description="step of the weights, divided by step^gamma_sigma")
    gamma_sigma: float = Field(default=0.5, ge=0.0)
    rho: float = Field(default=0.0, ge=0.0, description="regularization of the weights")
    legacy: bool = False

    def direct(self, matrix: Tensor, problem: Problem, memory: dict[str, Tensor], out: Tensor) -> Array:
        n, tasks, rate = len(problem), len(problem.tasks), self.beta / problem.step**self.beta_sigma
        tracked = _remembered(memory, "tracked", tasks, matrix)
        sizes = problem.losses / np.sqrt(np.diag(problem.gram) + 1e-16) if self.legacy else np.ones(n)
        for row, gradient, size in zip(problem.rows, matrix, sizes, strict=True):
            tracked[row].mul_(1 - rate).add_(gradient, alpha=rate * float(size))
        gram = product(tracked, tracked).cpu().numpy()[np.ix_(problem.rows, problem.rows)]
        kept = _per_task(memory, "weights", tasks, 1 / tasks)
        w = kept[problem.rows]
        w = w - self.gamma / problem.step**self.gamma_sigma * (gram @ w + self.rho * w)
        kept[problem.rows] = w = softmax(w) if self.legacy else project_simplex(w)
        w = w * n if self.reduction == "sum" else w
        _mix(problem.full(w), tracked, out)
        return np.asarray(w)


@register("balancer", "dbmtl")
class DBMTL(Rowwise):
    """Log losses, and gradients brought to the largest norm (Lin et al., 2023)."""

    type: Literal["db_mtl"] = "db_mtl"
    beta: float = Field(
        default=0.9, ge=0.0, lt=1.0, description="memory of the gradients, divided by step^sigma"
    )
    sigma: float = Field(default=0.0, ge=0.0)

    def head_factors(self, problem: Problem, state: Any) -> Array:  # noqa: ARG002
        """Heads see the gradients of the log losses."""
        return 1 / (np.maximum(problem.losses, 0) + 1e-8)

    def direct(self, matrix: Tensor, problem: Problem, memory: dict[str, Tensor], out: Tensor) -> Array:
        tracked = _remembered(memory, "tracked", len(problem.tasks), matrix)
        keep, factors = self.beta / problem.step**self.sigma, self.head_factors(problem, memory)
        for row, gradient, factor in zip(problem.rows, matrix, factors, strict=True):
            tracked[row].mul_(keep).add_(gradient, alpha=(1 - keep) * float(factor))
        norms = torch.linalg.vector_norm(tracked, dim=1).double().cpu().numpy()[problem.rows]
        w = np.divide(norms.max(), norms, out=np.zeros_like(norms), where=norms > 0)
        _mix(problem.full(w), tracked, out)
        return np.asarray(w)


@register("balancer", "excess")
class ExcessMTL(Rowwise):
    """Weights grow with a second-order estimate of each task's excess risk (He et al., ICML 2024)."""

    type: Literal["excessmtl"] = "excessmtl"
    eta: float = Field(default=0.01, gt=0.0, description="step of the weights")
    decay: float = Field(
        default=1.0, gt=0.0, le=1.0, description="memory of the squared gradients; published: 1"
    )

    def direct(self, matrix: Tensor, problem: Problem, memory: dict[str, Tensor], out: Tensor) -> Array:
        rows, tasks = problem.rows, len(problem.tasks)
        squares = _remembered(memory, "squares", tasks, matrix)
        excess = np.zeros(len(rows))
        for k, row in enumerate(rows):
            for part in _chunks(len(out)):
                fresh, kept = matrix[k, part].square(), squares[row, part]
                kept.mul_(self.decay).add_(fresh)
                excess[k] += float((fresh / (kept + 1e-7).sqrt_()).sum())
        first, kept_weights = (_per_task(memory, n, tasks, s) for n, s in (("first", 0.0), ("weights", 1.0)))
        w, start = kept_weights[rows], first[rows]
        ratio = np.divide(excess, start, out=np.zeros_like(excess), where=start > 0)
        w = w * np.exp(self.eta * ratio)
        kept_weights[rows] = w = w * (len(w) / w.sum())
        first[rows] = np.where(start > 0, start, excess)
        _mix(w, matrix, out)
        return np.asarray(w)
