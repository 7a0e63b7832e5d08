"""The head slot: how the neck's map becomes the output of one task."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from polytask.config import Spec


class HeadSpec(Spec):
    """Builds the output layer of one task from the neck's map."""

    type: str
    dense: ClassVar[bool]
    """Whether the output is a map (else one vector per image)."""

    @abstractmethod
    def build(self, channels: int, outputs: int) -> nn.Module:
        """``[B, channels, h, w]`` -> ``[B, outputs, h, w]`` (dense) or ``[B, outputs]``."""

    def build_on(self, levels: Sequence[int], outputs: int) -> nn.Module:
        """The same for a map of levels side by side, fine to coarse; most heads need their sum only."""
        return self.build(sum(levels), outputs)
