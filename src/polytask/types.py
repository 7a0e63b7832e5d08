"""The records that travel between the parts: samples, sites, pyramids, outputs, partitions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Sample = dict[str, Any]
"""``{"image": [3, H, W], "<task>": label tensor, "id": str}``; a batch has the same keys, stacked."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One wrappable layer of a backbone, e.g. the ``mlp.fc1`` of block 1 in stage 2.

    Attributes:
        name: dotted module path inside the timm net.
        stage: index of the resolution group, from 0.
        block: index of the block within its stage; -1 for the stage's downsampling layer.
        role: one of ``qkv proj fc1 fc2 reduction``, or ``layer``: any kind (stage and block do not count).
        is_stage_end: whether the block is the last of its stage.
        is_last: whether no later block of the backbone reads the shared stream.
    """

    name: str
    stage: int
    block: int
    role: str
    is_stage_end: bool
    is_last: bool = False


@dataclass(frozen=True)
class Factored:
    """A feature level kept as the input of a bias-free linear map that has not been applied yet.

    A consumer that begins with a linear map of its own composes the two small matrices instead of
    producing the wide intermediate (exact; see ``project``).
    """

    source: Tensor  # [B, H, W, C_in]
    weight: Tensor  # [C, C_in]

    def materialize(self) -> Tensor:
        """The level itself, ``[B, C, H, W]``."""
        return F.linear(self.source, self.weight).permute(0, 3, 1, 2)

    def project(self, weight: Tensor) -> Tensor:
        """``weight @ level`` for a ``[c, C]`` map, as ``[B, c, H, W]``."""
        return F.linear(self.source, weight @ self.weight).permute(0, 3, 1, 2)


Level = Tensor | Factored
"""One resolution of a pyramid: ``[B, C, H, W]``, possibly with its last linear map pending."""


def materialize(level: Level) -> Tensor:
    """The ``[B, C, H, W]`` tensor of a level."""
    return level.materialize() if isinstance(level, Factored) else level


@dataclass
class Pyramids:
    """Feature maps, fine to coarse: one shared list, and one list per task that owns a stream."""

    shared: list[Level]
    per_task: dict[str, list[Level]] = field(default_factory=dict)

    def cut(self) -> tuple[Pyramids, tuple[Tensor, ...]]:
        """The same shared levels through tensors that nothing before them reads, and those tensors."""
        levels = [
            Factored(x.source.view_as(x.source), x.weight.view_as(x.weight))
            if isinstance(x, Factored)
            else x.view_as(x)
            for x in self.shared
        ]
        pairs = [(x.source, x.weight) if isinstance(x, Factored) else (x,) for x in levels]
        return Pyramids(levels), tuple(itertools.chain.from_iterable(pairs))

    def of(self, task: str) -> list[Level]:
        """The pyramid a task reads; tasks without a stream read the shared one."""
        return self.per_task.get(task, self.shared)


@dataclass
class Output:
    """What a multi-task model returns.

    Attributes:
        logits: per task ``[B, C, H, W]`` (dense) or ``[B, C]`` (image level), at image size.
        penalties: named auxiliary losses left by the techniques (scalars).
        stats: named detached figures for the log (scalars).
        frontier: the tensors where shared computation ends; empty where tasks have streams of their own,
            where the neck has shared layers and layers of tasks, or without gradients.
    """

    logits: dict[str, Tensor]
    penalties: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
    frontier: tuple[Tensor, ...] = ()


class PerTask(nn.ModuleDict):
    """One module per task: the only way to own per-task parameters, so that a walk finds them."""


class Drainable(nn.Module):
    """A module inside a backbone that may record penalties and statistics during forward."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded_penalties: dict[str, Tensor] = {}
        self.recorded_stats: dict[str, Tensor] = {}


def drain(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Collect and clear what all drainable modules recorded; equal names are summed."""
    penalties: dict[str, Tensor] = {}
    stats: dict[str, Tensor] = {}
    for module in model.modules():
        if isinstance(module, Drainable):
            _move(module.recorded_penalties, penalties)
            _move(module.recorded_stats, stats)
    return penalties, stats


def _move(recorded: dict[str, Tensor], store: dict[str, Tensor]) -> None:
    for name, value in recorded.items():
        store[name] = store[name] + value if name in store else value
    recorded.clear()


@dataclass(frozen=True)
class Partition:
    """Disjoint and complete division of a model's parameters, by name.

    Attributes:
        shared: trainable parameters that more than one task may reach.
        per_task: trainable parameters owned by one task.
        frozen: parameters that do not train.
    """

    shared: Mapping[str, nn.Parameter]
    per_task: Mapping[str, Mapping[str, nn.Parameter]]
    frozen: Mapping[str, nn.Parameter]

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All trainable parameters with their names, shared ones first."""
        yield from self.shared.items()
        for parameters in self.per_task.values():
            yield from parameters.items()


def partition(model: nn.Module, tasks: Sequence[str]) -> Partition:
    """Walk a model: whatever sits below ``PerTask[t]`` belongs to task ``t``."""
    owners: dict[int, set[str]] = {}
    groups = [module for module in model.modules() if isinstance(module, PerTask)]
    for task, child in itertools.chain.from_iterable(group.items() for group in groups):
        for parameter in child.parameters():
            owners.setdefault(id(parameter), set()).add(task)
    shared: dict[str, nn.Parameter] = {}
    frozen: dict[str, nn.Parameter] = {}
    per_task: dict[str, dict[str, nn.Parameter]] = {task: {} for task in tasks}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            frozen[name] = parameter
        elif len(owner := owners.get(id(parameter), set())) == 1:
            per_task[next(iter(owner))][name] = parameter
        else:
            shared[name] = parameter
    return Partition(shared, per_task, frozen)


def count(parameters: Mapping[str, nn.Parameter]) -> int:
    """Number of scalars."""
    return sum(p.numel() for p in parameters.values())


def to_device(batch: Sample, device: torch.device) -> Sample:
    """A copy of the batch with its tensors on ``device``."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
