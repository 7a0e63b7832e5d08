"""One training step, whole."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from polytask.balancers.base import Balancer
from polytask.errors import ConfigError, NonFiniteLossError
from polytask.meta import Learner
from polytask.model import MultiTaskModel
from polytask.parallel import (
    finite,
    gradient_norm,
    scale_gradients,
    statistics_kept,
    sum_gradients,
    total,
    world,
)
from polytask.phases import Objective
from polytask.seeding import generator_states, replayed
from polytask.tasks.base import TaskSet
from polytask.types import Output, Partition, Sample


@dataclass(frozen=True)
class StepLog:
    """Figures of one step; losses are global, the gradient norm is the one before clipping."""

    losses: dict[str, float]
    weights: dict[str, float] = field(default_factory=dict)
    penalties: dict[str, float] = field(default_factory=dict)
    stats: dict[str, float] = field(default_factory=dict)
    gradient_norm: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StepSetup:
    """What all steps of a phase have in common.

    Attributes:
        tasks: tasks of the phase.
        balancer: writes ``.grad``.
        optimizer: over the trainable parameters.
        objective: factors of losses and penalties.
        partition: shared, per-task and frozen parameters of the model.
        clip_norm: largest global gradient norm, None for no limit.
        bf16: run the forward pass under bfloat16 autocast.
        learner: makes the losses instead of a plain forward pass.
    """

    tasks: TaskSet
    balancer: Balancer
    optimizer: torch.optim.Optimizer
    objective: Objective
    partition: Partition
    clip_norm: float | None = None
    bf16: bool = False
    learner: Learner | None = None


def train_step(
    model: MultiTaskModel, batch: Sample, setup: StepSetup, where: str = "training step"
) -> StepLog:
    """Forward, losses, penalties, balanced backward, exchange, clip, update.

    Args:
        model: predicts logits; in training mode.
        batch: this process's part of the global batch, on the model's device.
        setup: what the steps of the phase have in common.
        where: names the position in messages.

    Raises:
        NonFiniteLossError: a loss or the gradient is not finite, and the balancer does not leave that task
            out; parameters are untouched.
        ConfigError: a batch too small for a balancer that needs several.
    """
    setup.optimizer.zero_grad(set_to_none=True)
    generators = generator_states()
    learner = setup.learner
    if learner is None:
        passes = [_forward(model, part, setup) for part in _divide(batch, setup.balancer.batches)]
    else:
        passes = [(_meta_losses(model, batch, setup, learner, where), Output({}))]
    values = _global_values([losses for losses, _ in passes])
    if not setup.balancer.tolerates(values):
        raise _non_finite_loss(values, batch["id"], where)
    chosen = [setup.objective.select(_finite(losses, values), output.penalties) for losses, output in passes]
    losses, penalties, output = chosen[0][0], _means([p for _, p in chosen]), passes[0][1]
    if not losses and not penalties:  # no valid label in the global batch
        return StepLog(values, stats=_floats(output.stats))
    if penalties:
        torch.autograd.backward(
            torch.stack(list(penalties.values())).sum() / world(), retain_graph=bool(losses)
        )
    others = [more for more, _ in chosen[1:]]
    try:
        weights = setup.balancer.backward(losses, setup.partition, output.frontier, others) if losses else {}
    except NonFiniteLossError as error:
        raise NonFiniteLossError(error.what, where=where, got=_ids(batch["id"]), hint=_HINT) from None
    trainable = itertools.chain(model.parameters(), [] if learner is None else learner.parameters())
    parameters = [p for p in trainable if p.requires_grad]
    sum_gradients(parameters)
    norm = gradient_norm(parameters)
    if not torch.isfinite(norm):
        raise _non_finite_gradient(model, batch["id"], where)
    if setup.clip_norm is not None:
        scale_gradients(parameters, setup.clip_norm / (norm + 1e-6))
    setup.optimizer.step()
    if learner is not None:
        learner.move()
    if setup.balancer.looks_back and losses:
        with torch.no_grad(), replayed(generators), statistics_kept(model):
            again, after = _forward(model, batch, setup)
        setup.balancer.after_step(setup.objective.select(_finite(again, values), after.penalties)[0])
    stats = {**_floats(output.stats), **setup.balancer.stats, **({} if learner is None else learner.stats())}
    return StepLog(values, weights, _floats(penalties), stats, float(norm))


def _forward(
    model: MultiTaskModel, batch: Sample, setup: StepSetup, changed: Mapping[str, Tensor] | None = None,
    only: Sequence[str] = (),
) -> tuple[dict[str, Tensor], Output]:  # fmt: skip
    """Losses and output for all tasks, or some, with the model's parameters, or some changed."""
    inputs = (batch["image"], tuple(only or setup.tasks))
    with torch.autocast(batch["image"].device.type, torch.bfloat16, enabled=setup.bf16):
        output: Output = model(*inputs) if changed is None else functional_call(model, dict(changed), inputs)
    logits = {task: x.float() for task, x in output.logits.items()}
    return setup.tasks.losses(logits, batch, total), output


def _meta_losses(
    model: MultiTaskModel, batch: Sample, setup: StepSetup, learner: Learner, where: str
) -> dict[str, Tensor]:
    """One pass per task and inner step.

    Raises:
        NonFiniteLossError: see ``Learner.losses``.
    """
    parts = _divide(batch, learner.parts, alternating=True)
    factors = setup.objective.losses or {}
    weights = {name: task.weight * factors.get(name, 1.0) for name, task in setup.tasks.items()}

    def loss_of(task: str, part: int, parameters: Mapping[str, Tensor], *, last: bool) -> Tensor | None:
        with nullcontext() if last else statistics_kept(model):
            return _forward(model, parts[part], setup, parameters, (task,))[0].get(task)

    try:
        with _twice_differentiable(model) if learner.second_order else nullcontext():
            return learner.losses(loss_of, weights)
    except NonFiniteLossError as error:
        raise NonFiniteLossError(error.what, where=where, got=_ids(batch["id"]), hint=error.hint) from None


@contextmanager
def _twice_differentiable(model: MultiTaskModel) -> Iterator[None]:
    """Without the fused operations, which have one derivative."""
    streams = model.backbone.streams
    streams.plain = True
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        streams.plain = False


def _divide(batch: Sample, count: int, *, alternating: bool = False) -> list[Sample]:
    """So many independent batches; alternating ones are the same for any number of processes."""
    size = len(batch["id"])
    if size < count:
        what = f"a step needs {count} independent batches, which the batch is divided into"
        raise ConfigError(what, where="data.batch_size", got=f"{size} samples in a process")
    edges = itertools.pairwise(size * k // count for k in range(count + 1))
    alternate = [slice(k, None, count) for k in range(count)]
    pieces = alternate if alternating else [slice(*pair) for pair in edges]
    return [{k: v[piece] for k, v in batch.items()} for piece in pieces]


_HINT = (
    "look at these samples; lower optim.lr or set optim.clip_norm and train into another folder, from the "
    "start or from this run's last checkpoint (action `load`), which is intact if one was written"
)


def _global_values(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Values over all processes, means where there are several parts."""
    means = _means(parts)
    if not means:
        return {}
    summed = total(torch.stack([loss.detach() for loss in means.values()]))
    return dict(zip(means, summed.tolist(), strict=True))


def _means(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    if len(parts) == 1:
        return dict(parts[0])
    names = dict.fromkeys(itertools.chain.from_iterable(parts))
    return {name: torch.stack([part[name] for part in parts if name in part]).mean() for name in names}


def _finite(losses: Mapping[str, Tensor], values: Mapping[str, float]) -> dict[str, Tensor]:
    return {task: loss for task, loss in losses.items() if math.isfinite(values[task])}


def _non_finite_loss(values: Mapping[str, float], ids: Sequence[str], where: str) -> NonFiniteLossError:
    task, value = next((task, value) for task, value in values.items() if not math.isfinite(value))
    what = f"the loss of task {task!r} is {value}"
    return NonFiniteLossError(what, where=where, got=_ids(ids), expected="a finite loss", hint=_HINT)


def _non_finite_gradient(model: MultiTaskModel, ids: Sequence[str], where: str) -> NonFiniteLossError:
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not finite(p.grad)]
    names = f"{', '.join(bad[:3])}{' …' if len(bad) > 3 else ''}"
    elsewhere = "another process's share" if world() > 1 else "all parameters together (its norm overflows)"
    what = f"the gradient of {names or elsewhere} is not finite"
    return NonFiniteLossError(what, where=where, got=_ids(ids), expected="finite gradients", hint=_HINT)


def _ids(ids: Sequence[str]) -> str:
    return f"samples {', '.join(ids[:8])}{' …' if len(ids) > 8 else ''}"


def _floats(values: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in values.items()}
