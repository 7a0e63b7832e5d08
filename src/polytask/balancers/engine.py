"""Gradients per task at the floor of their cost: T backward passes, one flat Jacobian, ``.grad`` as views.

Losses stay separate scalars, so each head is passed backward once. Several processes: losses are shares of the
global losses, so the rows of the Jacobian (or, cheaper, Gramians of features and sketches) are summed over
processes, all solve the same problem, and each keeps its part of the direction for the trainer's one
exchange.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from polytask.balancers.base import Balancer
from polytask.balancers.solvers import Array
from polytask.balancers.weighting import Problem, Rowwise, Verdict, Weighting, weigh
from polytask.errors import ConfigError, NonFiniteLossError, PolytaskWarning
from polytask.parallel import total, world
from polytask.seeding import derive
from polytask.types import Partition

_DOUBLE = 1 << 22
"""Largest Jacobian, in numbers, whose Gramian is summed in float64."""


class Jacobian:
    """Task gradients as rows of one matrix ``[T, P]``: parameters that all processes hold first, then shards.

    Args:
        parameters: the shared parameters, of one device.
        rows: T.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], rows: int) -> None:
        self.parameters = sorted(parameters, key=lambda p: isinstance(p, DTensor))  # stable
        local = [p.to_local() if isinstance(p, DTensor) else p for p in self.parameters]
        self.sizes, self.shapes = [p.numel() for p in local], [p.shape for p in local]
        self.whole = sum(
            n for n, p in zip(self.sizes, self.parameters, strict=True) if not isinstance(p, DTensor)
        )
        self.matrix = torch.zeros(rows, sum(self.sizes), device=local[0].device)
        self.direction = torch.zeros(sum(self.sizes), device=local[0].device)
        self._views = [self._split(row) for row in self.matrix]

    def fits(self, parameters: Sequence[nn.Parameter], rows: int) -> bool:
        """Whether it can be used again for these."""
        return rows == len(self.matrix) and {*map(id, parameters)} == {*map(id, self.parameters)}

    def _split(self, flat: Tensor) -> list[Tensor]:
        return [v.view(s) for v, s in zip(flat.split(self.sizes), self.shapes, strict=True)]

    def fill(self, row: int, *, add: bool = False) -> None:
        """Move the parameters' ``.grad`` into a row."""
        pairs = [
            (view, p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad)
            for view, p in zip(self._views[row], self.parameters, strict=True)
            if p.grad is not None
        ]
        if not add:
            self.matrix[row].zero_() if len(pairs) < len(self.parameters) else None
        if pairs:
            views, gradients = [v for v, _ in pairs], [g for _, g in pairs]
            (torch._foreach_add_ if add else torch._foreach_copy_)(views, gradients)  # type: ignore[operator]
        for parameter in self.parameters:
            parameter.grad = None

    def exchange(self) -> None:
        """Sum the rows of what all processes hold; shards have been summed by the backward pass."""
        if world() > 1 and self.whole:
            self.matrix[:, : self.whole] = total(self.matrix[:, : self.whole].contiguous())

    def gramian(self, other: Jacobian | None = None) -> Array:
        """``J Jᵀ``, float64 on the CPU."""
        right = self.matrix if other is None else other.matrix
        gram = _product(self.matrix[:, : self.whole], right[:, : self.whole])
        if self.whole < self.matrix.shape[1]:
            gram = gram + total(_product(self.matrix[:, self.whole :], right[:, self.whole :]))
        return np.asarray(gram.cpu().numpy(), dtype=float)

    def mix(self, weights: Array) -> None:
        """``direction`` becomes ``Jᵀ w``."""
        w = torch.as_tensor(weights, dtype=self.matrix.dtype, device=self.matrix.device)
        torch.matmul(w, self.matrix, out=self.direction)

    def put(self) -> None:
        """``.grad`` of the parameters becomes this process's part of ``direction``."""
        self.direction[: self.whole] /= world()
        for parameter, view in zip(self.parameters, self._split(self.direction), strict=True):
            gradient = view.to(parameter.dtype)
            if isinstance(parameter, DTensor):
                gradient = DTensor.from_local(
                    gradient, parameter.device_mesh, parameter.placements, shape=parameter.shape,
                    stride=parameter.stride(),
                )  # fmt: skip
            parameter.grad = gradient


def _product(left: Tensor, right: Tensor) -> Tensor:
    if left.numel() <= _DOUBLE:
        left, right = left.double(), right.double()
    return (left @ right.T).double()


class GradientBalancer(Balancer):
    """Any ``Weighting`` on a model's parameters (or, through ``step``, on any network's).

    Args:
        spec: the method and its mode.
        tasks: all tasks, in the order of the method's memory.
    """

    def __init__(self, spec: Weighting, tasks: Sequence[str]) -> None:
        super().__init__()
        self.spec, self.tasks, self.steps = spec, tuple(tasks), 0
        self.mode, _, number = spec.mode.partition(":")
        self.number = int(number or 0)
        if spec.NEEDS == "last_layer" and self.mode == "exact":
            self.mode = "last_layer"
        if self.mode in ("features", "last_layer") and spec.ANGLES:
            warnings.warn(
                f"balancer {spec.type!r} goes by angles between gradients, which mode {self.mode!r} does not "
                "preserve; use exact, stale:K or sketch:R, or set audit to measure it",
                PolytaskWarning, stacklevel=3,
            )  # fmt: skip
        self._jacobian: Jacobian | None = None

    def epoch_end(self) -> None:
        """Tell the method."""
        state = {name: value.numpy() for name, value in self.memory.items()}
        self.spec.epoch_end(state)
        self.memory = {name: torch.as_tensor(value) for name, value in state.items()}

    def after_step(self, losses: Mapping[str, Tensor]) -> None:
        """Tell the method the losses after the update."""
        rows = np.array([self.tasks.index(name) for name in losses])
        values = total(torch.stack([loss.detach().double() for loss in losses.values()])).cpu().numpy()
        state = {name: value.numpy() for name, value in self.memory.items()}
        self.spec.look_back(Problem(values, np.zeros((0, 0)), rows, len(self.tasks)), state)
        self.memory = {name: torch.as_tensor(value) for name, value in state.items()}

    # --- the step ----------------------------------------------------------------------------------

    def backward(
        self, losses: Mapping[str, Tensor], partition: Partition, frontier: Sequence[Tensor] = ()
    ) -> dict[str, float]:
        """See ``Balancer.backward``.

        Raises:
            ConfigError: mode ``features`` for a model without tensors that all tasks share.
            NonFiniteLossError: a gradient that is not finite.
        """
        shared = list(partition.shared.values())
        names, rows = list(losses), np.array([self.tasks.index(name) for name in losses])
        values = total(torch.stack([loss.detach().double() for loss in losses.values()])).cpu().numpy()
        before = [(p, p.grad) for _, p in partition.trainable() if p.grad is not None]
        for parameter, _ in before:
            parameter.grad = None
        problem = Problem(values, np.zeros((0, 0)), rows, len(self.tasks), derive(0, self.steps))
        self.stats = {}
        self.steps += 1
        owned = [list(partition.per_task.get(name, {}).values()) for name in names]
        if self.spec.NEEDS == "losses":
            w = self._settle(problem)
            self._weighted(losses, w, owned, scale_heads=True)
        elif not shared or len(names) == 1:
            w = self._settle(problem) if not shared else np.ones(1)
            self._weighted(losses, np.ones(len(names)), owned, scale_heads=True)
        elif self.mode == "stale" and (self.steps - 1) % self.number and "kept" in self.memory:
            w = self.memory["kept"].numpy()[rows]
            self._weighted(losses, w, owned, scale_heads=self.spec.scale_heads)
        elif self.mode in ("exact", "stale"):
            w = self._exact(losses, shared, owned, problem)
        else:
            w = self._cheap(losses, shared, owned, problem, frontier)
        if self.mode == "stale":
            kept = self.memory.get("kept", torch.ones(len(self.tasks), dtype=torch.float64)).clone()
            kept[rows] = torch.as_tensor(w, dtype=torch.float64)
            self.memory["kept"] = kept
        for parameter, gradient in before:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return dict(zip(names, map(float, w), strict=True))

    def _settle(self, problem: Problem) -> Array:
        """Weights of the present tasks; the memory moves on."""
        verdict = weigh(self.spec, problem, {name: value.numpy() for name, value in self.memory.items()})
        self.memory = {name: torch.as_tensor(value) for name, value in verdict.state.items()}
        return np.asarray(verdict.weights[problem.rows])

    def _exact(
        self,
        losses: Mapping[str, Tensor],
        shared: list[nn.Parameter],
        owned: list[list[nn.Parameter]],
        problem: Problem,
    ) -> Array:
        jacobian = self._rows_of(shared, len(losses))
        for row, loss in enumerate(losses.values()):
            torch.autograd.backward(loss, retain_graph=row + 1 < len(losses))
            jacobian.fill(row)
        jacobian.exchange()
        gram = self._checked(jacobian.gramian(), list(losses))
        self._describe(gram, list(losses))
        problem = _with(problem, gram)
        if isinstance(self.spec, Rowwise):
            w = self.spec.direct(jacobian.matrix, problem, self.memory, jacobian.direction)
        else:
            w = self._settle(problem)
            jacobian.mix(w)
        jacobian.put()
        if self.spec.scale_heads:
            _scale(owned, w)
        _scale(owned, self.spec.head_factors(problem))
        return w

    def _rows_of(self, shared: list[nn.Parameter], rows: int) -> Jacobian:
        if self._jacobian is None or not self._jacobian.fits(shared, rows):
            self._jacobian = Jacobian(shared, rows)
        return self._jacobian

    # --- cheap modes -------------------------------------------------------------------------------

    def _cheap(
        self,
        losses: Mapping[str, Tensor],
        shared: list[nn.Parameter],
        owned: list[list[nn.Parameter]],
        problem: Problem,
        frontier: Sequence[Tensor],
    ) -> Array:
        """Weights from something smaller than the Jacobian, then one weighted backward pass."""
        scalars = list(losses.values())
        auditing = bool(self.spec.audit) and (self.steps - 1) % self.spec.audit == 0
        exact = self._audit_rows(scalars, shared) if auditing else None
        if self.mode == "features":
            w = self._features(losses, owned, problem, frontier)
        else:
            inputs = _last_layer(shared) if self.mode == "last_layer" else shared
            gram = total(self._small_gramian(scalars, inputs))
            gram_array = self._checked(gram.cpu().numpy(), list(losses))
            w = self._settle(_with(problem, gram_array))
            self._describe(gram_array, list(losses))
            self._weighted(losses, w, owned, scale_heads=self.spec.scale_heads)
        if exact is not None:
            self._audit(exact, w, problem)
        return w

    def _small_gramian(self, losses: Sequence[Tensor], inputs: list[nn.Parameter]) -> Tensor:
        """Gramian of the last layer's gradients or of sketches, this process's part (float64 ``[T, T]``)."""
        rows = []
        for loss in losses:
            gradients = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
            flat = _flat(gradients, inputs)
            rows.append(self._sketch(flat) if self.mode == "sketch" else flat)
        matrix = total(torch.stack(rows))  # linear in the gradients, so shares may be summed first
        return _product(matrix, matrix) / world()

    def _sketch(self, flat: Tensor) -> Tensor:
        """``R`` sums of gradient entries with random signs; inner products survive up to ``1 / sqrt(R)``."""
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, flat.shape, generator=generator, dtype=torch.int8).to(flat.device)
        signed = flat * (2 * signs - 1)
        padded = torch.nn.functional.pad(signed, (0, -len(flat) % self.number))
        return padded.view(-1, self.number).sum(0)

    def _features(
        self,
        losses: Mapping[str, Tensor],
        owned: list[list[nn.Parameter]],
        problem: Problem,
        frontier: Sequence[Tensor],
    ) -> Array:
        """Compare gradients where shared computation ends, batch kept; then one backward pass of the trunk."""
        ends = [z for z in frontier if z.requires_grad]
        if not ends:
            raise ConfigError(
                "mode 'features' needs tensors that all tasks share and that depend on trainable parameters",
                where="balancer.mode", hint="use exact, stale:K or sketch:R",
            )  # fmt: skip
        rows, parts = [], []
        for loss, heads in zip(losses.values(), owned, strict=True):
            found = torch.autograd.grad(loss, [*ends, *heads], retain_graph=True, allow_unused=True)
            parts.append([torch.zeros_like(z) if g is None else g for g, z in zip(found, ends, strict=False)])
            rows.append(torch.cat([g.reshape(-1) for g in parts[-1]]))
            for parameter, gradient in zip(heads, found[len(ends) :], strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        matrix = torch.stack(rows)
        gram = self._checked(total(_product(matrix, matrix)).cpu().numpy(), list(losses))
        w = self._settle(_with(problem, gram))
        self._describe(gram, list(losses))
        mixed = [
            sum((float(x) * part[k] for x, part in zip(w, parts, strict=True)), torch.zeros_like(z))
            for k, z in enumerate(ends)
        ]
        torch.autograd.backward(ends, mixed)
        if self.spec.scale_heads:
            _scale(owned, w)
        return w

    def _weighted(
        self,
        losses: Mapping[str, Tensor],
        w: Array,
        owned: list[list[nn.Parameter]],
        *,
        scale_heads: bool,
    ) -> None:
        """One backward pass of the weighted sum; heads get their own unweighted gradient unless ``scale_heads``."""
        scalars = list(losses.values())
        idle = [i for i, x in enumerate(w) if x == 0 and owned[i] and not scale_heads]
        held: dict[int, Sequence[Tensor | None]] = {
            i: torch.autograd.grad(scalars[i], owned[i], retain_graph=True, allow_unused=True) for i in idle
        }
        torch.autograd.backward(
            torch.stack([float(x) * loss for x, loss in zip(w, scalars, strict=True)]).sum()
        )
        if not scale_heads:
            _scale(owned, np.array([1 / x if x else 0.0 for x in w]))
        for i, gradients in held.items():
            for parameter, gradient in zip(owned[i], gradients, strict=True):
                parameter.grad = gradient

    # --- figures -----------------------------------------------------------------------------------

    def _checked(self, gram: Array, names: list[str]) -> Array:
        wrong = [name for name, square in zip(names, np.diag(gram), strict=True) if not np.isfinite(square)]
        if wrong:
            raise NonFiniteLossError(f"the gradient of task {wrong[0]!r} is not finite", where="balancer")
        return gram

    def _describe(self, gram: Array, names: list[str]) -> None:
        """Cosines, conflicts and norms of the step, for the log."""
        norms = np.sqrt(np.diag(gram))
        cosines = gram / np.maximum(np.outer(norms, norms), np.finfo(float).tiny)
        pairs = [(i, j) for i in range(len(names)) for j in range(i)]
        self.stats = {f"cos/{names[j]}~{names[i]}": float(cosines[i, j]) for i, j in pairs}
        self.stats |= {
            "conflict": float(np.mean([cosines[pair] < 0 for pair in pairs])),
            "norm_ratio": float(norms.max() / max(norms.min(), np.finfo(float).tiny)),
        }

    def _audit_rows(self, losses: Sequence[Tensor], shared: list[nn.Parameter]) -> Tensor:
        gradients = [torch.autograd.grad(x, shared, retain_graph=True, allow_unused=True) for x in losses]
        return total(torch.stack([_flat(g, shared) for g in gradients]))

    def _audit(self, rows: Tensor, w: Array, problem: Problem) -> None:
        gram = _product(rows, rows).cpu().numpy()
        memory = {name: value.numpy() for name, value in self.memory.items()}
        exact: Verdict = weigh(self.spec, _with(problem, gram), memory)
        v = exact.weights[problem.rows]
        size = np.sqrt(max(float(w @ gram @ w) * float(v @ gram @ v), np.finfo(float).tiny))
        self.stats["agreement"] = float(w @ gram @ v) / size


def _with(problem: Problem, gram: Array) -> Problem:
    return Problem(problem.losses, gram, problem.rows, problem.total, problem.seed)


def _flat(gradients: Iterable[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(gradients, like, strict=True)]
    )


def _scale(owned: Iterable[Sequence[nn.Parameter]], factors: Array) -> None:
    for parameters, factor in zip(owned, factors, strict=True):
        gradients: list[Any] = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, float(factor))


def _last_layer(shared: list[nn.Parameter]) -> list[nn.Parameter]:
    """The last matrix among the shared parameters, as they are registered."""
    return [next((p for p in reversed(shared) if p.ndim > 1), shared[-1])]
