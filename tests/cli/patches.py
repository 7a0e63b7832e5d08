"""Changes to the library inside a process of ``tests.cli.forks``, so that rare things happen."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from polytask.data.base import Samples
from polytask.types import Sample


def _change_samples(change: Callable[[Sample, int], None]) -> None:
    original = Samples.__getitem__

    def changed(self: Samples, key: Any) -> Sample:
        sample = original(self, key)
        if self.train:
            change(sample, int(sample["id"]))
        return sample

    Samples.__getitem__ = changed  # type: ignore[method-assign]


def sparse_labels() -> None:
    """Two of three samples have no classes, every other one no depth, and only one in eight a scene."""

    def change(sample: Sample, number: int) -> None:
        if number % 3:
            sample["semseg"] = torch.full_like(sample["semseg"], 255)
        if number % 2:
            sample["depth"] = torch.zeros_like(sample["depth"])
        if number % 8:
            sample["scene"] = torch.full_like(sample["scene"], -1)

    _change_samples(change)


def no_labels() -> None:
    """Nothing has a label."""

    def change(sample: Sample, _: int) -> None:
        sample["semseg"] = torch.full_like(sample["semseg"], 255)
        sample["depth"] = torch.zeros_like(sample["depth"])
        sample["scene"] = torch.full_like(sample["scene"], -1)

    _change_samples(change)


def bad_depth() -> None:
    """One sample's depth is infinite."""

    def change(sample: Sample, number: int) -> None:
        if number == 11:
            sample["depth"] = torch.full_like(sample["depth"], float("inf"))

    _change_samples(change)


def bad_image() -> None:
    """One sample's image is not a number."""

    def change(sample: Sample, number: int) -> None:
        if number == 11:
            sample["image"] = torch.full_like(sample["image"], float("nan"))

    _change_samples(change)


def note_exchanges() -> None:
    """Append the number of values of every float exchange to a file."""
    original = dist.all_reduce

    def noted(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        if tensor.is_floating_point():
            with (Path(os.environ["EXCHANGES"])).open("a") as file:
                file.write(f"{tensor.numel()}\n")
        return original(tensor, *arguments, **options)

    dist.all_reduce = noted


def note_order() -> None:
    """Append the ids of every batch a process trains on to a file."""
    from polytask.engine import phase

    original = phase.train_step

    def noted(model: Any, batch: Sample, *arguments: Any) -> Any:
        name = f"{os.environ['ORDER']}.{os.environ.get('RANK', '0')}"
        with Path(name).open("a") as file:
            file.write(" ".join(batch["id"]) + "\n")
        return original(model, batch, *arguments)

    phase.train_step = noted


def stop_after_five() -> None:
    """The sixth step never happens."""
    from polytask.engine import phase

    original, calls = phase.train_step, 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            os._exit(77)
        return original(*arguments, **options)

    phase.train_step = counted


def resharded() -> None:
    """After an evaluation, no block may hold whole parameters."""
    from torch.distributed.tensor import DTensor

    from polytask.engine import trainer

    original = trainer.evaluate

    def checked(model: Any, *arguments: Any, **options: Any) -> Any:
        scores = original(model, *arguments, **options)
        for name, _, _ in model.backbone.blocks():
            block = model.backbone.net.get_submodule(name)
            assert all(isinstance(p, DTensor) for p in block.parameters()), name
        return scores

    trainer.evaluate = checked
