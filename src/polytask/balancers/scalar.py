"""Methods that weight the tasks by the values of their losses: one backward pass."""

from __future__ import annotations

from functools import cache
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from polytask.balancers.base import Balancer
from polytask.balancers.solvers import Array
from polytask.balancers.weighting import Problem, Scalarizer, State, check_names
from polytask.config import register
from polytask.errors import ConfigError, NonFiniteLossError
from polytask.tasks.base import TaskSet


def positive(problem: Problem, name: str) -> Array:
    """The losses, at least 1e-8.

    Raises:
        NonFiniteLossError: a loss below zero, which has no logarithm and no scale that makes it 1.
    """
    low = int(np.argmin(problem.losses))
    if problem.losses[low] < -1e-8:
        task = problem.tasks[problem.rows[low]]
        what = f"balancer {name!r} divides by losses, and that of task {task!r} is negative"
        raise NonFiniteLossError(what, got=float(problem.losses[low]), expected="losses above 0")
    return np.maximum(problem.losses, 1e-8)


def softmax(x: Array) -> Array:
    """Along a vector."""
    e = np.exp(x - x.max())
    return np.asarray(e / e.sum())


@register("balancer", "ew")
class EqualSpec(Scalarizer):
    """The plain sum of the losses."""

    type: Literal["equal"] = "equal"

    FOR_ONE: ClassVar[bool] = True
    CONSTANT: ClassVar[bool] = True
    MEAN: ClassVar[bool] = False

    def solve(self, problem: Problem, state: State) -> Array:  # noqa: ARG002
        return np.ones(len(problem))


@register("balancer")
class FixedSpec(Scalarizer):
    """A weighted sum; weights default to each task's own ``weight``."""

    type: Literal["fixed"] = "fixed"
    weights: dict[str, float] = Field(default_factory=dict)

    FOR_ONE: ClassVar[bool] = True
    CONSTANT: ClassVar[bool] = True
    MEAN: ClassVar[bool] = False

    @field_validator("weights")
    @classmethod
    def _not_negative(cls, value: dict[str, float]) -> dict[str, float]:
        if any(w < 0 for w in value.values()):
            raise ValueError(f"a loss weight is at least 0, got {value}")
        return value

    def build(self, tasks: TaskSet) -> Balancer:
        """Raises ConfigError for a weight of a task that is not there."""
        check_names(self.weights, tasks, "balancer.weights")
        own = {name: task.weight for name, task in tasks.items()}
        return super(FixedSpec, self.model_copy(update={"weights": own | self.weights})).build(tasks)

    def solve(self, problem: Problem, state: State) -> Array:  # noqa: ARG002
        return np.array([self.weights.get(problem.tasks[row], 1.0) for row in problem.rows])


@register("balancer", "uncertainty", "uncertainty_weighting")
class UncertaintySpec(Scalarizer):
    """Uncertainty weighting (Kendall, Gal, Cipolla, CVPR 2018): ``1/2 (exp(-s_t) L_t + s_t)``, s learned."""

    type: Literal["uw"] = "uw"
    lr: float = Field(default=0.01, gt=0.0, description="Adam's, of s")

    MEAN: ClassVar[bool] = False

    def solve(self, problem: Problem, state: State) -> Array:
        w = 0.5 * np.exp(-problem.mine(state, "s", 0.0))
        problem.keep(state, "s", problem.adam(state, "s", 0.5 - w * problem.losses, self.lr).clip(-10, 10))
        return w


@register("balancer")
class IMTLLoss(Scalarizer):
    """IMTL-L: ``exp(s_t) L_t - s_t``, s learned: weighted losses approach 1 (Liu et al., ICLR 2021)."""

    type: Literal["imtl_l"] = "imtl_l"
    lr: float = Field(default=0.01, gt=0.0, description="Adam's, of s")

    MEAN: ClassVar[bool] = False

    def solve(self, problem: Problem, state: State) -> Array:
        w = np.exp(problem.mine(state, "s", 0.0))
        slope = w * positive(problem, self.type) - 1
        problem.keep(state, "s", problem.adam(state, "s", slope, self.lr).clip(-10, 10))
        return w


@register("balancer", "log_losses")
class LogLosses(Scalarizer):
    """The sum of the logarithms of the losses: scale-invariant, without settings or memory."""

    type: Literal["si"] = "si"

    MEAN: ClassVar[bool] = False

    def solve(self, problem: Problem, state: State) -> Array:  # noqa: ARG002
        return 1 / positive(problem, self.type)


@register("balancer", "gls", "geometric_loss_strategy")
class Geometric(Scalarizer):
    """The geometric mean of the losses (Chennupati et al., CVPRW 2019), in log space."""

    type: Literal["geo"] = "geo"

    def solve(self, problem: Problem, state: State) -> Array:  # noqa: ARG002
        losses = positive(problem, self.type)
        return np.asarray(np.exp(np.log(losses).mean()) / (len(problem) * losses))


@register("balancer", "random_loss_weighting")
class RandomWeights(Scalarizer):
    """Softmax of normal draws at each step (Lin et al., TMLR 2022)."""

    type: Literal["rlw"] = "rlw"

    def solve(self, problem: Problem, state: State) -> Array:  # noqa: ARG002
        """The draw of a task does not depend on which others are present."""
        return softmax(problem.draw().standard_normal(len(problem.tasks))[problem.rows])


class EpochMeans(Scalarizer):
    """Base of the methods that compare mean losses of epochs."""

    def note(self, problem: Problem, state: State) -> None:
        """Take the losses into the means of this epoch."""
        for name, value in (("sum", problem.losses), ("count", np.ones(len(problem)))):
            problem.keep(state, name, problem.mine(state, name, 0.0) + value)

    def means(self, state: State) -> Array:
        """Mean losses of the epoch, NaN for tasks that did not occur; the next epoch begins."""
        count = state["count"]
        result = np.where(count > 0, state["sum"] / np.maximum(count, 1), np.nan)
        state["sum"], state["count"] = np.zeros(len(count)), np.zeros(len(count))
        return result


@register("balancer", "dynamic_weight_average")
class DynamicAverage(EpochMeans):
    """Softmax of how fast each loss fell between the last two epochs (Liu et al., CVPR 2019)."""

    type: Literal["dwa"] = "dwa"
    temperature: float = Field(default=2.0, gt=0.0)

    def solve(self, problem: Problem, state: State) -> Array:
        self.note(problem, state)
        return softmax(problem.mine(state, "ratio", 1.0) / self.temperature)

    def epoch_end(self, state: State) -> None:
        """The mean losses of this epoch over those of the one before; absent tasks keep their ratio."""
        if "count" not in state:
            return
        mean = self.means(state)
        last = state.get("last", np.full(len(mean), np.nan))
        known = np.isfinite(mean) & np.isfinite(last) & (last != 0)
        state["ratio"] = np.where(known, mean / np.where(known, last, 1.0), state["ratio"])
        state["last"] = np.where(np.isfinite(mean), mean, last)


@register("balancer")
class SmoothTchebycheff(EpochMeans):
    """A smooth maximum of the losses over those at the end of the warm-up (Lin et al., ICML 2024)."""

    type: Literal["stch"] = "stch"
    mu: float = Field(default=1.0, gt=0.0, description="smaller is closer to the maximum")
    warmup_epochs: int = Field(
        default=4, ge=0, description="with log losses; the last one sets the reference (else 1)"
    )

    MEAN: ClassVar[bool] = False

    def solve(self, problem: Problem, state: State) -> Array:
        """``1 / L`` in the warm-up, then a softmax of the log losses times that."""
        losses = positive(problem, self.type)
        if "nadir" not in state and self.warmup_epochs:
            self.note(problem, state)
            return np.asarray(1 / losses)
        nadir = problem.mine(state, "nadir", 1.0)
        return np.asarray(len(problem) * softmax(np.log(losses / nadir) / self.mu) / losses)

    def epoch_end(self, state: State) -> None:
        """After the last epoch of the warm-up its mean losses become the reference."""
        if "nadir" in state or "count" not in state:
            return
        mean = self.means(state)
        state["epochs"] = state.get("epochs", np.zeros(1)) + 1
        if state["epochs"][0] >= self.warmup_epochs:
            state["nadir"] = np.where(np.isfinite(mean), mean, 1.0)


@register("balancer")
class FAMO(Scalarizer):
    """All log losses shall fall alike, by the losses after the update (Liu et al., NeurIPS 2023)."""

    type: Literal["famo"] = "famo"
    lr: float = Field(default=0.025, gt=0.0, description="Adam's, of the logits")
    decay: float = Field(default=1e-3, ge=0.0, description="weight decay of the logits")

    LOOKS_BACK: ClassVar[bool] = True

    def solve(self, problem: Problem, state: State) -> Array:
        losses = positive(problem, self.type)
        state["before"] = problem.full(losses)
        scaled = softmax(problem.mine(state, "logits", 0.0)) / losses
        return np.asarray(scaled / scaled.sum())

    def look_back(self, problem: Problem, state: State) -> None:
        """Tasks that had no part in the step learn nothing.

        Raises:
            ConfigError: there was no step.
        """
        if "before" not in state:
            raise ConfigError("looks back at a step, and there was none", where=f"balancer {self.type!r}")
        problem = problem.only(state["before"][problem.rows] > 0)
        drop = np.log(state["before"][problem.rows]) - np.log(positive(problem, self.type))
        z = softmax(problem.mine(state, "logits", 0.0))
        problem.adam(state, "logits", z * (drop - z @ drop), self.lr, self.decay)


@register("balancer")
class GO4Align(Scalarizer):
    """Tasks in groups of equal risk, one weight per group (Shen et al., NeurIPS 2024)."""

    type: Literal["go4align"] = "go4align"
    groups: int = Field(default=2, ge=1, description="K of the one-dimensional k-means, solved exactly")
    eta: float = Field(default=1e-4, gt=0.0, description="step of the risk indicators")

    MEAN: ClassVar[bool] = False

    def solve(self, problem: Problem, state: State) -> Array:
        losses = positive(problem, self.type)
        risk = problem.mine(state, "risk", 1 / len(problem.tasks)) * np.exp(-self.eta * losses)
        risk /= risk.sum()
        problem.keep(state, "risk", risk)
        return _centers(losses.sum() / losses * risk, min(self.groups, len(problem)))


def _centers(values: Array, groups: int) -> Array:
    """Each value's center in the best division of the sorted values into groups, by dynamic programming."""
    order = np.argsort(values)
    x = values[order]

    @cache
    def best(end: int, parts: int) -> tuple[float, tuple[int, ...]]:
        """Least sum of squares of the first ``end`` values in so many groups, and where these begin."""
        if parts == 1:
            return float(x[:end].var() * end), (0,)
        options = [(best(cut, parts - 1), cut) for cut in range(parts - 1, end)]
        return min((cost + float(x[cut:end].var() * (end - cut)), (*at, cut)) for (cost, at), cut in options)

    pieces = np.split(x, best(len(x), groups)[1][1:])
    result = np.empty(len(x))
    result[order] = np.concatenate([np.full(len(piece), piece.mean()) for piece in pieces])
    return result
