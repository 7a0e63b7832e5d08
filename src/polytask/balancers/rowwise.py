"""Methods that look at single coordinates of the gradients, or remember whole gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from polytask.balancers.jacobian import mix, product
from polytask.balancers.scalar import positive, softmax
from polytask.balancers.solvers import Array, project_simplex
from polytask.balancers.weighting import Problem, Rowwise
from polytask.config import register

_CHUNK = 1 << 14
"""Columns that are worked on at a time, so that intermediate results stay in the processor's cache."""


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of tensors that are as wide as each other."""
    return zip(*(torch.split(x, _CHUNK, -1) for x in tensors), strict=True)


def _remembered(memory: dict[str, Tensor], name: str, tasks: int, like: Tensor) -> Tensor:
    """One remembered gradient per task, ``[T, P]``; zeros at first, and when other parameters train."""
    kept = memory.get(name)
    if kept is None or kept.shape[1] != like.shape[1]:
        kept = torch.zeros(tasks, like.shape[1])
    memory[name] = kept.to(like)
    return memory[name]


def _per_task(memory: dict[str, Tensor], name: str, tasks: int, start: float) -> Any:
    """One remembered number per task, float64 ``[T]``, to be changed in place."""
    return memory.setdefault(name, torch.full((tasks,), start, dtype=torch.float64)).numpy()


@register("balancer", "graddrop", "gradient_sign_dropout")
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
        generator = problem.draw()
        for rows, part in _chunks(matrix, out):
            bits = generator.integers(-(1 << 15), 1 << 15, len(part), np.int16)  # cheaper than floats
            self.drop(rows, torch.from_numpy(bits).to(rows).mul_(2**-16).add_(0.5), part)
        return np.ones(len(problem))

    def drop(self, matrix: Tensor, draw: Tensor, out: Tensor) -> None:
        """Sum the rows ``[n, P]`` masked by uniform draws ``[P]`` into ``out``."""
        ones = matrix.new_ones(1, len(matrix))
        summed, positive = (ones @ matrix)[0], (ones @ matrix.clamp(min=0))[0]
        negative = summed - positive
        # purity > draw, as numbers: a mask of bools and `where` take ten times as long
        kept = torch.gt(positive, draw * (positive - negative), out=torch.empty_like(summed))
        torch.lerp(negative, positive, kept, out=out)
        if self.leak:
            out.lerp_(summed, self.leak)


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
            tracked[row].lerp_(gradient * float(size) if self.legacy else gradient, rate)
        gram = product(tracked, tracked).cpu().numpy()[np.ix_(problem.rows, problem.rows)]
        kept = _per_task(memory, "weights", tasks, 1 / tasks)
        w = kept[problem.rows]
        w = w - self.gamma / problem.step**self.gamma_sigma * (gram @ w + self.rho * w)
        kept[problem.rows] = w = softmax(w) if self.legacy else project_simplex(w)
        w = w * n if self.reduction == "sum" else w
        mix(problem.full(w), tracked, out)
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
        return 1 / (positive(problem, self.type) + 1e-8)

    def direct(self, matrix: Tensor, problem: Problem, memory: dict[str, Tensor], out: Tensor) -> Array:
        tracked = _remembered(memory, "tracked", len(problem.tasks), matrix)
        keep, factors = self.beta / problem.step**self.sigma, self.head_factors(problem, memory)
        for row, gradient, factor in zip(problem.rows, matrix, factors, strict=True):
            tracked[row].mul_(keep).add_(gradient, alpha=(1 - keep) * float(factor))
        norms = torch.linalg.vector_norm(tracked, dim=1).double().cpu().numpy()[problem.rows]
        w = np.divide(norms.max(), norms, out=np.full_like(norms, not norms.any()), where=norms > 0)
        mix(problem.full(w), tracked, out)
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
        excess = np.array([self._excess(squares[r], g) for r, g in zip(rows, matrix, strict=True)])
        first, kept_weights = (_per_task(memory, n, tasks, s) for n, s in (("first", 0.0), ("weights", 1.0)))
        w, start = kept_weights[rows], first[rows]
        ratio = np.divide(excess, start, out=np.zeros_like(excess), where=start > 0)
        w = w * np.exp(self.eta * ratio)
        kept_weights[rows] = w = w * (len(w) / w.sum())
        first[rows] = np.where(start > 0, start, excess)
        mix(w, matrix, out)
        return np.asarray(w)

    def _excess(self, squares: Tensor, gradient: Tensor) -> float:
        """Of one task, whose remembered squares ``[P]`` take in those of its gradient."""
        parts = []
        for kept, fresh in _chunks(squares, gradient):
            if self.decay != 1:
                kept.mul_(self.decay)
            kept.addcmul_(fresh, fresh)
            parts.append(torch.dot(fresh, fresh / (kept + 1e-7).sqrt_()))
        return float(torch.stack(parts).sum(dtype=torch.float64))
