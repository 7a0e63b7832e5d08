"""Runs any method at the floor of its cost: as many backward passes as there are tasks, one flat Jacobian.

Losses stay separate scalars, so each head is passed backward once. Several processes: losses are shares of
the global losses, so the rows of the Jacobian (or, cheaper, Gramians of features and sketches) are summed
over processes, all solve the same problem, and each keeps its part of the direction for the trainer's one
exchange.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polytask.balancers import cheap
from polytask.balancers.base import Balancer, global_values
from polytask.balancers.jacobian import Jacobian, put_away, put_back
from polytask.balancers.solvers import Array
from polytask.balancers.weighting import (
    GradientWeighting,
    Method,
    Problem,
    Rowwise,
    Scalarizer,
    State,
    Weighting,
    check_collects,
    check_names,
    figures,
    weigh,
)
from polytask.errors import ConfigError, NonFiniteLossError, PolytaskWarning
from polytask.seeding import derive
from polytask.types import Partition


@dataclass(frozen=True)
class _Step:
    """What the parts of one step need."""

    losses: Mapping[str, Tensor]
    shared: list[nn.Parameter]
    owned: list[list[nn.Parameter]]  # per task of the problem
    problem: Problem
    frontier: Sequence[Tensor] = ()
    parts: Sequence[Mapping[str, Tensor]] = field(default_factory=tuple)


class GradientBalancer(Balancer):
    """Any ``Method`` on a model's parameters (or, through ``step``, on any network's).

    Args:
        spec: the method and its mode.
        tasks: all tasks, in the order of the method's memory.
    """

    def __init__(self, spec: Method, tasks: Sequence[str]) -> None:
        super().__init__(tasks)
        self.spec = spec
        self.nonfinite, self.batches, self.looks_back = spec.nonfinite, spec.BATCHES, spec.LOOKS_BACK
        choice = spec if isinstance(spec, GradientWeighting) else None
        self.mode, _, number = (choice.mode if choice else "exact").partition(":")
        self.number, self.audit_every = int(number or 0), choice.audit if choice else 0
        self.scale_heads = isinstance(spec, GradientWeighting | Rowwise) and spec.scale_heads
        if choice and choice.ANGLES and self.mode in ("features", "last_layer"):
            what = f"balancer {spec.type!r} goes by angles of gradients, which mode {self.mode!r} does not"
            hint = "" if choice.audit else ", or set audit to measure it"
            warnings.warn(
                f"{what} preserve; use exact, stale:K or sketch:R{hint}", PolytaskWarning, stacklevel=3
            )
        self._jacobians: list[Jacobian] = []
        self._layers: dict[Any, nn.Parameter] = {}  # the last shared one of each set of tasks
        self._pending: dict[str, float] = {}  # losses of the tasks whose rows wait for more batches
        self._held: dict[nn.Parameter, Tensor] = {}  # gradients of their heads, which wait too
        self._finite: Any = None  # which rows of the last Jacobian are

    def epoch_end(self) -> None:
        """Tell the method."""
        state = self._state()
        self.spec.epoch_end(state)
        self._remember(state)

    def after_step(self, losses: Mapping[str, Tensor]) -> None:
        """Tell the method the losses after the update."""
        values = global_values(losses)
        problem, state = self._problem(values), self._state()
        self.spec.look_back(problem.only(np.isfinite(problem.losses)), state)
        self._remember(state)

    def cost(self) -> str:
        """See ``Balancer.cost``."""
        n, held = len(self.tasks), [m for j in self._jacobians for m in (j.matrix, j.direction)]
        size = sum(x.numel() * x.element_size() for x in [*held, *self.memory.values()])
        several = f"{n * self.batches} backward passes of what is shared"
        passes = {
            "exact": several, "stale": f"{several} every {self.number} steps, else one",
            "features": "one backward pass, gradients compared at the features",
            "last_layer": f"one backward pass, and {n} down to the last shared layer",
            "sketch": f"{n + 1} backward passes of what is shared",
        }[self.mode] if not isinstance(self.spec, Scalarizer) else "one backward pass"  # fmt: skip
        again = " and one more forward pass" if self.looks_back else ""
        return f"{self.spec.type}: {passes}{again} per step, {size / 1e6:.1f} MB of gradients and memory"

    def _problem(self, values: Mapping[str, float]) -> Problem:
        check_names(values, self.tasks, "losses")
        rows = np.array([self.tasks.index(name) for name in values])
        step = int(self.memory.get("step", torch.zeros(())))
        losses, seed = np.array([*values.values()]), derive(self.seed, step)
        return Problem(losses, rows, self.tasks, step=step, seed=seed)

    def _state(self) -> State:
        """The memory for NumPy; methods put new arrays in place of old ones."""
        return {name: value.numpy() for name, value in self.memory.items() if value.device.type == "cpu"}

    def _remember(self, state: State) -> None:
        self.memory |= {name: torch.as_tensor(value) for name, value in state.items()}

    def _settle(self, problem: Problem) -> Array:
        """Weights of the problem's tasks; the memory moves on."""
        assert isinstance(self.spec, Weighting) or not problem.gram.any()
        w, state = weigh(self.spec, problem, self._state())
        self._remember(state)
        return np.asarray(w[problem.rows])

    # --- the step ------------------------------------------------------------------------------------

    def collect(self, losses: Mapping[str, Tensor], partition: Partition) -> None:
        """Add this batch's gradients to those that the next ``backward`` will balance.

        Raises:
            ConfigError: a mode or a method that does not keep gradients.
        """
        if isinstance(self.spec, Scalarizer) and self.spec.CONSTANT:
            self.backward(losses, partition)  # adds to what `.grad` holds
            return
        check_collects(self.spec, self.mode)
        values = global_values(losses)
        before = put_away(partition, self._jacobians)
        self._fill(0, losses, list(partition.shared.values()), list(self._pending | values))
        for parameter in (p for name in values for p in partition.per_task.get(name, {}).values()):
            if (fresh := parameter.grad) is not None:
                held = self._held.get(parameter)
                self._held[parameter], parameter.grad = fresh if held is None else held + fresh, None
        self._pending = _added(self._pending, values)
        put_back(before)

    def discard(self) -> None:
        """See ``Balancer.discard``."""
        self._pending, self._held = {}, {}

    def backward(
        self,
        losses: Mapping[str, Tensor],
        partition: Partition,
        frontier: Sequence[Tensor] = (),
        parts: Sequence[Mapping[str, Tensor]] = (),
    ) -> dict[str, float]:
        """See ``Balancer.backward``.

        Raises:
            ConfigError: a mode that does not fit the model; too few ``parts``.
            NonFiniteLossError: a gradient that is not finite.
        """
        if len(parts) + 1 < self.batches:
            what = f"needs the losses of {self.batches} independent batches"
            hint = "pass those of the others as `parts`"
            raise ConfigError(what, where=f"balancer {self.spec.type!r}", got=len(parts) + 1, hint=hint)
        losses = {name: loss for name, loss in losses.items() if all(name in part for part in parts)}
        values = _added(self._pending, global_values(losses))
        self.memory["step"] = self.memory.get("step", torch.zeros((), dtype=torch.int64)) + 1
        self.stats, self.gram = {}, None
        before = put_away(partition, self._jacobians)
        for parameter, gradient in self._held.items():
            parameter.grad = gradient
        self._held = {}
        shared = list(partition.shared.values())
        owned = [list(partition.per_task.get(name, {}).values()) for name in values]
        step = _Step(losses, shared, owned, self._problem(values), frontier, parts)
        w = self._weights(step)
        self._pending = {}
        put_back(before)
        return dict(zip(values, map(float, w), strict=True))

    def _weights(self, step: _Step) -> Array:
        """Write ``.grad`` in the way that the method and its mode ask for."""
        problem, kept = step.problem, self.memory.get("kept")
        if kept is not None and kept[problem.rows].isnan().any():
            kept = None  # a task that never was there when weights were found
        if isinstance(self.spec, Scalarizer):
            w = self._settle(problem)
            cheap.weighted([*step.losses.values()], step.owned, w, w)
        elif not step.shared or (len(self.tasks) == 1 and not self._pending):
            w = np.ones(len(problem))
            cheap.weighted([*step.losses.values()], step.owned, w, w)
        elif self.mode == "stale" and kept is not None and (problem.step - 1) % self.number:
            w = kept.numpy()[problem.rows]
            factors = self.spec.head_factors(problem, self._state()) * (w if self.scale_heads else 1.0)
            exact = self._exactly(step, problem.step)
            cheap.weighted([*step.losses.values()], step.owned, w, factors)
            self._audit(exact, w, self._state())
        elif self.mode in ("exact", "stale"):
            w = self._exact(step)
            if self.mode == "stale":
                self._keep(problem.rows, w)
        else:
            w = self._cheap(step)
        return w

    def _keep(self, rows: Array, w: Array) -> None:
        """Weights for the next steps; tasks whose gradients were not finite have none."""
        kept = self.memory.get("kept", torch.full((len(self.tasks),), np.nan, dtype=torch.float64)).clone()
        kept[rows] = torch.as_tensor(np.where(self._finite, w, np.nan))
        self.memory["kept"] = kept

    # --- exact ---------------------------------------------------------------------------------------

    def _fill(
        self, which: int, losses: Mapping[str, Tensor], shared: list[nn.Parameter], names: Sequence[str]
    ) -> Jacobian:
        """One backward pass per task into the rows of a Jacobian, in the order of ``names``."""
        if which < len(self._jacobians) and not self._jacobians[which].fits(shared):
            self._jacobians = []
        if which == len(self._jacobians):
            self._jacobians.append(Jacobian(shared, len(self.tasks)))
        jacobian = self._jacobians[which]
        for number, (name, loss) in enumerate(losses.items(), 1):
            torch.autograd.backward(loss, retain_graph=number < len(losses))
            jacobian.take(names.index(name), add=name in self._pending)
        return jacobian

    def _exact(self, step: _Step) -> Array:
        names, n = [self.tasks[row] for row in step.problem.rows], len(step.problem)
        crossed: Array = np.zeros((0, 0))
        if step.parts:
            kept = [{name: part[name] for name in names} for part in step.parts]
            one, two = (self._fill(k, part, step.shared, names) for k, part in enumerate(kept))
            one.exchange(n)
            two.exchange(n)
            crossed = one.gramian(n, two)
        jacobian = self._fill(0, step.losses, step.shared, names)
        jacobian.exchange(n)
        gram = jacobian.gramian(n)
        finite = self._finite = self._leave_out(step, jacobian, gram, crossed)
        self.gram, self.stats = gram, self.stats | figures(gram, names)
        problem = replace(step.problem, gram=gram, crossed=crossed)
        factors = self.spec.head_factors(problem, self._state())
        if isinstance(self.spec, Rowwise) and finite.any():
            w = self._direct(self.spec, jacobian, problem, finite)
        else:
            w = self._settle(problem)
            jacobian.mix(w)
        jacobian.put()
        cheap.scale(step.owned, factors * (w if self.scale_heads else 1.0) / self.batches)
        return w

    def _direct(self, spec: Rowwise, jacobian: Jacobian, problem: Problem, finite: Any) -> Array:
        if jacobian.sharded:
            what = f"balancer {spec.type!r} looks at whole gradients, which sharded parameters do not have"
            raise ConfigError(what, where="run.parallel", got="fsdp", hint="use run.parallel=replicated")
        w, matrix = np.zeros(len(problem)), jacobian.matrix[: len(problem)]
        matrix = matrix if finite.all() else matrix[torch.as_tensor(finite)]
        w[finite] = spec.direct(matrix, problem.only(finite), self.memory, jacobian.direction)
        return w

    def _leave_out(self, step: _Step, jacobian: Jacobian, gram: Array, crossed: Array) -> Any:
        """Rows that are not finite become zero, if they may; which are finite, ``[n]``.

        Raises:
            NonFiniteLossError: they may not.
        """
        names, squares = [self.tasks[row] for row in step.problem.rows], np.diag(gram)
        squares = squares + 0 * np.diag(crossed) if len(crossed) else squares  # their rows count, too
        finite = np.isfinite(squares)
        bad = np.flatnonzero(~finite)
        if not self.tolerates({f"{name}.gradient": x for name, x in zip(names, squares, strict=True)}):
            raise _not_finite(names[bad[0]])
        if not len(bad):
            return finite
        jacobian.matrix[torch.as_tensor(bad)] = 0.0
        gram[bad], gram[:, bad] = 0.0, 0.0
        for parameter in (p for row in bad for p in step.owned[row]):
            parameter.grad = None
        return finite

    # --- cheap modes -----------------------------------------------------------------------------------

    def _cheap(self, step: _Step) -> Array:
        """Weights from something smaller than the Jacobian, then one weighted backward pass."""
        state, losses = self._state(), list(step.losses.values())
        exact = self._exactly(step, step.problem.step - 1)
        if self.mode == "features":
            gram, parts = cheap.at_features(losses, step.frontier, step.owned)
        else:
            last = self.mode == "last_layer"
            inputs = cheap.last_layer(step.losses, step.shared, self._layers) if last else step.shared
            gram, parts = cheap.of_parameters(losses, inputs, self.number), []
        problem = self._checked(gram, step)
        factors = self.spec.head_factors(problem, state)
        w = self._settle(problem)
        factors = factors * (w if self.scale_heads else 1.0)
        if self.mode == "features":
            cheap.below_features(step.frontier, parts, w)
            cheap.scale(step.owned, factors)
        else:
            cheap.weighted(losses, step.owned, w, factors)
        self.gram, self.stats = problem.gram, self.stats | figures(problem.gram, list(step.losses))
        self._audit(exact, w, state)
        return w

    def _checked(self, gram: Tensor, step: _Step) -> Problem:
        """The problem with a Gramian.

        Raises:
            NonFiniteLossError: a row that is not finite.
        """
        for name, ok in zip(step.losses, torch.isfinite(gram.diagonal()).tolist(), strict=True):
            if not ok:
                raise _not_finite(name)
        return replace(step.problem, gram=np.asarray(gram.cpu().numpy()))

    def _exactly(self, step: _Step, number: int) -> Problem | None:
        """The problem with exact gradients, if this is one of the steps to audit."""
        if not self.audit_every or number % self.audit_every:
            return None
        return self._checked(cheap.of_parameters([*step.losses.values()], step.shared), step)

    def _audit(self, exact: Problem | None, w: Array, state: State) -> None:
        """Cosine between the direction and the one that exact gradients would have given."""
        if exact is not None:
            v, gram = weigh(self.spec, exact, state)[0][exact.rows], exact.gram
            size = np.sqrt(max(float(w @ gram @ w) * float(v @ gram @ v), np.finfo(float).tiny))
            self.stats["agreement"] = float(w @ gram @ v) / size


def _not_finite(task: str) -> NonFiniteLossError:
    return NonFiniteLossError(f"the gradient of task {task!r} is not finite", where="balancer")


def _added(some: Mapping[str, float], more: Mapping[str, float]) -> dict[str, float]:
    return {name: some.get(name, 0.0) + more.get(name, 0.0) for name in {**some, **more}}
