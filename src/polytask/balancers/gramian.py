"""Methods that weight the tasks by the Gramian of their gradients."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from polytask.balancers import solvers
from polytask.balancers.base import Balancer
from polytask.balancers.scalar import positive
from polytask.balancers.solvers import Array
from polytask.balancers.weighting import GradientWeighting, Problem, State, check_names
from polytask.config import register
from polytask.errors import ConfigError
from polytask.tasks.base import TaskSet


@register("balancer")
class MGDA(GradientWeighting):
    """The shortest convex combination of the gradients (Désidéri 2012; Sener and Koltun, NeurIPS 2018)."""

    type: Literal["mgda"] = "mgda"
    normalize: Literal["none", "l2", "loss", "loss+"] = Field(
        default="none", description="rows divided by their norm, loss or both before the solve"
    )

    def solve(self, problem: Problem, state: State) -> Array:  # noqa: ARG002
        """Weights of the rows as they are: those of the normalized rows, divided by what normalized them."""
        norms, losses = np.sqrt(np.diag(problem.gram)), np.abs(problem.losses).clip(1e-12)
        choices = {"none": np.ones(len(problem)), "l2": norms, "loss": losses, "loss+": losses * norms}
        by = choices[self.normalize]
        return np.asarray(solvers.min_norm(problem.gram / np.outer(by, by)) / by)


@register("balancer")
class CAGrad(GradientWeighting):
    """Largest worst improvement near the mean gradient (Liu et al., NeurIPS 2021)."""

    type: Literal["cagrad"] = "cagrad"
    c: float = Field(
        default=0.4, ge=0.0, description="radius of the ball, as a part of the mean gradient's norm"
    )
    rescale: Literal[0, 1, 2] = Field(default=1, description="divide by 1, 1 + c² or 1 + c")

    def solve(self, problem: Problem, state: State) -> Array:  # noqa: ARG002
        return solvers.cagrad(problem.gram, self.c) / (1.0, 1 + self.c**2, 1 + self.c)[self.rescale]


class AlphaFair(GradientWeighting):
    """Base of the methods that solve ``G x = (q / x)^(1 / alpha)``."""

    max_norm: float = Field(
        default=1.0, ge=0.0, description="largest norm of the direction before the optimizer; 0: no limit"
    )

    MEAN: ClassVar[bool] = False
    FACTOR: ClassVar[bool] = True
    """Whether the published code multiplies the solution by the number of tasks (``reduction: sum``)."""

    def fair(self, problem: Problem, alpha: float, priority: Array | None = None) -> Array:
        """The solution, scaled down so that the direction is not longer than ``max_norm``."""
        w = solvers.alpha_fair(problem.gram, alpha, priority)
        return self.limit(problem, w * len(problem) if self.FACTOR and self.reduction == "sum" else w)

    def limit(self, problem: Problem, w: Array) -> Array:
        """See ``Weighting.limit``."""
        norm = np.sqrt(max(float(w @ problem.gram @ w), 0.0))
        return w * min(1.0, self.max_norm / norm) if self.max_norm and norm > 0 else w


@register("balancer", "nash_mtl")
class Nash(AlphaFair):
    """Nash bargaining, ``G w = 1 / w`` (Navon et al., ICML 2022): length sqrt(T), then the limit."""

    type: Literal["nash"] = "nash"

    FACTOR: ClassVar[bool] = False

    def solve(self, problem: Problem, state: State) -> Array:  # noqa: ARG002
        return self.fair(problem, 1.0)


@register("balancer")
class FairGrad(AlphaFair):
    """Alpha-fair gains, ``G x = x^(-1 / alpha)`` (Ban and Ji, ICML 2024)."""

    type: Literal["fairgrad"] = "fairgrad"
    alpha: float = Field(default=2.0, gt=0.0, description="1 is Nash-MTL; larger is closer to max-min")

    def solve(self, problem: Problem, state: State) -> Array:  # noqa: ARG002
        return self.fair(problem, self.alpha)


@register("balancer")
class PIVRG(AlphaFair):
    """FairGrad with priorities from each task's gap to its single-task baseline.

    Gaps are in percent, larger is worse: ``gaps`` in the recipe, or in a loop of one's own
    ``balancer.memory["gaps"]``. Without any, all are alike.
    """

    type: Literal["pivrg"] = "pivrg"
    alpha: float = Field(default=2.0, gt=0.0)
    gaps: dict[str, float] = Field(default_factory=dict)
    bound: float = Field(default=2.0, gt=1.0, description="largest ratio of two priorities")
    min_temperature: float = Field(default=10.0, gt=0.0, description="of the softmax over gaps, percent")

    def build(self, tasks: TaskSet) -> Balancer:
        """Raises ConfigError for the gap of a task that is not there."""
        check_names(self.gaps, tasks, "balancer.gaps")
        return super().build(tasks)

    def solve(self, problem: Problem, state: State) -> Array:
        gaps: Any = np.array([self.gaps.get(name, 0.0) for name in problem.tasks])
        gaps = np.asarray(state.get("gaps", gaps))[problem.rows]
        temperature = max((gaps.max() - gaps.min()) / np.log(self.bound), self.min_temperature)
        priority = np.exp((gaps - gaps.max()) / temperature)
        return self.fair(problem, self.alpha, priority * (len(problem) / priority.sum()))


@register("balancer")
class PCGrad(GradientWeighting):
    """Project away what conflicts, pair by pair (Yu et al., NeurIPS 2020)."""

    type: Literal["pcgrad"] = "pcgrad"
    order: Literal["random", "fixed", "expected"] = Field(
        default="random", description="of the pairs; expected: the mean over all orders, for up to five tasks"
    )

    MEAN: ClassVar[bool] = False

    def solve(self, problem: Problem, state: State) -> Array:  # noqa: ARG002
        if self.order == "expected":
            if len(problem) > 5:
                what, hint = "order 'expected' is for at most 5 tasks", "use random or fixed"
                raise ConfigError(what, where="balancer.order", got=len(problem), hint=hint)
            return solvers.pcgrad_expected(problem.gram)
        return solvers.pcgrad(problem.gram, problem.orders(self.order))


@register("balancer", "gradvac", "gradient_vaccine")
class GradVac(GradientWeighting):
    """Gradient Vaccine: cosines are raised to their running mean (Wang et al., ICLR 2021)."""

    type: Literal["gvac"] = "gvac"
    beta: float = Field(default=0.01, ge=0.0, le=1.0, description="rate of the running mean")
    order: Literal["random", "fixed"] = "random"

    MEAN: ClassVar[bool] = False

    def solve(self, problem: Problem, state: State) -> Array:
        pairs, size = np.ix_(problem.rows, problem.rows), len(problem.tasks)
        target = state["target"] = state.get("target", np.zeros((size, size))).copy()
        w, target[pairs] = solvers.gradvac(problem.gram, target[pairs], self.beta, problem.orders(self.order))
        return w


@register("balancer")
class IMTL(GradientWeighting):
    """Impartial learning: equal projections onto all gradients, and learned scales (Liu et al., ICLR 2021).

    The scales are those of ``imtl_l`` and act on the heads too; ``variant: g`` leaves them out.
    """

    type: Literal["imtl"] = "imtl"
    variant: Literal["full", "g"] = "full"
    lr: float = Field(default=0.01, gt=0.0, description="Adam's, of the scales")

    def head_factors(self, problem: Problem, state: Any) -> Array:
        scales = np.zeros(len(problem)) if self.variant == "g" else problem.mine(dict(state), "s", 0.0)
        return np.asarray(np.exp(scales))

    def solve(self, problem: Problem, state: State) -> Array:
        factor = self.head_factors(problem, state)
        alpha = solvers.equal_projection(problem.gram * np.outer(factor, factor))
        if self.variant == "full":
            new = problem.adam(state, "s", factor * positive(problem, self.type) - 1, self.lr)
            problem.keep(state, "s", new.clip(-10, 10))
        return alpha * factor


@register("balancer", "aligned_mtl")
class AlignedMTL(GradientWeighting):
    """Weights as if the Jacobian had one singular value (Senushkin et al., CVPR 2023)."""

    type: Literal["amtl"] = "amtl"
    scale: Literal["min", "median", "rmse"] = Field(default="min", description="what that singular value is")
    tolerance: float | None = Field(
        default=None, gt=0.0, lt=1.0, description="smallest eigenvalue kept, relative; null: float32 rounding"
    )

    def solve(self, problem: Problem, state: State) -> Array:  # noqa: ARG002
        n = len(problem)
        return solvers.aligned(problem.gram, np.full(n, 1 / n), self.scale, self.tolerance)


class Cone(GradientWeighting):
    """Base of the methods that project onto the directions that no task opposes.

    ``legacy`` solves what torchjd does: the Gramian over its trace (nothing below 1e-4) plus 1e-4 of the
    identity, so that tasks with small gradients may be opposed.
    """

    legacy: bool = False

    def project(self, gram: Array, rows: Array) -> Array:
        """Weights of the sum of the projections of all rows, ``[K, n]``."""
        if self.legacy:
            trace = float(np.trace(gram))
            gram = gram / trace * (trace >= 1e-4) + 1e-4 * np.eye(len(gram))
        return np.asarray(solvers.dual_cone(gram, rows).sum(0))


@register("balancer")
class UPGrad(Cone):
    """The mean of the gradients, each projected so that it opposes no task (Quinton and Rey, 2024)."""

    type: Literal["upgrad"] = "upgrad"

    def solve(self, problem: Problem, state: State) -> Array:  # noqa: ARG002
        return self.project(problem.gram, np.eye(len(problem)) / len(problem))


@register("balancer")
class DualProj(Cone):
    """The mean gradient, projected so that it opposes no task (Lopez-Paz and Ranzato, NeurIPS 2017)."""

    type: Literal["dualproj"] = "dualproj"

    def solve(self, problem: Problem, state: State) -> Array:  # noqa: ARG002
        return self.project(problem.gram, np.full((1, len(problem)), 1 / len(problem)))


@register("balancer", "gradnorm")
class GradNorm(GradientWeighting):
    """Learned weights that equalize training rates, by last-layer norms (Chen et al., ICML 2018)."""

    type: Literal["gn"] = "gn"
    mode: str = "last_layer"
    alpha: float = Field(default=1.5, ge=0.0, description="pull of tasks that learn slowly")
    lr: float = Field(default=0.025, gt=0.0, description="Adam's, of the weights")

    MEAN: ClassVar[bool] = False
    ANGLES: ClassVar[bool] = False

    def solve(self, problem: Problem, state: State) -> Array:
        first = problem.mine(state, "first", np.nan)
        first = np.where(np.isnan(first), problem.losses, first)
        problem.keep(state, "first", first)
        excess = problem.mine(state, "excess", 0.0)  # of the weights over 1
        norms = np.sqrt(np.diag(problem.gram))
        ratio = np.divide(problem.losses, first, out=np.ones(len(problem)), where=first != 0).clip(0)
        goal = ((1 + excess) * norms).mean() * (ratio / max(ratio.mean(), 1e-12)) ** self.alpha
        slope = np.sign((1 + excess) * norms - goal) * norms
        new = (1 + problem.adam(state, "excess", slope, self.lr)).clip(1e-3)
        problem.keep(state, "excess", new * (len(problem) / new.sum()) - 1)
        return 1 + excess


@register("balancer")
class MoDo(GradientWeighting):
    """Weights from two independent batches, for a third (Chen et al., JMLR 2024)."""

    type: Literal["modo"] = "modo"
    gamma: float = Field(default=1e-3, gt=0.0, description="step of the weights")
    rho: float = Field(default=0.1, ge=0.0, description="pull towards zero before the projection")
    mode: Literal["exact"] = "exact"

    BATCHES: ClassVar[int] = 3

    def solve(self, problem: Problem, state: State) -> Array:
        w = problem.mine(state, "w", 1 / len(problem.tasks))
        w = w / max(w.sum(), 1e-12)
        new = solvers.project_simplex(w - self.gamma * (problem.crossed @ w + self.rho * w))
        problem.keep(state, "w", new)
        return new


@register("balancer")
class SDMGrad(GradientWeighting):
    """Near the mean gradient, with weights by descent on two other batches (Xiao et al., NeurIPS 2023)."""

    type: Literal["sdmgrad"] = "sdmgrad"
    pull: float = Field(default=0.3, ge=0.0, description="of the mean gradient (λ)")
    steps: int = Field(default=20, ge=1)
    lr: float = Field(default=10.0, gt=0.0)
    mode: Literal["exact"] = "exact"

    BATCHES: ClassVar[int] = 3

    def solve(self, problem: Problem, state: State) -> Array:
        n, crossed = len(problem), (problem.crossed + problem.crossed.T) / 2
        w = problem.mine(state, "w", 1 / len(problem.tasks))
        w = w / max(w.sum(), 1e-12)
        scale, speed = np.sqrt(np.diag(problem.gram)).mean() ** 2, np.zeros(n)
        for _ in range(self.steps):
            speed = 0.5 * speed + crossed @ (w + self.pull / n) / scale
            w = solvers.project_simplex(w - self.lr * speed)
        problem.keep(state, "w", w)
        return (w + self.pull / n) / (1 + self.pull)
