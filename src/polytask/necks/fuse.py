"""The plain neck: project each level, resize to the finest, concatenate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.config import register
from polytask.errors import ConfigError
from polytask.necks.base import Levels, Neck, NeckSpec
from polytask.types import Factored, Level, PerTask, Pyramids, materialize


@register("neck")
class FuseSpec(NeckSpec):
    """Per-task 1x1 projections of the levels, then resize and concatenation."""

    type: Literal["fuse"] = "fuse"
    channels: tuple[int, ...] | None = Field(
        default=(18, 36, 72, 144),
        description="channels of each projected level; null concatenates raw levels",
    )

    def build(self, levels: Levels, tasks: Sequence[str]) -> Neck:
        """Raises ConfigError if the number of projections is not the number of levels."""
        if self.channels is not None and len(self.channels) != len(levels.channels):
            raise ConfigError(
                "one projection per feature level", where="model.neck.channels",
                got=list(self.channels), expected=f"{len(levels.channels)} numbers",
            )  # fmt: skip
        return Fuse(levels.channels, self.channels, tasks)


class Projection(nn.ModuleList):
    """Bias-free 1x1 maps of one task, one per level."""

    def __init__(self, channels: Sequence[int], projected: Sequence[int]) -> None:
        super().__init__(nn.Linear(c, p, bias=False) for c, p in zip(channels, projected, strict=True))
        for linear in self:
            nn.init.kaiming_uniform_(linear.weight, a=5**0.5)  # type: ignore[arg-type]  # as a 1x1 convolution

    def forward(self, levels: Sequence[Level]) -> list[Tensor]:
        """Levels -> list of ``[B, c, H, W]``."""
        return [self._project(index, level) for index, level in enumerate(levels)]

    def _project(self, index: int, level: Level) -> Tensor:
        weight: Tensor = self[index].weight  # type: ignore[assignment]
        if isinstance(level, Tensor):
            return F.linear(level.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2)
        composed = self._buffers.get(f"composed_{index}")
        return level.project(weight) if composed is None else Factored(level.source, composed).materialize()

    def compose(self, index: int, pending: Tensor) -> None:
        """See ``Neck.compose``."""
        composed = (self[index].weight @ pending).detach()  # type: ignore[operator]
        self.register_buffer(f"composed_{index}", composed, persistent=False)


class Fuse(Neck):
    """See ``FuseSpec``."""

    def __init__(
        self, channels: Sequence[int], projected: Sequence[int] | None, tasks: Sequence[str]
    ) -> None:
        super().__init__()
        self.levels = tuple(projected if projected is not None else channels)
        self.channels = sum(self.levels)
        self.projections = PerTask(
            {t: Projection(channels, projected) for t in tasks} if projected is not None else {}
        )

    def levels_of(self, task: str) -> tuple[int, ...]:  # noqa: ARG002
        """The projected (or raw) levels."""
        return self.levels

    def compose(self, index: int, pending: Tensor) -> None:
        """See ``Neck.compose``."""
        for projection in self.projections.values():
            projection.compose(index, pending)  # type: ignore[operator]

    def forward(self, pyramids: Pyramids, tasks: Sequence[str]) -> dict[str, Tensor]:
        """Pyramids -> ``[B, C, H, W]`` per task at the finest level's size."""
        if not len(self.projections):
            raw = {id(pyramids.of(t)): _concat([materialize(x) for x in pyramids.of(t)]) for t in tasks}
            return {t: raw[id(pyramids.of(t))] for t in tasks}
        return {t: _concat(self.projections[t](pyramids.of(t))) for t in tasks}


def _concat(maps: list[Tensor]) -> Tensor:
    size = maps[0].shape[-2:]
    return torch.cat(
        [maps[0], *(F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps[1:])], 1
    )
