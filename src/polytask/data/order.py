"""The order of samples: a pure function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from polytask.errors import ConfigError
from polytask.seeding import derive


@dataclass(frozen=True, kw_only=True)
class BatchOrder(Sampler[list[tuple[int, int]]]):
    """One epoch's batches for one process, as lists of (epoch, index): stateless, so resumable anywhere.

    The order is a permutation given by (seed, epoch), cut into global batches; of each, this process
    takes its contiguous slice. A short batch at the end is dropped unless it is the only one.

    Attributes:
        length: number of samples.
        batch_size: samples per step over all processes.
        start: global batches of this epoch that have been done already.
        rank: number of this process out of ``world``.
        shuffle: makes the permutation out of a seeded generator; any is equally likely if unset.
    """

    length: int
    batch_size: int
    seed: int
    epoch: int
    start: int = 0
    rank: int = 0
    world: int = 1
    shuffle: Callable[[torch.Generator], list[int]] | None = None

    def __post_init__(self) -> None:
        if self.batch_size % self.world:
            what, expected = "the batch cannot be divided among the processes", f"a multiple of {self.world}"
            raise ConfigError(what, where="data.batch_size", got=self.batch_size, expected=expected)
        if self.length < self.world:
            raise ConfigError("fewer samples than processes", where="data", got=self.length)

    @property
    def steps(self) -> int:
        """Global batches in the whole epoch, whatever ``start`` is."""
        return max(self.length // self.batch_size, 1)

    def __len__(self) -> int:
        return max(self.steps - self.start, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(derive(self.seed, self.epoch))
        every = torch.randperm(self.length, generator=generator).tolist
        order = self.shuffle(generator) if self.shuffle else every()
        size = min(self.batch_size, self.length)
        low, high = (size * rank // self.world for rank in (self.rank, self.rank + 1))
        for step in range(self.start, self.steps):
            yield [(self.epoch, i) for i in order[step * size + low : step * size + high]]
