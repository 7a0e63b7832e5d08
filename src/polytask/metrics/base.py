"""What every metric shares: a state of tensors that simply add up over batches and processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]
"""Sum of a tensor over all processes; the identity when there is one."""

IGNORE = 255
"""The id of unlabeled pixels in label maps, saliency and edge maps."""


class Metric(ABC):
    """Accumulator over a pure function.

    ``state`` maps names to int64 or float64 CPU tensors whose sum over any split of the data is the
    state of the whole, so that batch size, a short last batch and the number of processes change nothing.
    """

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = self.zeros()

    @abstractmethod
    def zeros(self) -> dict[str, Tensor]:
        """The state before any data."""

    @abstractmethod
    def counts(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """State of one batch; prediction as ``Task.predict`` returns it, target as in the batch."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Scores of everything seen so far; NaN where nothing valid was seen."""

    @final
    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add one batch."""
        for name, value in self.counts(prediction, target).items():
            self.state[name] += value.to("cpu", self.state[name].dtype)

    @final
    def reduce(self, total: Total) -> None:
        """Sum the state over all processes, in one exchange per dtype."""
        for dtype in dict.fromkeys(value.dtype for value in self.state.values()):  # same order everywhere
            names = [n for n, v in self.state.items() if v.dtype == dtype]
            flat = total(torch.cat([self.state[n].reshape(-1) for n in names]))
            pieces = torch.split(flat, [self.state[n].numel() for n in names])
            self.state.update({n: p.reshape(self.state[n].shape) for n, p in zip(names, pieces, strict=True)})
