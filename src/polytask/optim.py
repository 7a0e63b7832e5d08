"""Optimizers and learning-rate schedules, by torch and timm."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]
from timm.scheduler import CosineLRScheduler, PolyLRScheduler  # type: ignore[attr-defined]
from timm.scheduler.scheduler import Scheduler
from torch import nn

from polytask.config import Spec
from polytask.errors import ConfigError


class OptimSpec(Spec):
    """Optimizer and schedule; ``lr_per_batch`` multiplies learning rates by ``batch_size / lr_per_batch``."""

    type: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = Field(default=5e-4, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    decay_vectors: bool = Field(default=False, description="decay biases and the weights of norms too")
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = Field(default=0.9, ge=0, description="sgd only")
    schedule: Literal["cosine", "poly", "constant"] = "cosine"
    warmup_epochs: float = Field(default=0.0, ge=0)
    warmup_lr: float = Field(default=0.0, ge=0)
    min_lr: float = Field(default=0.0, ge=0)
    power: float = Field(default=0.9, gt=0, description="poly only")
    lr_per_batch: int | None = Field(
        default=None, ge=1, description="batch size the rates are meant for, e.g. 512"
    )
    clip_norm: float | None = Field(default=5.0, gt=0, description="global gradient norm; null for none")

    def optimizer(
        self, model: nn.Module, extra: list[nn.Parameter], batch_size: int
    ) -> torch.optim.Optimizer:
        """Optimizer over the trainable parameters.

        Vectors and biases are not decayed, unless ``decay_vectors``; ``extra`` never are.

        Raises:
            ConfigError: nothing trains.
        """
        split = param_groups_weight_decay(model, self.weight_decay)
        groups: list[dict[str, Any]] = [g for g in split if g["params"]]
        if self.decay_vectors:
            groups = [{**g, "weight_decay": self.weight_decay} for g in groups]
        if not groups:
            raise ConfigError("no parameter of the model trains", where="phases", hint="unfreeze something")
        if extra:
            groups.append({"params": extra, "weight_decay": 0.0})
        lr = self.lr * self.factor(batch_size)
        if self.type == "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=self.momentum)
        kind = torch.optim.AdamW if self.type == "adamw" else torch.optim.Adam
        return kind(groups, lr=lr, betas=self.betas)

    def scheduler(
        self, optimizer: torch.optim.Optimizer, steps: int, steps_per_epoch: int, batch_size: int
    ) -> Scheduler | None:
        """Schedule per step (``step_update``) over ``steps`` steps; None for a constant rate."""
        if self.schedule == "constant" and not self.warmup_epochs:
            return None
        factor = self.factor(batch_size)
        warmup = min(round(self.warmup_epochs * steps_per_epoch), steps)
        common: dict[str, Any] = {
            "t_initial": max(steps - warmup, 1),
            "warmup_t": warmup,
            "warmup_prefix": True,
            "warmup_lr_init": self.warmup_lr * factor,
            "lr_min": self.min_lr * factor,
            "t_in_epochs": False,
            "cycle_decay": 0.5,  # of no effect in a single cycle; 1 makes timm remark on phases of one step
        }
        if self.schedule == "poly":
            return PolyLRScheduler(optimizer, power=self.power, cycle_limit=1, **common)
        if self.schedule == "constant":
            common |= {"lr_min": optimizer.param_groups[0]["lr"]}
        return CosineLRScheduler(optimizer, cycle_limit=1, **common)

    def factor(self, batch_size: int) -> float:
        """What learning rates are multiplied by."""
        return batch_size / self.lr_per_batch if self.lr_per_batch else 1.0
