"""Any metric of torchmetrics as a metric of a recipe."""

from __future__ import annotations

import importlib
from typing import Any, Self

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor

from polytask.config import Spec
from polytask.errors import ConfigError
from polytask.metrics.base import IGNORE, Metric
from polytask.parallel import world


class Plugin(Spec):
    """A class of torchmetrics whose result is one number; it gets valid labels, ``[n]`` or ``[n, C]``."""

    metric: str = Field(description="import path, such as torchmetrics.classification.BinaryAUROC")
    options: dict[str, Any] = Field(default={}, description="arguments of the class")

    @model_validator(mode="after")
    def _can_be_built(self) -> Self:
        self.build()
        return self

    def build(self) -> Any:
        """The torchmetrics object; raises ValueError if there is none or its arguments do not fit."""
        module, _, name = self.metric.rpartition(".")
        try:
            base = importlib.import_module("torchmetrics").Metric
            made = getattr(importlib.import_module(module), name)(**self.options)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{self.metric!r} cannot be made ({error})") from None
        if not isinstance(made, base):
            raise ValueError(f"{self.metric!r} is no torchmetrics.Metric")
        return made


class Plugged(Metric):
    """Counts items; torchmetrics keeps the rest, which is exchanged and merged in ``compute``."""

    def __init__(self, name: str, spec: Plugin) -> None:
        self.name, self.spec = name, spec
        super().__init__()

    def zeros(self) -> dict[str, Tensor]:
        self.inner = self.spec.build()
        return {"items": torch.zeros((), dtype=torch.int64)}

    def counts(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        labels = target.reshape(prediction.shape)
        real = labels.is_floating_point()
        known = labels != 0 if real else (labels >= 0) & (labels != IGNORE)
        if labels.ndim in (2, 4):  # several values per item
            prediction, labels = prediction.movedim(1, -1), labels.movedim(1, -1)
            known = known.any(1) if real else known.all(1)
        if known.any():
            self.inner.to(prediction.device).update(prediction[known], labels[known])
        return {"items": known.sum()}

    def compute(self) -> dict[str, float]:
        if not self.state["items"]:
            return {self.name: float("nan")}
        parts = [self.inner.cpu() if self.inner.update_called else None] * world()
        if world() > 1:  # torchmetrics' own exchange hangs if one process has seen nothing
            dist.all_gather_object(parts, parts[0])
        whole, *others = filter(None, parts)
        whole.sync_on_compute = False
        for part in others:
            whole.merge_state(part)
        found = whole.compute()
        if torch.as_tensor(found).numel() != 1:
            raise ConfigError("the result must be one number", where=f"extra_metrics.{self.name}", got=found)
        return {self.name: float(found)}
