"""A training schedule as data: phases, objectives and generic actions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Literal

import safetensors.torch
import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from torch import Tensor, nn

from polytask.config import Location, Slot, Spec, register
from polytask.errors import CheckpointError, ConfigError, did_you_mean
from polytask.optim import OptimSpec
from polytask.parallel import put


class Action(Spec):
    """Something done to the model when a phase begins. Must give the same result when repeated."""

    type: str

    @abstractmethod
    def apply(self, model: nn.Module) -> None:
        """Change the model in place."""

    def check(self, model: nn.Module) -> None:
        """Raise what ``apply`` would raise, without changing anything; called before the first phase."""


def matching(model: nn.Module, patterns: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """Parameters whose names match any shell-style pattern.

    Raises:
        ConfigError: a pattern that matches nothing.
    """
    named = dict(model.named_parameters())
    found: dict[str, nn.Parameter] = {}
    for pattern in patterns:
        hits = {name: p for name, p in named.items() if fnmatchcase(name, pattern)}
        if not hits:
            tops = sorted({f"{name.split('.')[0]}.*" for name in named})
            raise ConfigError(
                f"pattern {pattern!r} matches no parameter",
                where="phases.actions",
                hint=did_you_mean(pattern, tops),
            )
        found |= hits
    return found


@register("action")
class Freeze(Action):
    """Stop training the matching parameters."""

    type: Literal["freeze"] = "freeze"
    patterns: tuple[str, ...] = Field(min_length=1)

    def check(self, model: nn.Module) -> None:
        """Raises ConfigError for a pattern without match."""
        matching(model, self.patterns)

    def apply(self, model: nn.Module) -> None:
        """Raises as ``check``."""
        for parameter in matching(model, self.patterns).values():
            parameter.requires_grad_(False)


@register("action")
class Unfreeze(Action):
    """Train the matching parameters from now on."""

    type: Literal["unfreeze"] = "unfreeze"
    patterns: tuple[str, ...] = Field(min_length=1)

    def check(self, model: nn.Module) -> None:
        """Raises ConfigError for a pattern without match."""
        matching(model, self.patterns)

    def apply(self, model: nn.Module) -> None:
        """Raises as ``check``."""
        for parameter in matching(model, self.patterns).values():
            parameter.requires_grad_(True)


@register("action")
class Load(Action):
    """Copy the tensors of a safetensors file whose names begin with ``prefix`` into the model."""

    type: Literal["load"] = "load"
    path: Location
    prefix: str = ""

    def check(self, model: nn.Module) -> None:
        """Raises CheckpointError for a missing or damaged file, or tensors that do not fit."""
        self._chosen(model.state_dict())

    def apply(self, model: nn.Module) -> None:
        """Raises as ``check``."""
        own = model.state_dict()
        with torch.no_grad():
            for name, value in self._chosen(own).items():
                put(own[name], value)

    def _chosen(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        where = f"phases.actions load {self.path}"
        try:
            state = safetensors.torch.load_file(self.path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"file cannot be read ({error})", where=where) from None
        chosen = {name: value for name, value in state.items() if name.startswith(self.prefix)}
        if not chosen:
            raise CheckpointError(
                f"no tensor begins with {self.prefix!r}", where=where, got=f"{len(state)} tensors"
            )
        wrong = [n for n, v in chosen.items() if n not in own or own[n].shape != v.shape]
        if wrong:
            raise CheckpointError(f"{len(wrong)} tensors do not fit the model, first {wrong[0]}", where=where)
        return chosen


class Objective(Spec):
    """What a phase minimizes: factors of task losses and of penalties, by name; absent means not in it."""

    losses: dict[str, Annotated[float, Field(ge=0)]] | None = Field(
        default=None, description="default: every task of the phase, factor 1"
    )
    penalties: dict[str, float] = Field(default_factory=dict)

    def select(
        self, losses: Mapping[str, Tensor], penalties: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Scaled losses and penalties of this phase.

        Raises:
            ConfigError: a penalty that no part of the model emits.
        """
        for name in self.penalties:
            if name not in penalties:
                raise ConfigError(
                    f"no part of the model emits penalty {name!r}",
                    where="phases.objective.penalties",
                    hint=did_you_mean(name, penalties),
                )
        factors = self.losses if self.losses is not None else dict.fromkeys(losses, 1.0)
        return (
            {name: factors[name] * loss for name, loss in losses.items() if name in factors},
            {name: factor * penalties[name] for name, factor in self.penalties.items()},
        )


class PhaseSpec(Spec):
    """One step of a training schedule."""

    name: str = "train"
    epochs: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    tasks: tuple[str, ...] | None = Field(default=None, description="default: all tasks of the recipe")
    objective: Objective = Objective()
    actions: tuple[Annotated[Action, Slot("action")], ...] = ()
    optim: OptimSpec | None = Field(default=None, description="what differs from the recipe's")

    @model_validator(mode="after")
    def _length(self) -> PhaseSpec:
        if (self.epochs is None) == (self.steps is None):
            has = "has neither" if self.epochs is None else "has both"
            raise ValueError(f"phase {self.name!r} needs either `epochs` or `steps`, and {has}")
        return self
