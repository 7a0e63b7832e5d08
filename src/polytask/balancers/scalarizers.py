"""Methods that weight the tasks by the values of their losses: one backward pass."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from polytask.balancers.solvers import Array
from polytask.balancers.weighting import Needs, Problem, State, Weighting
from polytask.config import register
from polytask.errors import NonFiniteLossError


class Scalarizer(Weighting):
    """Base of the methods that see loss values only; heads are weighted like the rest."""

    NEEDS: ClassVar[Needs] = "losses"
    MEAN: ClassVar[bool] = False
    ANGLES: ClassVar[bool] = False

    def positive(self, problem: Problem, floor: float = 1e-8) -> Array:
        """The losses, at least ``floor``.

        Raises:
            NonFiniteLossError: a loss below zero, whose logarithm does not exist.
        """
        if (problem.losses < -floor).any():
            what = f"balancer {self.type!r} takes logarithms of losses, and one is negative"
            raise NonFiniteLossError(what, got=float(problem.losses.min()), expected="losses above 0")
        return np.maximum(problem.losses, floor)


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return np.asarray(e / e.sum())


@register("balancer", "si", "log_losses")
class LogLosses(Scalarizer):
    """The sum of the logarithms of the losses: scale-invariant, without settings or memory."""

    type: Literal["si"] = "si"

    def solve(self, problem: Problem, state: State) -> Array:  # noqa: ARG002
        return 1 / self.positive(problem)

    single = solve


@register("balancer", "geo", "gls")
class Geometric(Scalarizer):
    """The geometric mean of the losses (Chennupati et al., CVPRW 2019), in log space."""

    type: Literal["geo"] = "geo"

    def solve(self, problem: Problem, state: State) -> Array:  # noqa: ARG002
        losses = self.positive(problem)
        return np.asarray(np.exp(np.log(losses).mean()) / (len(problem) * losses))


@register("balancer", "rlw")
class RandomWeights(Scalarizer):
    """Softmax of normal draws at each step (Lin et al., TMLR 2022)."""

    type: Literal["rlw"] = "rlw"

    MEAN: ClassVar[bool] = True

    def solve(self, problem: Problem, state: State) -> Array:  # noqa: ARG002
        return _softmax(problem.generator.standard_normal(problem.total)[problem.rows])


@register("balancer", "dwa")
class DynamicAverage(Scalarizer):
    """Softmax of how fast each loss fell between the last two epochs (Liu et al., CVPR 2019)."""

    type: Literal["dwa"] = "dwa"
    temperature: float = Field(default=2.0, gt=0.0)

    MEAN: ClassVar[bool] = True

    def solve(self, problem: Problem, state: State) -> Array:
        for name, value in (("sum", problem.losses), ("count", 1.0)):
            problem.keep(state, name, problem.mine(state, name, 0.0) + value)
        return _softmax(problem.mine(state, "ratio", 1.0) / self.temperature)

    def single(self, problem: Problem, state: State) -> Array:
        return np.ones_like(self.solve(problem, state))

    def epoch_end(self, state: State) -> None:
        """The mean losses of this epoch against those of the one before; absent tasks keep their ratio."""
        count = state.get("count", np.zeros(0))
        if not count.any():
            return
        seen = count > 0
        mean = np.where(seen, state["sum"] / np.maximum(count, 1), np.nan)
        last = state.get("last", np.full(len(mean), np.nan))
        known = seen & np.isfinite(last) & (last != 0)
        ratio = state.get("ratio", np.ones(len(mean)))
        state["ratio"] = np.where(known, mean / np.where(known, last, 1.0), ratio)
        state["last"] = np.where(seen, mean, last)
        state["sum"], state["count"] = np.zeros(len(mean)), np.zeros(len(mean))


@register("balancer", "stch")
class SmoothTchebycheff(Scalarizer):
    """A smooth maximum of the losses over those at the end of the warm-up (Lin et al., ICML 2024)."""

    type: Literal["stch"] = "stch"
    mu: float = Field(default=1.0, gt=0.0, description="smaller is closer to the maximum")
    warmup_epochs: int = Field(
        default=4, ge=0, description="with log losses; the last one sets the reference"
    )

    def solve(self, problem: Problem, state: State) -> Array:
        losses = self.positive(problem)
        if "nadir" not in state and self.warmup_epochs:
            for name, value in (("sum", losses), ("count", 1.0)):
                problem.keep(state, name, problem.mine(state, name, 0.0) + value)
            return np.asarray(1 / losses)
        nadir = problem.mine(state, "nadir", 1.0)
        return np.asarray(len(problem) * _softmax(np.log(losses / nadir) / self.mu) / losses)

    def epoch_end(self, state: State) -> None:
        """After the last epoch of the warm-up its mean losses become the reference."""
        if "nadir" in state or "count" not in state:
            return
        state["epochs"] = state.get("epochs", np.zeros(1)) + 1
        if state["epochs"][0] >= self.warmup_epochs:
            state["nadir"] = np.where(state["count"] > 0, state["sum"] / np.maximum(state["count"], 1), 1.0)
        state["sum"], state["count"] = np.zeros_like(state["sum"]), np.zeros_like(state["count"])


@register("balancer", "famo")
class FAMO(Scalarizer):
    """Weights that make all log losses fall alike, from the losses after the update (Liu et al., NeurIPS 2023)."""

    type: Literal["famo"] = "famo"
    lr: float = Field(default=0.025, gt=0.0, description="Adam's, of the logits")
    decay: float = Field(default=1e-3, ge=0.0, description="weight decay of the logits (γ)")

    LOOKS_BACK: ClassVar[bool] = True

    def solve(self, problem: Problem, state: State) -> Array:
        losses = self.positive(problem)
        problem.mine(state, "before", np.nan)
        problem.keep(state, "before", losses)
        scaled = _softmax(problem.mine(state, "logits", 0.0)) / losses
        return np.asarray(scaled / scaled.sum())

    def look_back(self, problem: Problem, state: State) -> None:
        """One step of Adam on the logits."""
        drop = np.log(problem.mine(state, "before", np.nan)) - np.log(self.positive(problem))
        z = _softmax(problem.mine(state, "logits", 0.0))
        problem.adam(state, "logits", z * (drop - z @ drop), self.lr, self.decay)


@register("balancer", "go4align")
class GO4Align(Scalarizer):
    """Tasks in groups of equal risk, one weight per group (Shen et al., NeurIPS 2024)."""

    type: Literal["go4align"] = "go4align"
    groups: int = Field(default=2, ge=1, description="K of the one-dimensional k-means, solved exactly")
    eta: float = Field(default=1e-4, gt=0.0, description="step of the risk indicators")

    def solve(self, problem: Problem, state: State) -> Array:
        losses = self.positive(problem)
        risk = problem.mine(state, "risk", 1 / problem.total) * np.exp(-self.eta * losses)
        risk /= risk.sum()
        problem.keep(state, "risk", risk)
        return _cluster(losses.sum() / losses * risk, min(self.groups, len(problem)))


def _cluster(values: Array, groups: int) -> Array:
    """Each value's center in the best division of the sorted values into groups (exact, by dynamic programming)."""
    order, n = np.argsort(values), len(values)
    x = values[order]
    cost = np.array(
        [[np.var(x[i : j + 1]) * (j + 1 - i) if j >= i else np.inf for j in range(n)] for i in range(n)]
    )
    best, cuts = cost[0].copy(), np.zeros((groups, n), int)
    for k in range(1, groups):
        options = np.array(
            [[best[i - 1] + cost[i, j] if 0 < i <= j else np.inf for i in range(n)] for j in range(n)]
        )
        cuts[k], new = options.argmin(1), options.min(1)
        cuts[k] = np.where(new < best, cuts[k], -1)
        best = np.minimum(best, new)
    centers, end = np.empty(n), n - 1
    for k in range(groups - 1, -1, -1):
        start = cuts[k, end] if k else 0
        if start < 0:
            continue
        centers[start : end + 1] = x[start : end + 1].mean()
        end = start - 1
        if end < 0:
            break
    result = np.empty(n)
    result[order] = centers
    return result
