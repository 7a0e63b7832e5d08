"""Balancers that weight the losses and run one backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from polytask.balancers.base import Balancer, BalancerSpec
from polytask.config import register
from polytask.errors import ConfigError, did_you_mean
from polytask.parallel import total
from polytask.tasks.base import TaskSet
from polytask.types import Partition


class Weighted(Balancer):
    """Backward of the weighted sum, with weights that do not change."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.weights = dict(weights)

    def backward(
        self,
        losses: Mapping[str, Tensor],
        partition: Partition,  # noqa: ARG002
        frontier: Sequence[Tensor] = (),  # noqa: ARG002
    ) -> dict[str, float]:
        """One backward pass of ``sum_t w_t L_t``."""
        torch.autograd.backward(
            torch.stack([self.weights[task] * loss for task, loss in losses.items()]).sum()
        )
        return {task: self.weights[task] for task in losses}


@register("balancer")
class EqualSpec(BalancerSpec):
    """The plain sum of the losses."""

    type: Literal["equal"] = "equal"

    def build(self, tasks: TaskSet) -> Balancer:
        """Weight 1 for every task."""
        return Weighted(dict.fromkeys(tasks, 1.0))


@register("balancer")
class FixedSpec(BalancerSpec):
    """A weighted sum; weights default to each task's own ``weight``."""

    type: Literal["fixed"] = "fixed"
    weights: dict[str, float] = Field(default_factory=dict)

    @field_validator("weights")
    @classmethod
    def _not_negative(cls, value: dict[str, float]) -> dict[str, float]:
        if any(w < 0 for w in value.values()):
            raise ValueError(f"a loss weight is at least 0, got {value}")
        return value

    def build(self, tasks: TaskSet) -> Balancer:
        """Raises ConfigError for a weight of a task that is not there."""
        for name in self.weights:
            if name not in tasks:
                raise ConfigError(
                    f"{name!r} is not a task of this run",
                    where="balancer.weights",
                    hint=did_you_mean(name, tasks),
                )
        return Weighted({name: self.weights.get(name, task.weight) for name, task in tasks.items()})


@register("balancer")
class UncertaintySpec(BalancerSpec):
    """Uncertainty weighting (Kendall, Gal, Cipolla, CVPR 2018): ``1/2 (exp(-s_t) L_t + s_t)``, s learned."""

    type: Literal["uw"] = "uw"

    def build(self, tasks: TaskSet) -> Balancer:
        """All s start at 0."""
        return Uncertainty(tuple(tasks))


class Uncertainty(Balancer):
    """See ``UncertaintySpec``. s trains in the optimizer of the model, from the global losses."""

    def __init__(self, tasks: tuple[str, ...]) -> None:
        super().__init__()
        self.log_variance = nn.ParameterDict({task: nn.Parameter(torch.zeros(())) for task in tasks})

    def backward(
        self,
        losses: Mapping[str, Tensor],
        partition: Partition,  # noqa: ARG002
        frontier: Sequence[Tensor] = (),  # noqa: ARG002
    ) -> dict[str, float]:
        """One backward pass of the weighted sum; s of the tasks present get their gradient."""
        names = list(losses)
        stacked = torch.stack([losses[task] for task in names])
        s = torch.stack([self.log_variance[task].detach() for task in names])
        weights = 0.5 * torch.exp(-s)
        torch.autograd.backward((weights * stacked).sum())
        gradient = 0.5 - weights * total(stacked.detach())
        for task, value in zip(names, gradient, strict=True):
            self.log_variance[task].grad = value.clone()
        return dict(zip(names, weights.tolist(), strict=True))
