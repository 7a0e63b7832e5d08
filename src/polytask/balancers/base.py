"""The balancer slot: how task losses become gradients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from polytask.config import Spec
from polytask.tasks.base import TaskSet
from polytask.types import Partition


class Balancer(nn.Module):
    """Writes ``.grad`` from task losses; owns whatever state that takes.

    Losses are this process's shares of the global losses: gradients are summed over processes after
    ``backward``, and anything a balancer derives from loss values must use ``polytask.parallel.total``.
    """

    def backward(self, losses: Mapping[str, Tensor], partition: Partition) -> dict[str, float]:
        """Write ``.grad`` of all trainable parameters and return the weight each task got.

        Args:
            losses: one scalar per task that has valid labels in this batch.
            partition: shared, per-task and frozen parameters of the model.
        """
        raise NotImplementedError


class BalancerSpec(Spec):
    """Settings of a balancer."""

    type: str

    @abstractmethod
    def build(self, tasks: TaskSet) -> Balancer:
        """The balancer for these tasks."""
