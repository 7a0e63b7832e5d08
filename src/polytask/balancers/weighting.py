"""What all methods share: the problem they see, and the way around them."""

from __future__ import annotations

import re
import warnings
from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from polytask.balancers.base import Balancer, BalancerSpec
from polytask.balancers.solvers import Array
from polytask.config import aliases, decode, full_name, registered
from polytask.errors import ConfigError, PolytaskWarning, did_you_mean
from polytask.tasks.base import TaskSet

State = dict[str, np.ndarray[Any, Any]]
"""What a method remembers, by name; entries per task are as long as there are tasks."""

MODES = r"^(exact|features|last_layer|stale:[1-9]\d*|sketch:[1-9]\d*)$"
_NONE = np.zeros((0, 0))


@dataclass(frozen=True)
class Problem:
    """One step, as a method sees it: only the tasks that are present, with finite losses and gradients.

    Attributes:
        losses: values over the global batch, float64 ``[n]``.
        rows: which of all tasks these are, ``[n]``.
        tasks: names of all tasks.
        gram: ``J Jᵀ``, float64 ``[n, n]``, none of its rows zero; empty for methods that see losses only.
        crossed: for methods that see three batches: ``J_1 J_2ᵀ``, ``[n, n]``.
        step: number of the step, from 1.
        seed: of this step, the same on all processes.
    """

    losses: Array
    rows: np.ndarray[Any, Any]
    tasks: tuple[str, ...]
    gram: Array = field(default_factory=lambda: _NONE)
    crossed: Array = field(default_factory=lambda: _NONE)
    step: int = 1
    seed: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def only(self, keep: np.ndarray[Any, Any]) -> Problem:
        """The same with those tasks only that ``keep`` marks, ``[n]``."""
        if keep.all():
            return self
        gram, crossed = (m[np.ix_(keep, keep)] if len(m) else m for m in (self.gram, self.crossed))
        return replace(self, losses=self.losses[keep], rows=self.rows[keep], gram=gram, crossed=crossed)

    def full(self, values: Array) -> Array:
        """Values of the present tasks among zeros, ``[T]``."""
        result = np.zeros(len(self.tasks))
        result[self.rows] = values
        return result

    def draw(self) -> np.random.Generator:
        """Random numbers of this step."""
        return np.random.default_rng(self.seed)

    def orders(self, kind: str) -> np.ndarray[Any, Any]:
        """For each row the order in which the other rows are visited, ``[n, n - 1]``."""
        draw, others = self.draw(), [np.delete(np.arange(len(self)), i) for i in range(len(self))]
        return np.stack([draw.permutation(o) if kind == "random" else o for o in others])

    def mine(self, state: State, name: str, start: float) -> Array:
        """The present tasks' part of what is remembered per task; ``start`` for all at first."""
        kept = state.setdefault(name, np.full(len(self.tasks), start))
        return np.asarray(kept[self.rows], dtype=float)

    def keep(self, state: State, name: str, values: Array) -> None:
        """Remember values of the present tasks."""
        state[name] = state[name].copy()
        state[name][self.rows] = values

    def adam(self, state: State, name: str, gradient: Array, lr: float, decay: float = 0.0) -> Array:
        """One step of Adam on what is remembered per task; the new values of the present tasks."""
        value = self.mine(state, name, 0.0)
        gradient = gradient + decay * value
        first = 0.9 * self.mine(state, f"{name}.first", 0.0) + 0.1 * gradient
        second = 0.999 * self.mine(state, f"{name}.second", 0.0) + 0.001 * gradient**2
        count = self.mine(state, f"{name}.count", 0.0) + 1
        value = value - lr * first / (1 - 0.9**count) / (np.sqrt(second / (1 - 0.999**count)) + 1e-8)
        for key, new in (("", value), (".first", first), (".second", second), (".count", count)):
            self.keep(state, name + key, new)
        return value


class Method(BalancerSpec):
    """Base of all methods that the engine runs.

    One convention for all: ``reduction: sum`` means that equal weighting is the plain sum of the losses, so
    that learning rates carry over; methods published with weights that sum to 1 are multiplied by the number
    of tasks. ``reduction: native`` leaves them as published.
    """

    reduction: Literal["sum", "native"] = "sum"

    FOR_ONE: ClassVar[bool] = False
    """Whether a single task is no reason to warn."""

    LOOKS_BACK: ClassVar[bool] = False
    """Whether ``look_back`` wants the losses after the update."""

    def build(self, tasks: TaskSet) -> Balancer:
        """The engine with this method."""
        from polytask.balancers.engine import GradientBalancer

        if len(tasks) == 1 and not self.FOR_ONE:
            what = f"balancer {self.type!r} has one task, whose gradient it leaves as it is"
            warnings.warn(what, PolytaskWarning, stacklevel=2)
        return GradientBalancer(self, tuple(tasks))

    def epoch_end(self, state: State) -> None:
        """What the method does with its memory after each epoch."""

    def look_back(self, problem: Problem, state: State) -> None:
        """What the method learns from the losses after the update, if it ``LOOKS_BACK``."""

    def head_factors(self, problem: Problem, state: Mapping[str, Any]) -> Array:  # noqa: ARG002
        """What the heads' own gradients are multiplied by, ``[n]``."""
        return np.ones(len(problem))


class Weighting(Method):
    """Base of the methods that give each task a weight; the direction is the weighted sum of gradients."""

    smoothing: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="CR-MOGM: part of the previous weights in the new ones"
    )

    MEAN: ClassVar[bool] = True
    """Whether the published weights sum to 1 (else to the number of tasks, or to none)."""

    @abstractmethod
    def solve(self, problem: Problem, state: State) -> Array:
        """Weights ``[n]`` as published; what is to be remembered is put into ``state``."""

    def limit(self, problem: Problem, w: Array) -> Array:  # noqa: ARG002
        """Weights ``[n]`` scaled down to what the method allows the length of the direction to be."""
        return w


class Scalarizer(Weighting):
    """Base of the methods that see loss values only; heads are weighted like the rest."""

    CONSTANT: ClassVar[bool] = False
    """Whether the weights are the same for all batches."""


class GradientWeighting(Weighting):
    """Base of the methods whose weights depend on the Gramian of the task gradients."""

    mode: str = Field(
        default="exact",
        description="where gradients are compared: exact, features, last_layer, stale:K (exact every K "
        "steps, weights kept in between) or sketch:R (exact, remembering R numbers per task)",
    )
    audit: int = Field(
        default=0, ge=0, description="compare a cheap mode with exact gradients every so many steps; 0: never"
    )
    scale_heads: bool = Field(
        default=False, description="multiply each head's own gradient by its task's weight too"
    )

    @field_validator("mode")
    @classmethod
    def _known(cls, value: str) -> str:
        if not re.match(MODES, value):
            raise ValueError(f"exact, features, last_layer, stale:K or sketch:R are there, got {value!r}")
        return value

    @model_validator(mode="after")
    def _something_to_audit(self) -> Self:
        if self.audit and self.mode == "exact":
            raise ValueError("audit compares another mode with exact gradients, and mode is exact")
        return self

    ANGLES: ClassVar[bool] = True
    """Whether the weights depend on angles between gradients, which cheap modes do not preserve."""


class Rowwise(Method):
    """Base of the methods that look at single coordinates of the gradients, or remember whole gradients."""

    scale_heads: bool = Field(
        default=False, description="multiply each head's own gradient by its task's weight too"
    )

    @abstractmethod
    def direct(self, matrix: Tensor, problem: Problem, memory: dict[str, Tensor], out: Tensor) -> Array:
        """Write the direction ``[P]`` into ``out`` and return weights ``[n]`` for the log.

        Args:
            matrix: gradients ``[n, P]`` of the tasks present.
            problem: with their Gramian, of which rows may be zero here.
            memory: may be changed.
            out: ``[P]``.
        """


def weigh(spec: Method, problem: Problem, state: Mapping[str, Any]) -> tuple[Array, State]:
    """Weights ``[T]`` of one step and what is remembered, with the edge cases all methods share.

    Rows that are zero are left out and get weight 0; one row gets weight 1, or less where a method of several
    tasks limits the length of the direction; if all are zero, all get 1. ``state`` is not changed.
    """
    new, scalar = dict(state), isinstance(spec, Scalarizer)
    alive = problem if scalar else problem.only(np.diag(problem.gram) > 0)
    if not len(alive):
        return problem.full(np.ones(len(problem))), new
    alone = len(problem.tasks if scalar else alive.rows) == 1
    assert isinstance(spec, Weighting)
    w = np.ones(1) if alone and not scalar else spec.solve(alive, new)
    if alone:
        return alive.full(spec.limit(alive, np.ones(1)) if len(problem.tasks) > 1 else np.ones(1)), new
    if spec.MEAN and spec.reduction == "sum":
        w = w * len(alive)
    if spec.smoothing:
        before = alive.mine(new, "smooth", np.nan)
        w = np.where(np.isnan(before), w, spec.smoothing * before + (1 - spec.smoothing) * w)
        alive.keep(new, "smooth", w)
    return alive.full(w), new


def figures(gram: Array, names: Sequence[str]) -> dict[str, float]:
    """Cosines, conflicts and norms of the gradients of a step, for the log.

    Gradients that are zero have no part in ``norm_ratio``.
    """
    norms = np.sqrt(np.diag(gram))
    cosines = gram / np.maximum(np.outer(norms, norms), np.finfo(float).tiny)
    pairs = [(i, j) for i in range(len(names)) for j in range(i)]
    shown = pairs if len(names) <= 8 else []
    return {
        **{f"cos/{names[j]}~{names[i]}": float(cosines[i, j]) for i, j in shown},
        "conflict": float(np.mean([cosines[pair] < 0 for pair in pairs])) if pairs else 0.0,
        "norm_ratio": float(norms.max() / norms[norms > 0].min()) if norms.any() else 1.0,
    }


def check_collects(spec: Method, mode: str) -> None:
    """Raises ConfigError for a method that cannot balance gradients added up over several batches."""
    if isinstance(spec, Scalarizer):
        what, got = "its weights depend on the losses of a whole batch", "losses of a part"
    elif spec.BATCHES > 1:
        what, got = f"it needs {spec.BATCHES} batches for a step already", "parts"
    elif mode != "exact":
        what, got = "gradients of several batches add up in mode 'exact' only", f"mode {mode!r}"
    else:
        return
    raise ConfigError(what, where=f"balancer {spec.type!r}", got=got, hint="use larger batches")


def check_names(names: Iterable[str], tasks: Collection[str], where: str) -> None:
    """Raises ConfigError for a name that is no task."""
    for name in names:
        if name not in tasks:
            hint = did_you_mean(str(name), tasks)
            raise ConfigError(f"{name!r} is not a task of this run", where=where, hint=hint)


def find(name: str, kind: type[Any]) -> type[Any]:
    """The registered method of that name or alias.

    Raises:
        ConfigError: there is none, or it is of another kind; names the nearest.
    """
    known = registered("balancer")
    cls = known.get(full_name("balancer", name))
    if cls is None:
        hint = did_you_mean(str(name), [*known, *aliases("balancer")])
        raise ConfigError(f"unknown balancer {name!r}", hint=hint)
    if not issubclass(cls, kind):
        what = f"balancer {name!r} needs the gradients themselves, a Gramian is not enough"
        raise ConfigError(what, hint=f"use polytask.balancers.balancer({name!r}, tasks)")
    return cls


def weights(
    name: str,
    gramian: Any,
    state: Mapping[str, Any] | None = None,
    *,
    losses: Any = None,
    step: int = 1,
    seed: int = 0,
    **settings: Any,
) -> tuple[Array, State]:
    """The weights of a method for one Gramian, as a pure function in NumPy.

    What methods learn between steps (``dwa`` and ``stch`` at the end of an epoch, ``famo`` after the update)
    is not learned here.

    Args:
        name: a registered method that weights tasks, such as ``cagrad``.
        gramian: ``J Jᵀ``, ``[T, T]``; for methods that see several batches also a pair of that and
            ``J_1 J_2ᵀ``, ``[2, T, T]``.
        state: what the previous call returned; None at first.
        losses: values ``[T]``, for methods that look at them; ones if None.
        step: number of the step, from 1.
        seed: of this step, for methods that draw.
        settings: of the method, such as ``c=0.4``.

    Returns:
        weights ``[T]`` and the state for the next call.

    Raises:
        ConfigError: an unknown method or setting, a Gramian that is none, losses or a state of other tasks.
    """
    spec = decode(find(name, Weighting), settings)
    grams = _numbers(gramian, "gramian", "finite numbers, [T, T]")
    grams = grams if grams.ndim == 3 and len(grams) == 2 else grams[None]
    gram, shape = grams[0], grams.shape[1:]
    if len(shape) != 2 or shape[0] != shape[1] or not _is_gramian(gram):
        raise ConfigError("not a Gramian", got=f"shape {shape}", expected="J @ J.T, [T, T]")
    values = _numbers(np.ones(len(gram)) if losses is None else losses, "losses", "a finite number per task")
    kept = {name: np.asarray(value) for name, value in (state or {}).items()}
    sizes = {len(gram), 1} | {len(value) for value in kept.values() if value.ndim}
    if values.shape != (len(gram),) or sizes != {len(gram), 1}:
        got = f"{len(gram)} rows, losses {values.shape}, state of {sorted(sizes - {1})}"
        raise ConfigError("Gramian, losses and state are of different tasks", got=got)
    tasks = tuple(str(i) for i in range(len(gram)))
    return weigh(spec, Problem(values, np.arange(len(gram)), tasks, gram, grams[-1], step, seed), kept)


def _numbers(values: Any, what: str, expected: str) -> Array:
    try:
        array = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        raise ConfigError("is not numeric", where=what, expected=expected) from None
    if not array.size or not np.isfinite(array).all():
        raise ConfigError("is empty or not finite", where=what, expected=expected)
    return array


def _is_gramian(gram: Array) -> bool:
    """Symmetric and positive semi-definite, up to rounding."""
    slack = 1e-5 * np.abs(np.diag(gram)).max()
    return bool(np.abs(gram - gram.T).max() <= slack and np.linalg.eigvalsh(gram)[0] >= -slack)
