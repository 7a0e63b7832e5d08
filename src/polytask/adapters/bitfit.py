"""BitFit: only the biases of the backbone train.

Ben Zaken, Goldberg, Ravfogel: "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", ACL 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from polytask.adapters.base import Adapter
from polytask.backbones.streams import StreamPlan
from polytask.backbones.timm import Backbone
from polytask.config import register
from polytask.errors import ConfigError
from polytask.types import Site


@register("adapter")
class BitFit(Adapter):
    """Only the biases of the backbone train, on any backbone that has some (Ben Zaken et al., ACL 2022)."""

    type: Literal["bitfit"] = "bitfit"

    def plan(self, tasks: Sequence[str]) -> StreamPlan:  # noqa: ARG002
        """No streams."""
        return StreamPlan()

    def sites(self, backbone: Backbone) -> list[Site]:  # noqa: ARG002
        """None: nothing is wrapped."""
        return []

    def check(self, sites: Sequence[Site], parameters: Sequence[str]) -> None:  # noqa: ARG002
        """Raises ConfigError if nothing would train."""
        if not any(map(self.trains, parameters)):
            raise ConfigError("the backbone has no biases", where="model.adapter")

    def wrap(self, site: Site, layer: nn.Module, plan: StreamPlan, backbone: Backbone) -> None:
        """Never called."""

    def trains(self, name: str) -> bool:
        """Biases, also those named ``q_bias``, but no tables of relative positions."""
        return name.endswith("bias")
