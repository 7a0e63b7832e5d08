"""What every metric shares: a state of tensors that simply add up (or line up) over batches and processes."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, final

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]
"""Sum of a tensor over all processes; the identity when there is one."""
Gather = Callable[[Tensor], Tensor]
"""Rows of a tensor from all processes, in the order of the processes; the identity when there is one."""

IGNORE = 255
"""The id of unlabeled pixels in label maps, saliency and edge maps."""


class Metric(ABC):
    """Accumulator over a pure function.

    ``state`` maps names to int64 or float64 CPU tensors whose sum over any split of the data is the
    state of the whole, so that batch size, a short last batch and the number of processes change nothing.
    A score that needs the whole set at once (nearest neighbors) names entries in ``ROWS``: these are not
    added but put below each other, in the order of the split, and may be float32.
    """

    ROWS: ClassVar[frozenset[str]] = frozenset()
    """Entries of the state that hold rows, ``[n, …]`` with n = 0 in ``zeros()``."""
    FINAL: ClassVar[bool] = False
    """Whether it takes too long for evaluations during training, so that only ``polytask eval`` has it."""

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
            before, new = self.state[name], value.to("cpu", self.state[name].dtype)
            self.state[name] = torch.cat((before, new)) if name in self.ROWS else before + new

    @final
    def of(self, prediction: Tensor, target: Tensor) -> dict[str, float]:
        """Scores of one batch alone, as a pure function: what was added before neither counts nor changes."""
        twin = copy.copy(self)
        twin.state = twin.zeros()
        twin.update(prediction, target)
        return twin.compute()

    @final
    def reduce(self, total: Total, gather: Gather) -> None:
        """Unite the states of all processes: sums in one exchange per dtype, then each entry of rows."""
        sums = {name: value for name, value in self.state.items() if name not in self.ROWS}
        for dtype in dict.fromkeys(value.dtype for value in sums.values()):  # same order everywhere
            names = [n for n, v in sums.items() if v.dtype == dtype]
            flat = total(torch.cat([self.state[n].reshape(-1) for n in names]))
            pieces = torch.split(flat, [self.state[n].numel() for n in names])
            self.state.update({n: p.reshape(self.state[n].shape) for n, p in zip(names, pieces, strict=True)})
        self.state.update({name: gather(self.state[name]) for name in sorted(self.ROWS)})


class MeanOfBatches(Metric):
    """Scores of each batch, averaged as if batches were equally long: the habit of the MTAN family.

    A batch without anything valid is left out.
    """

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        super().__init__()

    def zeros(self) -> dict[str, Tensor]:
        sums = torch.zeros(len(self.metric.compute()), dtype=torch.float64)
        return {"sums": sums, "batches": torch.zeros((), dtype=torch.int64)}

    def counts(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        scores = torch.tensor(list(self.metric.of(prediction, target).values()), dtype=torch.float64)
        known = not scores.isnan().all()
        return {"sums": scores if known else torch.zeros_like(scores), "batches": torch.tensor(int(known))}

    def compute(self) -> dict[str, float]:
        means = (self.state["sums"] / self.state["batches"]).tolist()
        return dict(zip(self.metric.compute(), means, strict=True))
