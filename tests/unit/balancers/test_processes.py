"""Balancers in a loop of one's own on two processes equal one process on the whole batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from polytask.balancers import balancer
from polytask.balancers.weighting import MODES, GradientWeighting, Method
from polytask.config import registered
from polytask.errors import PolytaskWarning
from polytask.parallel import sum_gradients

NAMES = ("a", "b", "c")
X = torch.randn(12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def jobs() -> Iterator[tuple[str, dict[str, str]]]:
    """All methods, in all modes they have."""
    for name, kind in registered("balancer").items():
        if issubclass(kind, GradientWeighting) and kind.model_fields["mode"].annotation is str:
            for mode in MODES.strip("^()$").split("|"):
                yield name, {"mode": mode.replace(r"[1-9]\d*", "3")}
        elif issubclass(kind, Method) and name != "torchjd":
            yield name, {}


def train(name: str, settings: dict[str, str], rank: int, world: int) -> Tensor:
    """Three steps, in one of which a task is missing; the parameters afterwards."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6)).double()
    heads = nn.ModuleDict({task: nn.Linear(6, 1) for task in NAMES}).double()
    parameters = [*trunk.parameters(), *heads.parameters()]

    def losses(x: Tensor, left_out: str = "") -> tuple[Tensor, dict[str, Tensor]]:
        z = trunk(x[rank::world])
        found = {t: (head(z) - k).square().mean() / world for k, (t, head) in enumerate(heads.items())}
        return z, {task: loss for task, loss in found.items() if task != left_out}

    b = balancer(name, NAMES, **settings)
    for step in range(3):
        for parameter in parameters:
            parameter.grad = None
        x, left_out = X * (1 + step), "b" if step == 1 else ""
        z, mine = losses(x, left_out)
        features = [z] if settings.get("mode") == "features" else []
        parts = [losses(x + k, left_out)[1] for k in range(1, b.batches)]
        b.step(mine, features=features, parts=parts)
        sum_gradients(parameters)
        with torch.no_grad():
            for parameter in parameters:
                parameter -= 0.05 * (0 if parameter.grad is None else parameter.grad)
            if b.looks_back:
                b.after_step(losses(x, left_out)[1])
        b.epoch_end()
    return torch.cat([parameter.detach().reshape(-1) for parameter in parameters])


def train_all(rank: int, world: int, folder: Path) -> None:
    warnings.simplefilter("ignore", PolytaskWarning)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    results = {f"{name} {settings}": train(name, settings, rank, world) for name, settings in jobs()}
    torch.save(results, folder / f"{rank}of{world}.pt")
    if world > 1:
        dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        train_all(0, 1, tmp_path)
    mp.start_processes(train_all, (2, tmp_path), nprocs=2, start_method="spawn")
    found: list[dict[str, Any]] = [torch.load(tmp_path / name) for name in ("0of1.pt", "0of2.pt", "1of2.pt")]
    assert len(found[0]) > 70
    for job, whole in found[0].items():
        assert torch.equal(found[1][job], found[2][job]), job
        torch.testing.assert_close(found[1][job], whole, rtol=1e-6, atol=1e-8, msg=job)
