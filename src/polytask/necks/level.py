"""The neck of networks with a decoder of their own: every task reads one level as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

from polytask.config import register
from polytask.errors import ConfigError, did_you_mean
from polytask.necks.base import Levels, Neck, NeckSpec
from polytask.types import Pyramids, materialize


@register("neck")
class LevelSpec(NeckSpec):
    """One level per task, e.g. the finest for maps and the coarsest for classes of images."""

    type: Literal["level"] = "level"
    level: int = Field(default=0, description="0 is the finest, -1 the coarsest")
    levels: dict[str, int] | None = Field(default=None, description="other levels of single tasks")

    def build(self, levels: Levels, tasks: Sequence[str]) -> Neck:
        """Raises ConfigError for a level or a task that is not there."""
        count = len(levels.channels)
        chosen = dict.fromkeys(tasks, self.level) | (self.levels or {})
        for task, level in chosen.items():
            where = f"model.neck.levels.{task}" if task in (self.levels or {}) else "model.neck.level"
            if task not in tasks:
                hint = did_you_mean(task, tasks)
                raise ConfigError(f"{task!r} is not a task of this run", where=where, hint=hint)
            if not -count <= level < count:
                expected = f"{-count} to {count - 1}"
                raise ConfigError("no such level", where=where, got=level, expected=expected)
        return Pick(levels.channels, chosen)


class Pick(Neck):
    """See ``LevelSpec``."""

    def __init__(self, channels: Sequence[int], chosen: Mapping[str, int]) -> None:
        super().__init__()
        self.of_levels, self.chosen = tuple(channels), dict(chosen)

    def channels_of(self, task: str) -> int:
        """Those of its level."""
        return self.of_levels[self.chosen[task]]

    def forward(self, pyramids: Pyramids, tasks: Sequence[str]) -> dict[str, Tensor]:
        """Pyramids -> one level per task, ``[B, C, h, w]``."""
        return {task: materialize(pyramids.of(task)[self.chosen[task]]) for task in tasks}
