"""Aggregators of the optional package torchjd as a balancer."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from polytask.balancers.base import Balancer
from polytask.balancers.solvers import Array
from polytask.balancers.weighting import Problem, Rowwise
from polytask.config import register
from polytask.errors import ConfigError, MissingDependencyError, did_you_mean
from polytask.tasks.base import TaskSet


@register("balancer")
class TorchJD(Rowwise):
    """Any aggregator of torchjd on this engine's Jacobian.

    Directions are as torchjd makes them, some those of a mean and some those of a sum. What an aggregator
    remembers is not kept in checkpoints.
    """

    type: Literal["torchjd"] = "torchjd"
    aggregator: str = Field(description="name of a class of torchjd.aggregation, such as UPGrad")
    settings: dict[str, Any] = Field(default_factory=dict, description="its arguments; lists become tensors")
    reduction: Literal["native"] = "native"

    _aggregator: Any = PrivateAttr(default=None)

    def build(self, tasks: TaskSet) -> Balancer:
        """Raises ConfigError without torchjd, for an unknown aggregator or settings it does not take."""
        where = "balancer.aggregator"
        try:
            from torchjd import aggregation
        except ImportError:
            hint = "pip install polytask[torchjd]"
            raise MissingDependencyError("torchjd is not installed", where=where, hint=hint) from None
        known = [
            n for n in dir(aggregation) if n[0].isupper() and not n.endswith(("Weighting", "Aggregator"))
        ]
        if self.aggregator not in known:
            hint = did_you_mean(self.aggregator, known)
            raise ConfigError(f"torchjd has no aggregator {self.aggregator!r}", where=where, hint=hint)
        try:
            settings = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in self.settings.items()}
            self._aggregator = getattr(aggregation, self.aggregator)(**settings)
        except (TypeError, ValueError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{self.aggregator} refuses these settings ({reason})", where=where) from None
        return super().build(tasks)

    def direct(
        self,
        matrix: Tensor,
        problem: Problem,
        memory: dict[str, Tensor],  # noqa: ARG002
        out: Tensor,
    ) -> Array:
        """Weights are those that come nearest to the direction; a single gradient is left as it is.

        Raises:
            ConfigError: the aggregator refuses these gradients.
        """
        if len(problem) == 1:
            out.copy_(matrix[0])
            return np.ones(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(problem.seed)  # the same on all processes
            try:
                out.copy_(self._aggregator(matrix))
            except (ValueError, RuntimeError) as error:  # LinAlgError is one, too
                what = f"{self.aggregator} of torchjd refuses these gradients ({str(error).splitlines()[0]})"
                got = f"those of {len(problem)} tasks"
                raise ConfigError(what, where="balancer.aggregator", got=got) from None
        products = (matrix @ out).double().cpu().numpy()
        return np.asarray(np.linalg.lstsq(problem.gram, products, rcond=1e-9)[0])
