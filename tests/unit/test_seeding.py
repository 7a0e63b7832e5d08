"""Randomness as a function of a position."""

from __future__ import annotations

import random

import numpy as np
import torch

from polytask.seeding import derive, seed_all


def test_positions_have_seeds_of_their_own() -> None:
    seeds = {derive(seed, step, rank) for seed in range(4) for step in range(50) for rank in range(2)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive(1, 2) == derive(1, 2) != derive(2, 1)
    assert derive(2**40, 0) >= 0


def draws() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()


def test_all_generators_repeat() -> None:
    seed_all(3, 4)
    first = draws()
    seed_all(3, 5)
    second = draws()
    seed_all(3, 4)
    assert draws() == first
    assert not set(first) & set(second)
