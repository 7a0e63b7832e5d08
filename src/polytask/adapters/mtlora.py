"""MTLoRA: task-agnostic and task-specific low-rank branches on a frozen transformer.

Agiza, Neseem, Reda: "MTLoRA: A Low-Rank Adaptation Approach for Efficient Multi-Task Learning", CVPR 2024.
Every linear layer W of every block gets a task-agnostic branch; in the last block of each stage ``proj``,
``fc1`` and ``fc2`` also get one branch per task. W acts on the shared stream only, so the stream of task t
leaves a layer as ``W x_shared + s_t B_t A_t x_t``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.adapters.base import Adapter, Branch, Mergeable
from polytask.adapters.lowrank import Layout, branched_linear, draw_dropped
from polytask.backbones.streams import Factors, LinearMap, StreamPlan, Streams
from polytask.backbones.timm import Backbone, is_narrow
from polytask.config import register
from polytask.errors import ConfigError, did_you_mean
from polytask.types import PerTask, Site

Mode = Literal["matrix", "matrixv2", "addition", "lora_only"]
Role = Literal["qkv", "proj", "fc1", "fc2", "reduction"]
Ranks = int | tuple[int, ...]
Scales = float | tuple[float, ...]


def _words(names: Sequence[str]) -> list[str]:
    """The parts between the dots of names that are no numbers."""
    return sorted({word for name in names for word in name.split(".") if not word.isdigit()})


@register("adapter")
class MTLoRA(Adapter):
    """Task-agnostic and task-specific low-rank branches on a frozen transformer (Agiza et al., CVPR 2024).

    Per-stage values are one number or one per stage. ``scale`` is a plain multiplier of the branch (no
    division by the rank). MTLoRA+ is ``layers: [qkv, proj, fc1, fc2, reduction]``: the patch-merging map
    then gets a branch, and freezes.
    """

    type: Literal["mtlora"] = "mtlora"
    rank: Ranks = Field(default=64, description="rank of the task-agnostic branches; 0 for none")
    task_rank: Ranks | dict[str, Ranks] = Field(default=4, description="rank of the task branches")
    scale: Scales = Field(default=4.0, description="multiplier of the task-agnostic branches")
    task_scale: Scales | dict[str, Scales] | None = Field(default=None, description="default: `scale`")
    train_scale: bool = Field(default=False, description="`scale` is where a trained number per layer starts")
    train_task_scale: bool = Field(default=False, description="likewise `task_scale`, per layer and task")
    dropout: Scales = Field(default=0.05, description="on the input of the branches")
    mode: Mode = Field(default="matrix", description="how a task's stream combines with the shared branch")
    layers: tuple[Role, ...] = ("qkv", "proj", "fc1", "fc2")
    blocks: Literal["all", "last"] = Field(
        default="all", description="task-agnostic branches in all blocks, or in the last of each stage only"
    )
    train: tuple[str, ...] | Literal["all"] = Field(
        default=("patch_embed", "norm", "relative_position_bias_table", "downsample.reduction"),
        description="parts of the frozen network that train nevertheless, matched in parameter names; or all",
    )
    train_biases: bool | Literal["adapted"] = Field(
        default=False, description="all biases of the network train too, or those of the adapted layers"
    )

    @field_validator("rank", "task_rank")
    @classmethod
    def _not_negative(cls, value: Any) -> Any:
        for ranks in value.values() if isinstance(value, dict) else (value,):
            if any(r < 0 for r in ((ranks,) if isinstance(ranks, int) else ranks)):
                raise ValueError(f"a rank is at least 0, got {value}")
        return value

    @field_validator("dropout")
    @classmethod
    def _probabilities(cls, value: Any) -> Any:
        if not all(0 <= p < 1 for p in ((value,) if isinstance(value, float) else value)):
            raise ValueError(f"a probability from 0 to below 1 is needed, got {value}")
        return value

    def plan(self, tasks: Sequence[str]) -> StreamPlan:
        """A stream per task in the last block of each stage; none in ``lora_only``."""
        self._check_names(tasks)
        forks = self.mode != "lora_only" and bool({"proj", "fc1", "fc2"} & set(self.layers))
        learned = {"train_scale": self.rank, "train_task_scale": forks}
        for field, branches in learned.items():
            if getattr(self, field) and not branches:
                raise ConfigError(
                    "there is no branch whose scale could train", where=f"model.adapter.{field}"
                )
        if not forks:
            return StreamPlan()
        return StreamPlan("stage_end", tuple(tasks), all_or_none=self.mode == "addition")

    def _check_names(self, tasks: Sequence[str]) -> None:
        for field, setting in (("task_rank", self.task_rank), ("task_scale", self.task_scale)):
            named = setting if isinstance(setting, dict) else dict.fromkeys(tasks)
            where = f"model.adapter.{field}"
            for task in tasks:
                if task not in named:
                    raise ConfigError(f"no value for task {task!r}", where=where)
            for name in set(named) - set(tasks):
                hint = did_you_mean(name, tasks)
                raise ConfigError(f"{name!r} is not a task of this run", where=where, hint=hint)

    def check(self, sites: Sequence[Site], parameters: Sequence[str]) -> None:
        """What a recipe names itself must be there; of the defaults, a backbone may lack some."""
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        for part in () if self.train in ("all", defaults["train"]) else self.train:
            if not any(part in name for name in parameters):
                what = f"{part!r} is part of no parameter's name"
                raise ConfigError(
                    what, where="model.adapter.train", hint=did_you_mean(part, _words(parameters))
                )
        roles = {site.role for site in sites}
        for role in () if self.layers == defaults["layers"] else self.layers:
            if role not in roles:
                has = ", ".join(sorted(roles))
                raise ConfigError(f"the backbone has no {role!r}", where="model.adapter.layers", expected=has)

    def trains(self, name: str) -> bool:
        """The official rule: named parts of the trunk train, everything else is frozen."""
        if self.train == "all" or (self.train_biases is True and "bias" in name):
            return True
        if self.train_biases and name.endswith(tuple(f".{role}.bias" for role in self.layers)):
            return True
        adapted = "reduction" in self.layers
        return any(part in name for part in self.train if not (adapted and part == "downsample.reduction"))

    def wrap(self, site: Site, layer: nn.Linear, plan: StreamPlan, backbone: Backbone) -> nn.Module | None:
        """A ``TaskLinear``, with task branches at stage ends (``qkv`` never has any)."""
        if site.role not in self.layers:
            return None
        stages = len(backbone.channels)
        owns = site.is_stage_end and site.role != "qkv" and plan.fork == "stage_end"
        rank = per_stage(self.rank, stages, "rank")[site.stage]
        if self.blocks == "last" and site.role != "reduction" and not site.is_stage_end:
            rank = 0
        scale = per_stage(self.scale, stages, "scale")[site.stage]
        ranks = self._of_tasks(self.task_rank, plan.tasks, stages, site.stage, "task_rank") if owns else {}
        fallback = self.scale if self.task_scale is None else self.task_scale
        scales = self._of_tasks(fallback, plan.tasks, stages, site.stage, "task_scale") if owns else {}
        if not rank and not ranks:
            return None
        block = backbone.net.get_submodule(site.name.rsplit(".", 2)[0])
        dropout = per_stage(self.dropout, stages, "dropout")[site.stage]
        return TaskLinear(
            layer,
            Branches(
                rank, scale, ranks, scales, dropout, self.mode if owns else "matrix",
                self.train_scale, self.train_task_scale,
            ),
            backbone.streams,
            narrow=owns and site.role == "proj" and is_narrow(block),
            is_last=site.is_last and site.role == "fc2",
        )  # fmt: skip

    def _of_tasks(
        self, setting: Any, tasks: Sequence[str], stages: int, stage: int, field: str
    ) -> dict[str, Any]:
        def value(task: str) -> Any:
            own = setting[task] if isinstance(setting, Mapping) else setting
            return per_stage(own, stages, field)[stage]

        return {task: value(task) for task in tasks}


def per_stage(value: Any, stages: int, field: str) -> tuple[Any, ...]:
    """One value per stage out of a scalar, a list of one or a list of all.

    Raises:
        ConfigError: a list of another length.
    """
    values = value if isinstance(value, tuple) else (value,)
    if len(values) == 1:
        return values * stages
    if len(values) != stages:
        raise ConfigError(
            "one value, or one per stage",
            where=f"model.adapter.{field}",
            got=list(values),
            expected=f"{stages} values",
        )
    return values


@dataclass(frozen=True)
class Branches:
    """Settings of one layer's branches."""

    rank: int
    scale: float
    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    dropout: float
    mode: Mode
    train_scale: bool = False
    train_scales: bool = False


class LowRank(Branch):
    """One branch, ``s B A`` with A ``[rank, in]``, B ``[out, rank]``, s ``[1]`` or fixed; zero at first."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float, *, train_scale: bool) -> None:
        super().__init__()
        learned = train_scale and rank > 0
        self.scale = nn.Parameter(layer.weight.new_full((1,), scale)) if learned else scale
        self.A = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
        self.B = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
        bound = 1 / math.sqrt(layer.in_features)  # Kaiming-uniform with a = sqrt(5)
        nn.init.uniform_(self.A, -bound, bound)


def _padded(matrix: Tensor, width: int, dim: int) -> Tensor:
    """With zeros up to ``width`` rows (dim 0) or columns."""
    spare = width - matrix.shape[dim]
    return F.pad(matrix, (0, spare) if dim else (0, 0, 0, spare)) if spare else matrix


class TaskLinear(LinearMap, Mergeable):
    """A frozen linear layer with one shared low-rank branch and one per task.

    Args:
        base: the layer to wrap; kept inside, frozen by the caller.
        branches: ranks, scales, dropout and mode.
        streams: the streams of the backbone the layer sits in.
        narrow: the input holds the shared stream only and the output forks (all task inputs equal it).
        is_last: nothing after this layer reads the shared stream, so that its branch may be skipped.
    """

    def __init__(
        self, base: nn.Linear, branches: Branches, streams: Streams, *, narrow: bool, is_last: bool
    ) -> None:
        super().__init__()
        self.base, self.streams, self.narrow, self.is_last = base, streams, narrow, is_last
        self.mode = branches.mode
        self.shared: LowRank | None = None
        if branches.rank > 0 and branches.mode != "addition":
            self.shared = LowRank(base, branches.rank, branches.scale, train_scale=branches.train_scale)
        self.tasks = PerTask(
            {
                task: LowRank(base, rank, branches.scales[task], train_scale=branches.train_scales)
                for task, rank in branches.ranks.items()
            }
        )
        self.norm = nn.LayerNorm(base.out_features) if branches.mode == "addition" else None
        self.dropout = branches.dropout

    def _shared_now(self) -> LowRank | None:
        """The shared branch, unless it sits out this training step."""
        return self.shared if self.shared is not None and (self.shared.on or not self.training) else None

    def forward(self, x: Tensor) -> Tensor:
        """``[S * B, ..., in]`` (``[B, ..., in]`` if narrow) -> ``[S * B, ..., out]``."""
        active = [task for task in self.streams.active if task in self.tasks]
        plain = self.streams.plain or (self.mode == "addition" and active)
        if plain or any(p.requires_grad for p in self.base.parameters()):
            return self._composed(x, active)
        return self._fused(x, active)

    def _fused(self, x: Tensor, active: list[str]) -> Tensor:
        """Matrix modes on a frozen base, as one operation (see ``lowrank``)."""
        streams = 1 + len(active)
        narrow = self.narrow or not active
        branch = self._shared_now()
        skip = branch is None or (
            bool(active) and self.is_last and self.streams.skip_final_shared and self.mode == "matrix"
        )
        if skip and not active:
            return self.base(x)  # type: ignore[no-any-return]
        flat = x.reshape(-1, x.shape[-1])
        drop, gain = None, 1.0
        if self.training and self.dropout and not (skip and not narrow):
            drop = draw_dropped(flat if narrow else flat[: len(flat) // streams], self.dropout)
            gain = 1 / (1 - self.dropout)
        shared = None if skip or branch is None else (branch.A * gain, branch.B * branch.scale)
        tasks = self._stack(active, gain if narrow else 1.0) if active else None
        layout = Layout(streams, narrow, self.mode == "matrixv2")
        y = branched_linear(flat, self.base.weight, self.base.bias, shared, tasks, drop, layout)
        return y.view(-1, *x.shape[1:-1], y.shape[-1])

    def _composed(self, x: Tensor, active: list[str]) -> Tensor:
        """Any mode, out of ordinary operations: the reference of ``_fused``."""
        shared_in, *task_ins = (x,) if self.narrow or not active else x.chunk(1 + len(active))
        dropped, base = self._drop(shared_in), self.base(shared_in)
        inputs = task_ins or [dropped] * len(active)
        branch = self._shared_now()
        with_shared = base if branch is None else base + self._low_rank(dropped, branch)
        below = with_shared if self.mode == "matrixv2" else base
        outputs = [
            below + self._low_rank(own, self.tasks[task])  # type: ignore[arg-type]
            for task, own in zip(active, inputs, strict=True)
        ]
        if self.norm is not None and outputs:
            with_shared = base + self.norm(torch.stack(outputs).sum(0))
        return torch.cat([with_shared, *outputs])

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def _stack(self, active: list[str], gain: float) -> tuple[Tensor, Tensor]:
        """A times ``gain`` and B times its scale, zero-padded to the largest rank (exact)."""
        branches: list[LowRank] = [self.tasks[task] for task in active]  # type: ignore[misc]
        width = max(len(branch.A) for branch in branches)
        a = [_padded(branch.A * gain, width, 0) for branch in branches]
        b = [_padded(branch.B * branch.scale, width, 1) for branch in branches]
        return torch.stack(a), torch.stack(b)

    @staticmethod
    def _low_rank(x: Tensor, branch: LowRank) -> Tensor:
        return F.linear(F.linear(x, branch.A), branch.B * branch.scale)

    def factors(self, task: str | None = None) -> Factors | None:  # noqa: ARG002
        """Those of the shared branch if there are no task branches."""
        if self.shared is None or len(self.tasks):
            return None
        return Factors(self.shared.A, self.shared.B, float(self.shared.scale))

    def linear_weight(self) -> Tensor | None:
        """``W + s B A`` if the layer has no bias, no task branches and no active dropout."""
        dropping = self.training and self.dropout > 0
        if "bias" in dict(self.base.named_parameters()) or len(self.tasks) or dropping:
            return None
        return self.base.weight if self._shared_now() is None else self._merged_weight()

    def _merged_weight(self) -> Tensor:
        assert self.shared is not None
        return self.base.weight + (self.shared.B * self.shared.scale) @ self.shared.A

    def merged(self) -> nn.Module:
        """A plain linear layer where there is no task branch; with task branches what can fold, folds.

        In matrix mode task streams need W without the shared branch, so such a layer stays as it is.
        """
        if self.shared is None or (len(self.tasks) and self.mode != "matrixv2"):
            return self
        with torch.no_grad():
            self.base.weight.copy_(self._merged_weight())
        self.shared = None
        return self if len(self.tasks) else self.base
