"""The neck slot: how the pyramids become one feature map per task."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from polytask.config import Spec
from polytask.types import Pyramids

Size = tuple[int, int]


class Levels(NamedTuple):
    """What a backbone gives a neck: channels and stride of each level, fine to coarse, and of what image."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    image_size: Size


class Neck(nn.Module):
    """Pyramids -> one map ``[B, C, H, W]`` per task.

    Attributes:
        channels: C of the maps.
    """

    channels: int

    def usage(self) -> dict[str, dict[str, Tensor]]:
        """How much each expert acted in the last pass, by module and task ``[N]``; if it has any."""
        return {}

    def channels_of(self, task: str) -> int:  # noqa: ARG002
        """C of a task's map, where they differ."""
        return self.channels

    def levels_of(self, task: str) -> tuple[int, ...]:
        """The channels of the levels that lie side by side in a task's map, fine to coarse."""
        return (self.channels_of(task),)

    def compose(self, index: int, pending: Tensor) -> None:
        """For inference only: the map that is pending of a level (``Factored``) stays this one from now on.

        A neck that starts with a linear map may multiply the two once instead of in every pass.
        """

    def forward(self, pyramids: Pyramids, tasks: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the asked tasks."""
        raise NotImplementedError


class NeckSpec(Spec):
    """A fusion-side technique."""

    type: str

    EXPERTS: ClassVar[bool] = False
    """Whether its ``usage`` tells something."""

    @abstractmethod
    def build(self, levels: Levels, tasks: Sequence[str]) -> Neck:
        """The neck for such levels."""
