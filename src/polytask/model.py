"""Backbone, adapter, neck and heads put together."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from polytask import adapters as _adapters  # noqa: F401 - registers
from polytask import necks as _necks  # noqa: F401 - registers
from polytask import types
from polytask.adapters.base import Adapter, adapt, fold_batch_norms, merged
from polytask.backbones.streams import MergePoint, composable_weight
from polytask.backbones.swin import fuse_attention
from polytask.backbones.timm import Backbone, BackboneSpec
from polytask.config import Slot, Spec
from polytask.errors import ConfigError, PolytaskWarning, did_you_mean
from polytask.heads import HeadSpec, HRNetHead, PooledHead
from polytask.necks.base import Levels, Neck, NeckSpec
from polytask.necks.fuse import FuseSpec
from polytask.tasks.base import Task, TaskSet
from polytask.types import Output, Partition, PerTask


class ModelSpec(Spec):
    """The slots of a multi-task model."""

    backbone: BackboneSpec
    adapter: Annotated[Adapter, Slot("adapter")] | None = None
    neck: Annotated[NeckSpec, Slot("neck")] = FuseSpec()
    head: Annotated[HeadSpec, Slot("head")] = HRNetHead()
    image_head: Annotated[HeadSpec, Slot("head")] = PooledHead()
    heads: dict[str, Annotated[HeadSpec, Slot("head")]] = Field(default_factory=dict)
    freeze_backbone: bool = False

    def head_of(self, name: str, task: Task) -> HeadSpec:
        """The head of a task: its own in ``heads``, else the default of its kind.

        Raises:
            ConfigError: a map for an image-level task, or the reverse.
        """
        head = self.heads.get(name, self.head if task.dense else self.image_head)
        if head.dense != task.dense:
            kind = "one prediction per pixel" if task.dense else "one prediction per image"
            default = "model.head" if task.dense else "model.image_head"
            where = f"model.heads.{name}" if name in self.heads else default
            raise ConfigError(f"head {head.type!r} does not fit task {name!r} ({kind})", where=where)
        return head

    def build(self, tasks: TaskSet, image_size: tuple[int, int]) -> MultiTaskModel:
        """The model for these tasks and image size, weights loaded.

        Raises:
            ConfigError: settings that do not fit each other; CheckpointError: weights that cannot be had.
        """
        for name in self.heads:
            if name not in tasks:
                raise ConfigError(
                    f"{name!r} is not a task of this run", where="model.heads", hint=did_you_mean(name, tasks)
                )
        heads = {name: self.head_of(name, task) for name, task in tasks.items()}
        backbone = self.backbone.build(image_size)
        if self.freeze_backbone:
            backbone.requires_grad_(False)
        if self.adapter is not None:
            if self.freeze_backbone:
                raise ConfigError(
                    "an adapter decides itself what trains", where="model.freeze_backbone", got=True
                )
            adapt(backbone, self.adapter, tuple(tasks))
        backbone.check_recompute()
        if backbone.base_digest is None and any(not p.requires_grad for p in backbone.parameters()):
            warnings.warn(
                f"model.backbone {self.backbone.name}: the frozen part has random weights; "
                "set model.backbone.pretrained=true or model.backbone.weights=FILE for useful results",
                PolytaskWarning, stacklevel=2,
            )  # fmt: skip
        neck = self.neck.build(Levels(backbone.channels, backbone.strides, image_size), tuple(tasks))
        built = PerTask(
            {name: head.build_on(neck.levels_of(name), tasks[name].channels) for name, head in heads.items()}
        )
        model = MultiTaskModel(backbone, neck, built)
        model.spec = self
        return model


class MultiTaskModel(nn.Module):
    """One image in, one prediction per task out.

    Attributes:
        spec: what it was built from, None if its parts were put together by hand.
        changed: parameters that may no longer have the values the backbone was built with.
    """

    def __init__(self, backbone: Backbone, neck: Neck, heads: PerTask) -> None:
        super().__init__()
        self.backbone, self.neck, self.heads = backbone, neck, heads
        backbone.own_streams_only = True
        self.spec: ModelSpec | None = None
        self.changed = {name for name, p in self.named_parameters() if p.requires_grad}

    def train(self, mode: bool = True) -> MultiTaskModel:
        """As ``nn.Module.train``; a backbone in which nothing trains stays in eval mode."""
        super().train(mode)
        if not any(p.requires_grad for p in self.backbone.parameters()):
            self.backbone.eval()
        return self

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks the model answers."""
        return tuple(self.heads)

    def forward(self, image: Tensor, tasks: Sequence[str] | None = None) -> Output:
        """``[B, 3, H, W]`` -> logits at image size for the asked tasks (default all).

        Raises:
            ConfigError: a task the model does not have.
        """
        asked = self.tasks if tasks is None else tuple(tasks)
        for task in asked:
            if task not in self.heads:
                raise ConfigError(f"the model has no task {task!r}", hint=did_you_mean(task, self.tasks))
        pyramids, frontier = self.backbone(image, asked), ()
        cut = torch.is_grad_enabled() and not pyramids.per_task
        inner = types.partition(self.neck, self.tasks) if cut else Partition({}, {}, {})
        if cut and not inner.shared:
            pyramids, frontier = pyramids.cut()
        maps = self.neck(pyramids, asked)
        if inner.shared and not any(inner.per_task.values()):
            frontier = tuple({id(x): x for x in maps.values()}.values())
        logits = {task: self.heads[task](maps[task]) for task in asked}
        sized = {task: _resize(x, image.shape[-2:]) if x.ndim == 4 else x for task, x in logits.items()}
        return Output(sized, *types.drain(self), frontier)

    def partition(self) -> Partition:
        """Trainable parameters, shared and per task, and frozen ones."""
        return types.partition(self, self.tasks)

    def merged(self) -> MultiTaskModel:
        """A copy for inference with branches and batch norms folded where the arithmetic allows."""
        copy = merged(self)
        assert isinstance(copy, MultiTaskModel)
        for head in copy.heads.values():
            fold_batch_norms(head)
        compose_projections(copy)
        fuse_attention(copy)
        return copy


def _resize(x: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def compose_projections(model: MultiTaskModel) -> None:
    """Multiply maps that stay pending in levels of task streams with the neck's own, once for all passes."""
    for point in [module for module in model.backbone.modules() if isinstance(module, MergePoint)]:
        weight = composable_weight(point.layer)
        if weight is not None and model.backbone.plan.fork == "stage_end":
            model.neck.compose(point.stage, weight)
