"""Recon: layers in which tasks pull apart become task-specific.

Shi et al.: "Recon: Reducing Conflicting Gradients from the Root for Multi-Task Learning", ICLR 2023.
A first run counts conflicts per layer (``polytask.balancers.recon``); in a second one the worst have copies.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator
from torch import nn

from polytask.adapters.base import Adapter
from polytask.backbones.streams import Private, StreamPlan
from polytask.backbones.timm import Backbone
from polytask.config import Location, Spec, decode, register
from polytask.errors import ConfigError, PolytaskError, did_you_mean
from polytask.types import Site

REPORT = "conflicts.json"
_NET = "backbone.net."


class Conflicts(Spec):
    """Cosines between task gradients in each shared layer."""

    tasks: tuple[str, ...]
    steps: int = Field(description="training steps that were looked at")
    layers: dict[str, tuple[int, ...]] = Field(
        description="number of parameters, then how many cosines fell into each of equal parts of -1..1"
    )

    def ranking(self, threshold: float = 0.0) -> dict[str, float]:
        """How many cosines are below (the S-conflict score; linear inside a part) by layer, worst first."""
        found = {}
        for name, (_, *counts) in self.layers.items():
            place = round((threshold + 1) * len(counts) / 2, 9)
            found[name] = float(np.interp(place, range(len(counts) + 1), np.cumsum((0, *counts))))
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def rank_agreement(one: Conflicts, other: Conflicts, threshold: float = 0.0) -> float:
    """Spearman's correlation of two rankings of the same layers, e.g. from every step and every tenth."""
    ranks = []
    for scores in (one.ranking(threshold), other.ranking(threshold)):
        x = np.array([scores[name] for name in one.layers])
        ranks.append((x[:, None] > x).sum(1) + (x[:, None] >= x).sum(1))  # twice the mean rank of equal ones
    return float(np.corrcoef(ranks)[0, 1])


class Measured(Spec):
    """The layers of the backbone that conflicted most in a run with ``balancer: recon``."""

    run: Location = Field(description=f"the run folder, which holds {REPORT}")
    top: int | None = Field(default=None, ge=1, description="at most so many; default: all with a conflict")
    budget: float | None = Field(
        default=None, gt=0, description="most conflicts per parameter first, while copies add no more than "
        "this share of all measured parameters; default: most conflicts first",
    )  # fmt: skip
    threshold: float = Field(default=0.0, gt=-1, le=0, description="a cosine below it is a conflict")
    min_size: int = Field(default=1, ge=1, description="leave alone layers with fewer parameters")

    def choose(self, conflicts: Conflicts) -> list[str]:
        """Names of layers, worst first."""
        scores, sizes = conflicts.ranking(self.threshold), {n: x[0] for n, x in conflicts.layers.items()}
        names = [n for n in scores if scores[n] and sizes[n] >= self.min_size and n.startswith(_NET)]
        if self.budget is None:
            return names[: self.top]
        chosen, left = [], self.budget * sum(sizes.values()) / (len(conflicts.tasks) - 1)
        for name in sorted(names, key=lambda name: -scores[name] / sizes[name]):
            if sizes[name] <= left:
                chosen.append(name)
                left -= sizes[name]
        return chosen[: self.top]


@register("adapter")
class Recon(Adapter):
    """Every task gets its own copy of the named layers, equal at the start; all trains."""

    type: Literal["recon"] = "recon"
    layers: tuple[str, ...] = Field(min_length=1, description="timm names, patterns, or what was measured")

    @field_validator("layers", mode="before", json_schema_input_type=tuple[str, ...] | Measured)
    @classmethod
    def _names(cls, value: Any) -> Any:
        """Measured layers are named at once, so that the recipe kept with a run needs no other file."""
        if not isinstance(value, dict):
            return value
        try:
            measured = decode(Measured, value)
            content = json.loads((measured.run / REPORT).read_text(encoding="utf-8"))
            names = measured.choose(decode(Conflicts, content, source=REPORT))
        except (OSError, ValueError, PolytaskError) as error:
            raise ValueError(f"{error}; `run` is a finished run with `balancer: recon`") from None
        if not names:
            what = "no measured layer of the backbone has a cosine below `threshold` and the size asked for"
            raise ValueError(f"{what}; raise `threshold` or `budget`, or lower `min_size`")
        return tuple(name.removeprefix(_NET) for name in names)

    def plan(self, tasks: Sequence[str]) -> StreamPlan:
        """A pass per task."""
        return StreamPlan("passes", tuple(tasks))

    def sites(self, backbone: Backbone) -> list[Site]:
        """The named modules; they can be any whose parameters are all their own.

        Raises:
            ConfigError: a name or pattern without match.
        """
        modules = backbone.net.named_modules()
        names = [
            name for name, m in modules if 0 < len([*m.parameters(recurse=False)]) == len([*m.parameters()])
        ]
        found: dict[str, Site] = {}
        for pattern in self.layers:
            hits = [name for name in names if fnmatchcase(name, pattern)]
            if not hits:
                what, hint = f"{pattern!r} is no layer with parameters", did_you_mean(pattern, names)
                raise ConfigError(what, where="model.adapter.layers", hint=hint)
            found |= {n: Site(name=n, stage=-1, block=-1, role="layer", is_stage_end=False) for n in hits}
        return list(found.values())

    def wrap(self, site: Site, layer: nn.Module, plan: StreamPlan, backbone: Backbone) -> nn.Module:  # noqa: ARG002
        """Its copies."""
        return Private(layer, backbone.streams, plan.tasks)

    def trains(self, name: str) -> bool:  # noqa: ARG002
        """All of it."""
        return True
