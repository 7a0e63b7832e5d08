"""The balancer slot: how task losses become gradients."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from polytask.config import Spec
from polytask.errors import ConfigError
from polytask.parallel import total
from polytask.tasks.base import TaskSet
from polytask.types import Partition

if TYPE_CHECKING:
    from polytask.balancers.face import Outcome

PATIENCE = 20
"""After so many steps in a row without a finite loss, a task may no longer sit out."""


def global_values(losses: Mapping[str, Tensor]) -> dict[str, float]:
    """Values of losses, summed over processes."""
    if not losses:
        return {}
    values = total(torch.stack([loss.detach().reshape(()) for loss in losses.values()]).double())
    return dict(zip(losses, values.tolist(), strict=True))


class Balancer(nn.Module):
    """Writes ``.grad`` from task losses; owns whatever state that takes.

    Losses are this process's shares of the global losses: gradients are summed over processes after
    ``backward``, and anything a balancer derives from loss values must use ``polytask.parallel.total``.

    Attributes:
        memory: what is remembered between steps, tensors by name; part of ``state_dict``.
        stats: figures of the last step, for the log.
        gram: inner products of the tasks' gradients in the last step, ``[n, n]``, if it compared any.
        tasks: names of all tasks, in the order of what is remembered.
        seed: of all draws, together with the number of the step.
        nonfinite: whether a task may sit out a step in which its loss is not finite.
        batches: how many independent batches a step needs; the trainer divides its batch.
        looks_back: whether ``after_step`` wants the losses after the update.
    """

    def __init__(self, tasks: Iterable[str] = ()) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.memory: dict[str, Tensor] = {}
        self.stats: dict[str, float] = {}
        self.gram: Any = None
        self.partitions: dict[tuple[Any, ...], Partition] = {}
        self.seed, self.batches, self.looks_back = 0, 1, False
        self.nonfinite: Literal["stop", "skip"] = "stop"

    def backward(
        self,
        losses: Mapping[str, Tensor],
        partition: Partition,
        frontier: Sequence[Tensor] = (),
        parts: Sequence[Mapping[str, Tensor]] = (),
    ) -> dict[str, float]:
        """Write ``.grad`` of all trainable parameters and return the weight each task got.

        Args:
            losses: one scalar per task that has valid labels in this batch.
            partition: shared, per-task and frozen parameters of the model.
            frontier: the tensors where shared computation ends, empty if there are none.
            parts: the losses of the other ``batches - 1`` batches.
        """
        raise NotImplementedError

    def collect(self, losses: Mapping[str, Tensor], partition: Partition) -> None:  # noqa: ARG002
        """Add this batch's gradients to those that the next ``backward`` balances.

        Raises:
            ConfigError: a balancer that cannot do that.
        """
        raise ConfigError(f"{type(self).__name__} cannot accumulate gradients over batches")

    def discard(self) -> None:
        """Forget gradients that were collected and not balanced yet."""

    def step(
        self,
        losses: Mapping[str, Tensor],
        shared: nn.Module | Iterable[nn.Parameter] | None = None,
        features: Tensor | Sequence[Tensor] | Mapping[str, Tensor] = (),
        parts: Sequence[Mapping[str, Tensor]] = (),
        accumulate: bool = False,
    ) -> Outcome:
        """Write ``.grad`` of all that the losses depend on, in a training loop of one's own.

        Args:
            losses: one scalar per task that is present, whose graphs have not been used yet.
            shared: a module or parameters; None: what at least two losses depend on. The graph is walked once
                for each set of present tasks, and again when other parameters of ``shared`` train.
            features: the tensors where shared computation ends, for mode ``features``.
            parts: losses of further independent batches, for methods that need them.
            accumulate: only add up gradients; a later call without it balances them. They are not part of
                ``state_dict``, and forgotten if that call raises or has no finite loss.

        Raises:
            ConfigError: losses, parameters and features that do not belong together.
            NonFiniteLossError: a loss that is not finite, unless ``nonfinite`` is ``skip``.
        """
        from polytask.balancers.face import step

        return step(self, losses, shared, features, parts, accumulate)

    def cost(self) -> str:
        """Backward passes and memory of a step, in one line."""
        return "one backward pass"

    def epoch_end(self) -> None:
        """Called after each epoch of training."""

    def after_step(self, losses: Mapping[str, Tensor]) -> None:
        """Called after the update with the losses of the same batch, if ``looks_back``."""

    def tolerates(self, values: Mapping[str, float]) -> bool:
        """Whether a step may go on without the tasks whose losses are not finite; counts them."""
        tolerable = True
        for task, value in values.items():
            before = self.memory.pop(f"idle.{task}", None)
            if not math.isfinite(value):
                idle = torch.ones((), dtype=torch.int64) if before is None else before + 1
                self.memory[f"idle.{task}"] = idle
                tolerable &= self.nonfinite == "skip" and int(idle) < PATIENCE
        return tolerable

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({f"{prefix}memory.{name}": value.clone() for name, value in self.memory.items()})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        start = f"{prefix}memory."
        self.memory = {k.removeprefix(start): v.clone() for k, v in state_dict.items() if k.startswith(start)}
        super()._load_from_state_dict(state_dict, prefix, *args)
        unexpected: list[str] = args[3]
        unexpected[:] = [key for key in unexpected if not key.startswith(start)]


class BalancerSpec(Spec):
    """Settings of a balancer."""

    type: str
    nonfinite: Literal["stop", "skip"] = Field(
        default="stop",
        description="a loss that is NaN or infinite stops training, or its task sits out that step",
    )

    BATCHES: ClassVar[int] = 1
    """How many independent batches a step needs."""

    @abstractmethod
    def build(self, tasks: TaskSet) -> Balancer:
        """The balancer for these tasks."""
