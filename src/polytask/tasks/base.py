"""What a task is: the one home of its loss, its prediction, its metrics and its colors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, final

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from polytask.config import Spec
from polytask.errors import ConfigError, DataError, did_you_mean
from polytask.metrics.base import IGNORE, MeanOfBatches, Metric, Total
from polytask.metrics.plugin import Plugged, Plugin
from polytask.types import Sample


def identity(tensor: Tensor) -> Tensor:
    """The sum over one process."""
    return tensor


def finite(raw: Tensor, *channels: int) -> Tensor:
    """A raw map ``[H, W, *channels]`` of real values as float32; raises DataError if it is anything else."""
    if raw.ndim != 2 + len(channels) or raw.shape[2:] != channels:
        expected = " x ".join(("height", "width", *map(str, channels)))
        raise DataError("map of an unexpected shape", got=list(raw.shape), expected=expected)
    if not raw.sum().isfinite() and not raw.isfinite().all():  # the first is quick
        raise DataError(f"map with {int((~raw.isfinite()).sum())} values that are not finite")
    return raw.float()


def _usable(name: str) -> str:
    if not name.isidentifier() or name in {"image", "id", "clip", *dir(nn.ModuleDict())}:
        raise ValueError(f"{name!r} cannot name a task: use letters, digits and _, and no name in use")
    return name


TaskName = Annotated[str, AfterValidator(_usable)]
"""A name that may stand in a sample and in a ``PerTask``."""


class Task(Spec):
    """One prediction target.

    Batches hold a task's target as ``[B, 1, H, W]`` long with 255 = ignore (label maps),
    ``[B, 1, H, W]`` float with 0 = invalid (depth), ``[B, 3, H, W]`` float unit vectors with
    (0, 0, 0) = invalid (normals), ``[B, 3, H, W]`` float in 0..1 (the image itself), ``[B]`` long with
    -1 = unknown (image-level classes and identities) or ``[B, K]`` long of 0, 1 and -1 = unknown
    (attributes).
    """

    type: str
    weight: float = Field(default=1.0, ge=0.0, description="fixed loss weight, used by the `fixed` balancer")
    mean_of_batches: bool = Field(
        default=False, description="average scores over batches, as the evaluators of the MTAN family do"
    )
    extra_metrics: dict[str, Plugin] = Field(default={}, description="name -> metric of torchmetrics")

    dense: ClassVar[bool] = True
    """Whether there is one prediction per pixel (else one per image)."""
    of_image: ClassVar[bool] = False
    """Whether the image itself is the raw label, so that datasets store nothing for the task."""
    headline: ClassVar[str]
    """The metric that enters the average relative gain."""
    higher_is_better: ClassVar[bool]

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels of the logits."""

    @abstractmethod
    def encode(self, raw: Tensor) -> Tensor:
        """Raw label as a dataset reads it -> a map of ``polytask.data.maps`` or a scalar (or small) tensor.

        The map types tell transforms how geometry acts on the values.
        """

    def unknown(self, height: int, width: int) -> Tensor:
        """A raw label that says nothing about an image of this size."""
        return torch.full((height, width), IGNORE) if self.dense else torch.tensor(-1)

    @abstractmethod
    def loss(self, logits: Tensor, target: Tensor, total: Total = identity) -> Tensor | None:
        """Mean loss over the valid labels of the whole batch, or None if there are none.

        Args:
            logits: ``[B, C, H, W]`` or ``[B, C]``.
            target: as described for the class.
            total: sums a tensor over all processes; counts go through it, so that the returned value
                is this process's share and the shares add up to the loss of the whole batch.
        """

    @abstractmethod
    def predict(self, logits: Tensor) -> Tensor:
        """Logits to labels ``[B, H, W]``, probabilities ``[B, H, W]``, meters ``[B, H, W]``, unit vectors
        ``[B, 3, H, W]`` or class indices ``[B]``."""

    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """Fresh accumulators; together their scores must contain ``headline``."""

    @final
    def accumulators(self, *, final: bool = False) -> tuple[Metric, ...]:
        """``metrics`` under the settings that all tasks share, and ``extra_metrics``.

        Without ``final``, those that take too long for evaluations during training are left out.
        """
        own = tuple(metric for metric in self.metrics() if final or not metric.FINAL)
        if self.mean_of_batches:
            own = tuple(MeanOfBatches(metric) for metric in own)
        return (*own, *(Plugged(name, plugin) for name, plugin in self.extra_metrics.items()))

    @abstractmethod
    def colorize(self, prediction: np.ndarray) -> np.ndarray:
        """Prediction or target of one image (no batch axis) to a uint8 ``[H, W, 3]`` picture."""

    def caption(self, prediction: np.ndarray) -> str:  # noqa: ARG002 - image-level tasks use it
        """Words for one prediction; empty for dense tasks, which have a picture."""
        return ""


class TaskSet(Mapping[str, Task]):
    """The ordered tasks of one run."""

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        if not tasks:
            raise ConfigError("at least one task is needed", where="tasks", got="an empty list")
        for name in tasks:
            try:
                _usable(name)
            except ValueError as error:
                raise ConfigError(str(error), where="tasks") from None
        self._tasks = dict(tasks)

    def __getitem__(self, name: str) -> Task:
        return self._tasks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def __repr__(self) -> str:
        return f"TaskSet({', '.join(self)})"

    def subset(self, names: tuple[str, ...] | list[str], where: str = "tasks") -> TaskSet:
        """The named tasks, in the order of this set."""
        for name in names:
            if name not in self._tasks:
                raise ConfigError(f"unknown task {name!r}", where=where, hint=did_you_mean(name, self))
        return TaskSet({name: task for name, task in self.items() if name in names})

    @final
    def losses(
        self, logits: Mapping[str, Tensor], batch: Sample, total: Total = identity
    ) -> dict[str, Tensor]:
        """Loss per task; a task without any valid label in the (global) batch is left out."""
        losses = {}
        for name, task in self.items():
            if name in logits:
                loss = task.loss(logits[name], batch[name], total)
                if loss is not None:
                    losses[name] = loss
        return losses
