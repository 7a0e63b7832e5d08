"""Counter-based randomness: every draw is a pure function of the recipe's seed and a position.

A resumed run, another number of workers or of processes therefore sees the same numbers, and no
generator state has to be stored.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(*position: int) -> int:
    """A 63-bit seed out of non-negative integers, e.g. (seed, epoch, index)."""
    digest = hashlib.blake2b(repr(position).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_states() -> list[torch.Tensor]:
    """States of torch's generators: CPU, then each CUDA device."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


@contextmanager
def replayed(states: list[torch.Tensor]) -> Iterator[None]:
    """Draw again what was drawn after ``generator_states`` returned these; later draws do not notice."""
    now = generator_states()
    _set_generators(states)
    try:
        yield
    finally:
        _set_generators(now)


def _set_generators(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])


def seed_all(*position: int) -> None:
    """Seed torch (all devices), NumPy and Python for this position."""
    number = derive(*position)
    torch.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)
