"""Counter-based randomness: every draw is a pure function of the recipe's seed and a position.

A resumed run, another number of workers or of processes therefore sees the same numbers, and no
generator state has to be stored.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive(*position: int) -> int:
    """A 63-bit seed out of non-negative integers, e.g. (seed, epoch, index)."""
    digest = hashlib.blake2b(repr(position).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(*position: int) -> None:
    """Seed torch (all devices), NumPy and Python for this position."""
    number = derive(*position)
    torch.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)
