"""Methods that weight the tasks by the Gramian of their gradients."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from polytask.balancers import solvers
from polytask.balancers.solvers import Array
from polytask.balancers.weighting import Needs, Problem, State, Weighting
from polytask.config import register


@register("balancer", "mgda")
class MGDA(Weighting):
    """The shortest convex combination of the gradients (Désidéri 2012; Sener and Koltun, NeurIPS 2018)."""

    type: Literal["mgda"] = "mgda"
    normalize: Literal["none", "l2", "loss", "loss+"] = Field(
        default="none", description="rows divided by their norm, loss or both before the solve"
    )

    def solve(self, problem: Problem, state: State) -> Array:  # noqa: ARG002
        """Weights of the rows as they are: those of the normalized rows, divided by what normalized them."""
        norms, losses = np.sqrt(np.diag(problem.gram)), np.abs(problem.losses).clip(1e-12)
        by = {"none": np.ones(len(problem)), "l2": norms, "loss": losses, "loss+": losses * norms}[
            self.normalize
        ]
        return solvers.min_norm(problem.gram / np.outer(by, by)) / by


@register("balancer", "cagrad")
class CAGrad(Weighting):
    """Largest worst improvement near the mean gradient (Liu et al., NeurIPS 2021)."""

    type: Literal["cagrad"] = "cagrad"
    c: float = Field(
        default=0.4, ge=0.0, description="radius of the ball, as a part of the mean gradient's norm"
    )
    rescale: Literal[0, 1, 2] = Field(default=1, description="divide by 1, 1 + c² or 1 + c")

    def solve(self, problem: Problem, state: State) -> Array:  # noqa: ARG002
        return solvers.cagrad(problem.gram, self.c) / (1.0, 1 + self.c**2, 1 + self.c)[self.rescale]


class AlphaFair(Weighting):
    """Base of Nash-MTL, FairGrad and PIVRG."""

    max_norm: float = Field(
        default=1.0, ge=0.0, description="largest norm of the direction before the optimizer; 0: no limit"
    )

    def limited(self, w: Array, gram: Array) -> Array:
        """``w`` scaled down so that the direction is not longer than ``max_norm``."""
        norm = np.sqrt(max(float(w @ gram @ w), 0.0))
        return w * min(1.0, self.max_norm / norm) if self.max_norm and norm > 0 else w


@register("balancer", "nash")
class Nash(AlphaFair):
    """The Nash bargaining solution ``G α = 1 / α`` (Navon et al., ICML 2022); length sqrt(T) before the limit."""

    type: Literal["nash"] = "nash"

    MEAN: ClassVar[bool] = False

    def solve(self, problem: Problem, state: State) -> Array:  # noqa: ARG002
        return self.limited(solvers.alpha_fair(problem.gram, 1.0), problem.gram)


@register("balancer", "fairgrad")
class FairGrad(AlphaFair):
    """Alpha-fair gains, ``G x = x^(-1 / alpha)`` (Ban and Ji, ICML 2024)."""

    type: Literal["fairgrad"] = "fairgrad"
    alpha: float = Field(default=2.0, gt=0.0, description="1 is Nash-MTL; larger is closer to max-min")

    MEAN: ClassVar[bool] = False

    def solve(self, problem: Problem, state: State) -> Array:  # noqa: ARG002
        factor = len(problem) if self.reduction == "sum" else 1
        return self.limited(factor * solvers.alpha_fair(problem.gram, self.alpha), problem.gram)


@register("balancer", "pivrg")
class PIVRG(AlphaFair):
    """FairGrad with priorities from each task's gap to its single-task baseline.

    The gaps are in percent, larger is worse, set by ``set_scores``; without any, all are alike.
    """

    type: Literal["pivrg"] = "pivrg"
    alpha: float = Field(default=2.0, gt=0.0)
    bound: float = Field(default=2.0, gt=1.0, description="largest ratio of two priorities")
    min_temperature: float = Field(default=10.0, gt=0.0, description="of the softmax over gaps, percent")

    MEAN: ClassVar[bool] = False

    def solve(self, problem: Problem, state: State) -> Array:
        gaps = problem.mine(state, "scores", 0.0)
        temperature = max((gaps.max() - gaps.min()) / np.log(self.bound), self.min_temperature)
        priority = np.exp((gaps - gaps.max()) / temperature)
        priority *= len(problem) / priority.sum()
        factor = len(problem) if self.reduction == "sum" else 1
        return self.limited(factor * solvers.alpha_fair(problem.gram, self.alpha, priority), problem.gram)


@register("balancer", "pcgrad")
class PCGrad(Weighting):
    """Project away what conflicts, pair by pair (Yu et al., NeurIPS 2020)."""

    type: Literal["pcgrad"] = "pcgrad"
    order: Literal["random", "fixed", "expected"] = Field(
        default="random", description="of the pairs; expected: the mean over all orders, up to five tasks"
    )

    MEAN: ClassVar[bool] = False

    def solve(self, problem: Problem, state: State) -> Array:  # noqa: ARG002
        if self.order == "expected" and len(problem) <= 5:
            return solvers.pcgrad_expected(problem.gram)
        return solvers.pcgrad(problem.gram, problem.orders("fixed" if self.order == "fixed" else "random"))


@register("balancer", "gvac", "gradvac")
class GradVac(Weighting):
    """Gradient Vaccine: cosines are raised to their running mean (Wang et al., ICLR 2021)."""

    type: Literal["gvac"] = "gvac"
    beta: float = Field(default=0.01, ge=0.0, le=1.0, description="rate of the running mean")
    order: Literal["random", "fixed"] = "random"

    MEAN: ClassVar[bool] = False

    def solve(self, problem: Problem, state: State) -> Array:
        pairs = np.ix_(problem.rows, problem.rows)
        target = state.get("target", np.zeros((problem.total, problem.total)))
        w, new = solvers.gradvac(problem.gram, target[pairs], self.beta, problem.orders(self.order))
        state["target"] = target.copy()
        state["target"][pairs] = new
        return w


@register("balancer", "imtl")
class IMTL(Weighting):
    """Impartial learning: equal projections onto all gradients, and learned scales (Liu et al., ICLR 2021)."""

    type: Literal["imtl"] = "imtl"
    variant: Literal["full", "g"] = Field(
        default="full", description="g: without the learned scales of IMTL-L"
    )
    lr: float = Field(default=0.01, gt=0.0, description="Adam's, of the scales")

    def solve(self, problem: Problem, state: State) -> Array:
        if self.variant == "g":
            return solvers.equal_projection(problem.gram)
        factor = np.exp(problem.mine(state, "scale", 0.0).clip(-10, 10))
        alpha = solvers.equal_projection(problem.gram * np.outer(factor, factor))
        problem.adam(state, "scale", factor * problem.losses - 1, self.lr)
        return alpha * factor


@register("balancer", "amtl", "aligned_mtl")
class AlignedMTL(Weighting):
    """Weights as if the Jacobian had one singular value (Senushkin et al., CVPR 2023)."""

    type: Literal["amtl"] = "amtl"
    scale: Literal["min", "median", "rmse"] = Field(default="min", description="what that singular value is")
    tolerance: float | None = Field(
        default=None,
        gt=0.0,
        lt=1.0,
        description="smallest eigenvalue kept, relative; float32 rounding if unset",
    )

    def solve(self, problem: Problem, state: State) -> Array:  # noqa: ARG002
        n = len(problem)
        return solvers.aligned(problem.gram, np.full(n, 1 / n), self.scale, self.tolerance)


@register("balancer", "upgrad")
class UPGrad(Weighting):
    """The mean of the gradients, each projected so that it opposes no task (Quinton and Rey, 2024)."""

    type: Literal["upgrad"] = "upgrad"

    def solve(self, problem: Problem, state: State) -> Array:  # noqa: ARG002
        return np.asarray(solvers.dual_cone(problem.gram, np.eye(len(problem)) / len(problem)).sum(0))


@register("balancer", "dualproj")
class DualProj(Weighting):
    """The mean gradient, projected so that it opposes no task (Lopez-Paz and Ranzato, NeurIPS 2017)."""

    type: Literal["dualproj"] = "dualproj"

    def solve(self, problem: Problem, state: State) -> Array:  # noqa: ARG002
        n = len(problem)
        return np.asarray(solvers.dual_cone(problem.gram, np.full((1, n), 1 / n))[0])


@register("balancer", "config")
class ConFIG(Weighting):
    """Equal cosines with all gradients (Liu et al., 2024)."""

    type: Literal["config"] = "config"

    MEAN: ClassVar[bool] = False

    def solve(self, problem: Problem, state: State) -> Array:  # noqa: ARG002
        return solvers.config(problem.gram)


@register("balancer", "gn", "gradnorm")
class GradNorm(Weighting):
    """Learned weights that equalize the training rates (Chen et al., ICML 2018).

    Looks at the gradients of the last shared layer, as published.
    """

    type: Literal["gn"] = "gn"
    alpha: float = Field(default=1.5, ge=0.0, description="pull of tasks that learn slowly")
    lr: float = Field(default=0.025, gt=0.0, description="Adam's, of the weights")

    NEEDS: ClassVar[Needs] = "last_layer"
    MEAN: ClassVar[bool] = False
    ANGLES: ClassVar[bool] = False

    def solve(self, problem: Problem, state: State) -> Array:
        first = problem.mine(state, "first", np.nan)
        first = np.where(np.isnan(first), problem.losses, first)
        problem.keep(state, "first", first)
        excess = problem.mine(state, "excess", 0.0)  # of the weights over 1
        w = 1 + excess
        norms = np.sqrt(np.diag(problem.gram))
        ratio = np.divide(problem.losses, first, out=np.ones(len(problem)), where=first != 0)
        goal = (w * norms).mean() * (ratio / max(ratio.mean(), 1e-12)).clip(0) ** self.alpha
        new = 1 + problem.adam(state, "excess", np.sign(w * norms - goal) * norms, self.lr)
        new = new.clip(1e-3)
        new *= len(problem) / new.sum()
        problem.keep(state, "excess", new - 1)
        return w


@register("balancer", "modo")
class MoDo(Weighting):
    """Weights from two independent batches, for a third (Chen et al., JMLR 2024)."""

    type: Literal["modo"] = "modo"
    gamma: float = Field(default=1e-3, gt=0.0, description="step of the weights")
    rho: float = Field(default=0.1, ge=0.0, description="pull towards zero before the projection")

    BATCHES: ClassVar[int] = 3

    def solve(self, problem: Problem, state: State) -> Array:
        w = problem.mine(state, "w", 1 / problem.total)
        w = w / max(w.sum(), 1e-12)
        new = solvers.project_simplex(w - self.gamma * (problem.crossed @ w + self.rho * w))
        problem.keep(state, "w", new)
        return new


@register("balancer", "sdmgrad")
class SDMGrad(Weighting):
    """A direction kept near the mean gradient, its weights by descent on two batches (Xiao et al., NeurIPS 2023)."""

    type: Literal["sdmgrad"] = "sdmgrad"
    pull: float = Field(default=0.3, ge=0.0, description="of the mean gradient (λ)")
    steps: int = Field(default=20, ge=1)
    lr: float = Field(default=10.0, gt=0.0)

    BATCHES: ClassVar[int] = 3

    def solve(self, problem: Problem, state: State) -> Array:
        n = len(problem)
        w = problem.mine(state, "w", 1 / problem.total)
        w = w / max(w.sum(), 1e-12)
        scale = np.sqrt(np.diag(problem.gram)).mean() ** 2
        gram, speed = (problem.crossed + problem.crossed.T) / 2 / scale, np.zeros(n)
        for _ in range(self.steps):
            speed = 0.5 * speed + gram @ (w + self.pull / n)
            w = solvers.project_simplex(w - self.lr * speed)
        problem.keep(state, "w", w)
        return (w + self.pull / n) / (1 + self.pull)
