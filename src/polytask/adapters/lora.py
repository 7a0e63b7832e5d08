"""Plain LoRA: a low-rank branch beside each frozen linear layer, one for all tasks or one per task.

Hu et al.: "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022. Scaled, set up and computed as in
the PEFT library, so that branches go back and forth without a difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from polytask.adapters.base import Adapter, Branch, Mergeable
from polytask.backbones.streams import Factors, LinearMap, Private, StreamPlan
from polytask.backbones.timm import Backbone
from polytask.config import register
from polytask.errors import ConfigError
from polytask.types import Site


@register("adapter")
class LoRA(Adapter):
    """A low-rank branch beside each frozen linear layer, for all tasks or per task (Hu et al., ICLR 2022)."""

    type: Literal["lora"] = "lora"
    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=8.0, gt=0, description="branches are multiplied by alpha / rank")
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="on the input of the branches")
    layers: tuple[Literal["qkv", "proj", "fc1", "fc2", "reduction"], ...] = Field(
        default=("qkv", "proj", "fc1", "fc2"), min_length=1
    )
    per_task: bool = Field(
        default=False, description="branches of its own for each task, and a pass of the network for each"
    )
    train: tuple[str, ...] = Field(
        default=(), description="parts of the frozen network that train nevertheless, by parts of their names"
    )

    def plan(self, tasks: Sequence[str]) -> StreamPlan:
        """A pass per task if branches are per task, else no streams."""
        return StreamPlan("passes", tuple(tasks)) if self.per_task else StreamPlan()

    def check(self, sites: Sequence[Site], parameters: Sequence[str]) -> None:
        """Every name in ``layers`` and ``train`` must be there, and no layer in both.

        Raises:
            ConfigError: with the first name that does not fit.
        """
        roles = sorted({site.role for site in sites})
        for role in self.layers if "layers" in self.model_fields_set else ():
            if role not in roles:
                what, has = f"the backbone has no {role!r}", ", ".join(roles)
                raise ConfigError(what, where="model.adapter.layers", expected=has)
        adapted = tuple(f"{site.name}." for site in sites if site.role in self.layers)
        for part in self.train:
            hits = [name for name in parameters if part in name]
            both = [name for name in hits if name.startswith(adapted)]
            if both or not hits:
                what = f"{both[0]}, which has a branch" if both else "no parameter"
                raise ConfigError(f"{part!r} names {what}", where="model.adapter.train")

    def wrap(self, site: Site, layer: nn.Linear, plan: StreamPlan, backbone: Backbone) -> nn.Module | None:
        """The layer with its branch."""
        if site.role not in self.layers:
            return None
        branch: nn.Module = LoRABranch(layer, self.rank, self.alpha / self.rank, self.dropout)
        if self.per_task:
            branch = Private(branch, backbone.streams, plan.tasks)
        return LoRALinear(layer, branch)

    def trains(self, name: str) -> bool:
        """Only what ``train`` names."""
        return any(part in name for part in self.train)


class LoRABranch(Branch):
    """``s B A x`` with A ``[rank, in]`` and B ``[out, rank]``; zero at the start."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.A = nn.Linear(layer.in_features, rank, bias=False)  # Kaiming-uniform with a = sqrt(5)
        self.B = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]``."""
        y: Tensor = self.B(self.A(self.dropout(x)))
        return y * self.scale


class LoRALinear(LinearMap, Mergeable):
    """``W x + s B A x``; the branch is one ``LoRABranch``, or ``Private`` ones of the tasks."""

    def __init__(self, base: nn.Linear, branch: nn.Module) -> None:
        super().__init__()
        self.base, self.branch = base, branch

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]``."""
        y: Tensor = self.base(x)
        return y if self._sits_out() else y + self.branch(x)

    def _sits_out(self) -> bool:
        return self.training and isinstance(self.branch, LoRABranch) and not self.branch.on

    def factors(self, task: str | None = None) -> Factors | None:
        """Those of the branch, or of the task's."""
        branch: nn.Module | None = self.branch
        if isinstance(branch, Private):
            branch = dict(branch.tasks.items()).get(task or "")
        if not isinstance(branch, LoRABranch):
            return None
        return Factors(branch.A.weight, branch.B.weight, branch.scale)

    def linear_weight(self) -> Tensor | None:
        """``W + s B A`` if the layer has no bias, one branch for all tasks and no active dropout."""
        own = self.factors()
        dropping = isinstance(self.branch, LoRABranch) and self.training and self.branch.dropout.p > 0
        return None if own is None or dropping or self.base.bias is not None else self._now(own)

    def _now(self, own: Factors) -> Tensor:
        return self.base.weight if self._sits_out() else self._sum(own)

    def _sum(self, own: Factors) -> Tensor:
        weight: Tensor = self.base.weight + own.scale * (own.B @ own.A)
        return weight

    def merged(self) -> nn.Module:
        """A plain linear layer; with branches per task the layer itself, as each would need its own trunk."""
        own = self.factors()
        if own is None:
            return self
        with torch.no_grad():
            self.base.weight.copy_(self._sum(own))
        return self.base
