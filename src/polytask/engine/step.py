"""One training step, whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polytask.balancers.base import Balancer
from polytask.errors import NonFiniteLossError
from polytask.model import MultiTaskModel
from polytask.parallel import finite, gradient_norm, scale_gradients, sum_gradients, total, world
from polytask.phases import Objective
from polytask.tasks.base import TaskSet
from polytask.types import Partition, Sample


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
    """

    tasks: TaskSet
    balancer: Balancer
    optimizer: torch.optim.Optimizer
    objective: Objective
    partition: Partition
    clip_norm: float | None = None
    bf16: bool = False


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
        NonFiniteLossError: a loss or the gradient is not finite; parameters are untouched.
    """
    setup.optimizer.zero_grad(set_to_none=True)
    with torch.autocast(batch["image"].device.type, torch.bfloat16, enabled=setup.bf16):
        output = model(batch["image"], tuple(setup.tasks))
    logits = {task: x.float() for task, x in output.logits.items()}
    losses = setup.tasks.losses(logits, batch, total)
    values = _global_values(losses)
    _refuse_non_finite(values, batch["id"], where)
    losses, penalties = setup.objective.select(losses, output.penalties)
    if not losses and not penalties:  # no valid label in the global batch
        return StepLog(values, stats=_floats(output.stats))
    if penalties:
        torch.autograd.backward(
            torch.stack(list(penalties.values())).sum() / world(), retain_graph=bool(losses)
        )
    weights = setup.balancer.backward(losses, setup.partition) if losses else {}
    parameters = [p for p in model.parameters() if p.requires_grad]
    sum_gradients(parameters)
    norm = gradient_norm(parameters)
    if not torch.isfinite(norm):
        raise _non_finite_gradient(model, batch["id"], where)
    if setup.clip_norm is not None:
        scale_gradients(parameters, setup.clip_norm / (norm + 1e-6))
    setup.optimizer.step()
    return StepLog(values, weights, _floats(penalties), _floats(output.stats), float(norm))


_HINT = (
    "look at these samples; lower optim.lr or set optim.clip_norm and train into another folder, from the "
    "start or from this run's last checkpoint (action `load`), which is intact if one was written"
)


def _global_values(losses: Mapping[str, Tensor]) -> dict[str, float]:
    if not losses:
        return {}
    summed = total(torch.stack([loss.detach() for loss in losses.values()]))
    return dict(zip(losses, summed.tolist(), strict=True))


def _refuse_non_finite(values: Mapping[str, float], ids: Sequence[str], where: str) -> None:
    bad = {task: value for task, value in values.items() if not abs(value) < float("inf")}
    if bad:
        task, value = next(iter(bad.items()))
        raise NonFiniteLossError(
            f"the loss of task {task!r} is {value}",
            where=where,
            got=_ids(ids),
            expected="a finite loss",
            hint=_HINT,
        )


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
