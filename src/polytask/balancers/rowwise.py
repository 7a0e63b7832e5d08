"""Methods that look at single coordinates of the gradients, or remember whole gradients."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from polytask.balancers.solvers import Array, project_simplex
from polytask.balancers.weighting import Problem, Rowwise
from polytask.config import register


@register("balancer", "gsd", "graddrop")
class GradDrop(Rowwise):
    """Keep, per coordinate, the gradients of one sign, drawn by how pure the sign is (Chen et al., NeurIPS 2020)."""

    type: Literal["gsd"] = "gsd"
    leak: float = Field(default=0.0, ge=0.0, le=1.0, description="part of each gradient that always passes")

    def direct(self, matrix: Tensor, problem: Problem, memory: dict[str, Tensor], out: Tensor) -> Array:  # noqa: ARG002
        generator = torch.Generator().manual_seed(problem.seed)
        draw = torch.rand(matrix.shape[1], generator=generator).to(matrix.device)
        self.drop(matrix, draw, out)
        return np.ones(len(problem))

    def drop(self, matrix: Tensor, draw: Tensor, out: Tensor) -> None:
        """Sum the rows ``[n, P]`` masked by uniform draws ``[P]`` into ``out``."""
        summed, size = matrix.sum(0), matrix.abs().sum(0)
        purity = torch.where(size > 0, 0.5 * (1 + summed / size.clamp_min(torch.finfo(size.dtype).tiny)), 0.5)
        up, down = (purity > draw).to(matrix.dtype), (purity < draw).to(matrix.dtype)
        kept = matrix.clamp_min(0).sum(0) * up + matrix.clamp_max(0).sum(0) * down
        torch.add(self.leak * summed, kept, alpha=1 - self.leak, out=out)


@register("balancer", "moco")
class MoCo(Rowwise):
    """Tracked gradients and weights that follow them (Fernando et al., ICLR 2023).

    ``legacy`` divides each gradient by its norm, multiplies it by its loss and takes a softmax for the
    projection, as a much used implementation does.
    """

    type: Literal["moco"] = "moco"
    beta: float = Field(
        default=0.5, gt=0.0, le=1.0, description="rate of the tracking, divided by k^beta_sigma"
    )
    beta_sigma: float = Field(default=0.5, ge=0.0)
    gamma: float = Field(default=0.1, gt=0.0, description="step of the weights, divided by k^gamma_sigma")
    gamma_sigma: float = Field(default=0.5, ge=0.0)
    rho: float = Field(default=0.0, ge=0.0, description="regularization of the weights")
    legacy: bool = False

    def direct(self, matrix: Tensor, problem: Problem, memory: dict[str, Tensor], out: Tensor) -> Array:
        rows = torch.as_tensor(problem.rows)
        tracked = _remembered(memory, "tracked", problem.total, matrix)
        step = int(memory.setdefault("step", torch.zeros((), dtype=torch.int64))) + 1
        memory["step"] = torch.tensor(step)
        fresh = matrix
        if self.legacy:
            sizes = np.abs(problem.losses) / np.sqrt(np.diag(problem.gram) + 1e-16)
            fresh = matrix * _column(sizes, matrix)
        tracked[rows] += self.beta / step**self.beta_sigma * (fresh - tracked[rows])
        mine = tracked[rows]
        gram = (mine.double() @ mine.double().T).cpu().numpy()
        key = memory.setdefault(
            "weights", torch.full((problem.total,), 1 / problem.total, dtype=torch.float64)
        )
        w = key.numpy()[problem.rows]
        w = w - self.gamma / step**self.gamma_sigma * (gram + self.rho * np.eye(len(w))) @ w
        w = np.exp(w - w.max()) / np.exp(w - w.max()).sum() if self.legacy else project_simplex(w)
        key[rows] = torch.as_tensor(w)
        w = w * len(w) if self.reduction == "sum" else w
        torch.matmul(_column(w, matrix)[:, 0], mine, out=out)
        return w


@register("balancer", "db_mtl", "dbmtl")
class DBMTL(Rowwise):
    """Log losses, and gradients brought to the largest norm (Lin et al., 2023)."""

    type: Literal["db_mtl"] = "db_mtl"
    beta: float = Field(
        default=0.9, ge=0.0, lt=1.0, description="memory of the gradients, divided by k^sigma"
    )
    sigma: float = Field(default=0.0, ge=0.0)

    def direct(self, matrix: Tensor, problem: Problem, memory: dict[str, Tensor], out: Tensor) -> Array:
        rows = torch.as_tensor(problem.rows)
        step = int(memory.setdefault("step", torch.zeros((), dtype=torch.int64))) + 1
        memory["step"] = torch.tensor(step)
        tracked = _remembered(memory, "tracked", problem.total, matrix)
        keep = self.beta / step**self.sigma
        tracked[rows] = keep * tracked[rows] + (1 - keep) * matrix * _column(
            self.head_factors(problem), matrix
        )
        mine = tracked[rows]
        norms = mine.double().norm(dim=1).cpu().numpy()
        w = np.divide(norms.max(), norms, out=np.zeros_like(norms), where=norms > 0)
        torch.matmul(_column(w, matrix)[:, 0], mine, out=out)
        return w

    def head_factors(self, problem: Problem) -> Array:
        """Heads see the gradients of the log losses."""
        return 1 / (np.maximum(problem.losses, 0) + 1e-8)


@register("balancer", "excessmtl", "excess")
class ExcessMTL(Rowwise):
    """Weights grow with a second-order estimate of each task's excess risk (He et al., ICML 2024)."""

    type: Literal["excessmtl"] = "excessmtl"
    eta: float = Field(default=0.01, gt=0.0, description="step of the weights")
    decay: float = Field(
        default=1.0, gt=0.0, le=1.0, description="memory of the squared gradients; published: 1"
    )

    def direct(self, matrix: Tensor, problem: Problem, memory: dict[str, Tensor], out: Tensor) -> Array:
        rows = torch.as_tensor(problem.rows)
        squares = _remembered(memory, "squares", problem.total, matrix)
        squares[rows] = self.decay * squares[rows] + matrix.square()
        excess = (matrix.square() / (squares[rows] + 1e-7).sqrt()).double().sum(1).cpu().numpy()
        first = memory.setdefault("first", torch.zeros(problem.total, dtype=torch.float64))
        w_all = memory.setdefault("weights", torch.ones(problem.total, dtype=torch.float64))
        w, start = w_all.numpy()[problem.rows], first.numpy()[problem.rows]
        ratio = np.divide(excess, start, out=np.zeros_like(excess), where=start > 0)
        grown = w * np.exp(self.eta * ratio)
        w = np.where(start > 0, grown, w)
        w = w * (len(w) / w.sum()) if (start > 0).any() else w
        first[rows] = torch.as_tensor(np.where(start > 0, start, excess))
        w_all[rows] = torch.as_tensor(w)
        torch.matmul(_column(w, matrix)[:, 0], matrix, out=out)
        return w


def _remembered(memory: dict[str, Tensor], name: str, rows: int, like: Tensor) -> Tensor:
    """One remembered gradient per task, zeros at first, ``[rows, P]``."""
    if name not in memory or memory[name].shape[1] != like.shape[1]:
        memory[name] = torch.zeros(rows, like.shape[1], device=like.device)
    memory[name] = memory[name].to(like.device)
    return memory[name]


def _column(values: Array, like: Tensor) -> Tensor:
    """One number per row, ``[n, 1]``."""
    return torch.as_tensor(values, dtype=like.dtype, device=like.device)[:, None]
