"""What all balancers share that choose one number per task: the problem they see and the way around them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from polytask.balancers.base import Balancer, BalancerSpec
from polytask.balancers.solvers import Array
from polytask.config import decode, registered
from polytask.errors import ConfigError, did_you_mean
from polytask.tasks.base import TaskSet

State = dict[str, np.ndarray[Any, Any]]
"""What a method remembers, by name; entries per task are as long as there are tasks."""


@dataclass(frozen=True)
class Problem:
    """One step, as a method sees it: only the tasks that are present, with finite losses and gradients.

    Attributes:
        losses: values over the global batch, float64 ``[n]``.
        gram: ``J Jᵀ``, float64 ``[n, n]``, none of its rows zero; empty where the method needs none.
        rows: which of all tasks these are, ``[n]``.
        total: number of all tasks.
        seed: of this step, the same on all processes.
        crossed: for methods that see three batches: ``J_1 J_2ᵀ``, ``[n, n]``.
    """

    losses: Array
    gram: Array
    rows: np.ndarray[Any, Any]
    total: int
    seed: int = 0
    crossed: Array = field(default_factory=lambda: np.zeros((0, 0)))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def generator(self) -> np.random.Generator:
        """Draws of this step."""
        return np.random.default_rng(self.seed)

    def orders(self, kind: str) -> np.ndarray[Any, Any]:
        """For each row the order in which the other rows are visited, ``[n, n - 1]``."""
        n, draw = len(self), self.generator
        others = [np.delete(np.arange(n), i) for i in range(n)]
        return np.stack([draw.permutation(o) if kind == "random" else o for o in others])

    def mine(self, state: State, name: str, start: float) -> Array:
        """The present tasks' part of what is remembered per task; ``start`` for all at first."""
        if name not in state:
            state[name] = np.full(self.total, start)
        return np.asarray(state[name][self.rows], dtype=float)

    def keep(self, state: State, name: str, values: Array) -> None:
        """Remember values of the present tasks."""
        kept = state[name].copy()
        kept[self.rows] = values
        state[name] = kept

    def adam(self, state: State, name: str, gradient: Array, lr: float, decay: float = 0.0) -> Array:
        """One step of Adam on what is remembered per task; the new values of the present tasks."""
        value = self.mine(state, name, 0.0)
        gradient = gradient + decay * value
        first = 0.9 * self.mine(state, f"{name}.first", 0.0) + 0.1 * gradient
        second = 0.999 * self.mine(state, f"{name}.second", 0.0) + 0.001 * gradient**2
        count = self.mine(state, f"{name}.count", 0.0) + 1
        step = first / (1 - 0.9**count) / (np.sqrt(second / (1 - 0.999**count)) + 1e-8)
        for key, new in (("", value - lr * step), (".first", first), (".second", second), (".count", count)):
            self.keep(state, name + key, new)
        return np.asarray(value - lr * step)


Needs = Literal["losses", "gram", "last_layer", "rows"]


class Weighting(BalancerSpec):
    """Base of the methods that give each task a weight; the direction is the weighted sum of the gradients.

    One convention for all: ``reduction: sum`` means that equal weighting is the plain sum of the losses, so that
    learning rates carry over; methods published with weights that sum to 1 are multiplied by the number of
    tasks. ``reduction: native`` leaves them as published.
    """

    mode: str = Field(
        default="exact",
        pattern=r"^(exact|features|last_layer|stale:[1-9]\d*|sketch:[1-9]\d*)$",
        description="where gradients are compared: exact, features, last_layer, stale:K (exact every K steps, weights "
        "kept in between) or sketch:R (exact, remembering R numbers per task)",
    )
    audit: int = Field(
        default=0, ge=0, description="compare a cheap mode with exact gradients every so many steps; 0: never"
    )
    scale_heads: bool = Field(
        default=False, description="multiply each head's own gradient by its task's weight too"
    )
    reduction: Literal["sum", "native"] = "sum"
    smoothing: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="CR-MOGM: part of the previous weights in the new ones"
    )

    NEEDS: ClassVar[Needs] = "gram"
    """What the weights depend on, besides the losses."""
    MEAN: ClassVar[bool] = True
    """Whether the published weights sum to 1 where all is equal (else to the number of tasks, or to none)."""
    ANGLES: ClassVar[bool] = True
    """Whether the weights depend on angles between gradients, which cheap modes do not preserve."""

    def build(self, tasks: TaskSet) -> Balancer:
        """Raises ConfigError where the mode does not fit the method."""
        from polytask.balancers.engine import GradientBalancer

        return GradientBalancer(self, tuple(tasks))

    @abstractmethod
    def solve(self, problem: Problem, state: State) -> Array:
        """Weights ``[n]`` as published; what is to be remembered is put into ``state``."""

    def epoch_end(self, state: State) -> None:
        """What the method does with its memory after each epoch."""

    def look_back(self, problem: Problem, state: State) -> None:
        """What the method learns from the losses after the update, if it ``LOOKS_BACK``."""

    def head_factors(self, problem: Problem) -> Array:
        """What the gradients of the heads are multiplied by besides (``scale_heads``)."""
        return np.ones(len(problem))

    def single(self, problem: Problem, state: State) -> Array:  # noqa: ARG002 - some remember losses
        """Weights where there is one task."""
        return np.ones(len(problem))


class Rowwise(Weighting):
    """Base of the methods that look at single coordinates of the gradients, or remember whole gradients."""

    NEEDS: ClassVar[Needs] = "rows"

    @abstractmethod
    def direct(self, matrix: Tensor, problem: Problem, memory: dict[str, Tensor], out: Tensor) -> Array:
        """Write the direction ``[P]`` into ``out`` and return weights ``[n]`` for the log.

        Args:
            matrix: gradients ``[n, P]`` of the tasks present.
            problem: with their Gramian.
            memory: may be changed.
            out: ``[P]``.
        """

    def solve(self, problem: Problem, state: State) -> Array:
        """There is no answer from the Gramian alone.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"balancer {self.type!r} needs the gradients themselves, not their Gramian")


@dataclass(frozen=True)
class Verdict:
    """Weights of all tasks, ``[T]``, zero for those that are missing; what is remembered."""

    weights: Array
    state: State


def weigh(spec: Weighting, problem: Problem, state: Mapping[str, Any]) -> Verdict:
    """Weights of one step, with the edge cases all methods share.

    Rows that are zero are left out and get weight 0; one row gets weight 1; if all are zero, all get 1.
    ``state`` is not changed.
    """
    state = dict(state)
    full = np.zeros(problem.total)
    norms = np.diag(problem.gram) if len(problem.gram) else np.ones(len(problem))
    alive = norms > 0
    if not alive.any():
        full[problem.rows] = 1.0
        return Verdict(full, state)
    if not alive.all():
        pick = np.ix_(alive, alive)
        crossed = problem.crossed[pick] if len(problem.crossed) else problem.crossed
        problem = Problem(
            problem.losses[alive],
            problem.gram[pick],
            problem.rows[alive],
            problem.total,
            problem.seed,
            crossed,
        )
    single = len(problem) == 1
    w = spec.single(problem, state) if single else spec.solve(problem, state)
    if spec.MEAN and spec.reduction == "sum" and not single:
        w = w * len(problem)
    if spec.smoothing:
        before = problem.mine(state, "smooth", np.nan)
        w = np.where(np.isnan(before), w, spec.smoothing * before + (1 - spec.smoothing) * w)
        problem.keep(state, "smooth", w)
    full[problem.rows] = w
    return Verdict(full, state)


def weights(
    name: str,
    gramian: Any,
    state: Mapping[str, Any] | None = None,
    *,
    losses: Any = None,
    seed: int = 0,
    **settings: Any,
) -> tuple[Array, State]:
    """The weights of a method for one Gramian, as a pure function in NumPy.

    Args:
        name: a registered method that weights tasks, such as ``cagrad``.
        gramian: ``J Jᵀ``, ``[T, T]``.
        state: what the previous call returned; None at first.
        losses: values ``[T]``, for methods that look at them; ones if None.
        seed: of this step, for methods that draw.
        settings: of the method, such as ``c=0.4``.

    Returns:
        weights ``[T]`` and the state for the next call.

    Raises:
        ConfigError: an unknown method or setting, or a Gramian that is none.
    """
    cls = registered("balancer").get(name)
    if cls is None or not issubclass(cls, Weighting):
        known = [n for n, c in registered("balancer").items() if issubclass(c, Weighting)]
        raise ConfigError(f"no weighting {name!r}", hint=did_you_mean(name, known))
    gram = np.asarray(gramian, dtype=float)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not np.isfinite(gram).all():
        raise ConfigError("not a Gramian", got=f"shape {gram.shape}", expected="finite numbers, [T, T]")
    values = np.ones(len(gram)) if losses is None else np.asarray(losses, dtype=float)
    problem = Problem(values, gram, np.arange(len(gram)), len(gram), seed)
    spec = decode(cls, settings)
    assert isinstance(spec, Weighting)
    verdict = weigh(spec, problem, state or {})
    return verdict.weights, verdict.state
