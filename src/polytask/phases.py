"""A training schedule as data: phases, objectives and generic actions."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Literal

import safetensors.torch
import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from torch import Tensor, nn

from polytask.adapters.base import Branch
from polytask.config import Location, Slot, Spec, register
from polytask.errors import CheckpointError, ConfigError, did_you_mean
from polytask.meta import Meta
from polytask.optim import OptimSpec
from polytask.parallel import put
from polytask.seeding import derive
from polytask.types import PerTask


class Action(Spec):
    """Something done to the model when a phase begins. Must give the same result when repeated."""

    type: str

    @abstractmethod
    def apply(self, model: nn.Module) -> None:
        """Change the model in place."""

    def check(self, model: nn.Module) -> None:
        """Raise what ``apply`` would raise, without changing anything; called before the first phase."""

    def before_step(self, model: nn.Module, step: int, steps: int, seed: int) -> None:
        """Called before each step of the phase.

        Must be a function of its arguments, so that a resumed run and all processes do the same.

        Args:
            model: in training mode.
            step: number of the step in the phase, from 0.
            steps: how many the phase has.
            seed: of the phase, the same in all processes.
        """

    def leave(self, model: nn.Module) -> None:
        """Called when the phase has ended."""


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


@register("action", "cotodrop")
class CoTo(Action):
    """Progressive activation: shared branches of the adapter take part in a growing share of the steps.

    Zhuang et al., "Come Together, But Not Right Now: A Progressive Strategy to Boost Low-Rank Adaptation",
    ICML 2025. In step k of K a branch is on with probability p0 + (p1 - p0) min(1, k / ceil(rho K)), drawn
    for each on its own; if all are off, a random one is on. One that is off gets no gradient, so that no
    optimizer moves it. Branches of tasks are always on, and in evaluations all are.
    """

    type: Literal["coto"] = "coto"
    p0: float = Field(default=0.0, ge=0.0, le=1.0, description="probability at the start")
    p1: float = Field(default=1.0, ge=0.0, le=1.0, description="probability at the end of the rise")
    rho: float = Field(default=0.75, gt=0.0, le=1.0, description="share of the steps in which it rises")

    def check(self, model: nn.Module) -> None:
        """Raises ConfigError for a model without shared branches."""
        if not shared_branches(model):
            what, hint = (
                "the model has no shared branches of an adapter",
                "give it one, such as a low-rank one",
            )
            raise ConfigError(what, where="phases.actions coto", hint=hint)

    def apply(self, model: nn.Module) -> None:
        """Raises as ``check``."""
        self.check(model)

    def before_step(self, model: nn.Module, step: int, steps: int, seed: int) -> None:
        """Draw which branches are on."""
        branches = shared_branches(model)
        keep = self.p0 + (self.p1 - self.p0) * min(1.0, step / math.ceil(self.rho * steps))
        generator = torch.Generator().manual_seed(derive(seed, step))
        on = torch.rand(len(branches), generator=generator) < keep
        if not on.any():
            on[torch.randint(len(branches), (), generator=generator)] = True
        for branch, is_on in zip(branches, on.tolist(), strict=True):
            branch.on = is_on

    def leave(self, model: nn.Module) -> None:
        """Switch all on."""
        for branch in shared_branches(model):
            branch.on = True


def shared_branches(model: nn.Module) -> list[Branch]:
    """Branches of an adapter that belong to no task, in the order of the model."""
    owned = {id(m) for group in model.modules() if isinstance(group, PerTask) for m in group.modules()}
    return [m for m in model.modules() if isinstance(m, Branch) and id(m) not in owned]


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
    meta: Annotated[Meta, Slot("meta")] | None = Field(default=None, description="meta-learning, if any")

    @model_validator(mode="after")
    def _length(self) -> PhaseSpec:
        if (self.epochs is None) == (self.steps is None):
            has = "has neither" if self.epochs is None else "has both"
            raise ValueError(f"phase {self.name!r} needs either `epochs` or `steps`, and {has}")
        if self.meta is not None and self.objective.penalties:
            raise ValueError(f"phase {self.name!r} has `meta`, whose steps know no penalties")
        return self
