"""The balancer slot: how task losses become gradients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from polytask.config import Spec
from polytask.tasks.base import TaskSet
from polytask.types import Partition


class Balancer(nn.Module):
    """Writes ``.grad`` from task losses; owns whatever state that takes.

    Losses are this process's shares of the global losses: gradients are summed over processes after
    ``backward``, and anything a balancer derives from loss values must use ``polytask.parallel.total``.

    Attributes:
        memory: what the method remembers between steps, tensors by name; part of ``state_dict``.
        stats: figures of the last step, for the log.
    """

    def __init__(self) -> None:
        super().__init__()
        self.memory: dict[str, Tensor] = {}
        self.stats: dict[str, float] = {}

    def backward(
        self, losses: Mapping[str, Tensor], partition: Partition, frontier: Sequence[Tensor] = ()
    ) -> dict[str, float]:
        """Write ``.grad`` of all trainable parameters and return the weight each task got.

        Args:
            losses: one scalar per task that has valid labels in this batch.
            partition: shared, per-task and frozen parameters of the model.
            frontier: the tensors where shared computation ends, empty if there are none.
        """
        raise NotImplementedError

    def epoch_end(self) -> None:
        """Called after each epoch of training."""

    def after_step(self, losses: Mapping[str, Tensor]) -> None:
        """Called after the update with the losses of the same batch, if the spec has ``LOOKS_BACK``."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({f"{prefix}memory.{name}": value for name, value in self.memory.items()})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        start = f"{prefix}memory."
        found = {key[len(start) :]: state_dict[key] for key in list(state_dict) if key.startswith(start)}
        self.memory = {name: torch.as_tensor(value).clone() for name, value in found.items()}
        rest = {key: value for key, value in state_dict.items() if not key.startswith(start)}
        unexpected: list[str] = args[3]
        super()._load_from_state_dict(rest, prefix, *args)
        unexpected[:] = [key for key in unexpected if not key.startswith(start)]


class BalancerSpec(Spec):
    """Settings of a balancer."""

    type: str
    nonfinite: Literal["stop", "skip"] = Field(
        default="stop",
        description="a loss that is NaN or infinite stops training, or its task sits out that step",
    )

    LOOKS_BACK: ClassVar[bool] = False
    """Whether ``after_step`` wants the losses after the update."""
    BATCHES: ClassVar[int] = 1
    """How many independent batches a step needs; the trainer cuts its batch into so many parts."""

    @abstractmethod
    def build(self, tasks: TaskSet) -> Balancer:
        """The balancer for these tasks."""
