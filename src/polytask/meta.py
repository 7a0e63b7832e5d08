"""Meta-learning: each task adapts branches of the adapter, and what trains is judged by how that went.

A learner is for a phase what a plain forward pass is for others: it says what each task's loss is. In all of
them the gradients of a task are taken as soon as its loss is known, so that one graph lives at a time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from polytask.adapters.base import Branch
from polytask.balancers.base import BalancerSpec
from polytask.balancers.recon import ReconSpec
from polytask.balancers.weighting import GradientWeighting, Method
from polytask.config import Spec, register
from polytask.errors import ConfigError, NonFiniteLossError
from polytask.model import ModelSpec
from polytask.parallel import differentiable_totals
from polytask.types import PerTask, partition


class LossOf(Protocol):
    """This process's share of a task's loss, on a part of the batch, with other values of some parameters.

    ``last``: whether batch norms note their statistics. None without a valid label.
    """

    def __call__(
        self, task: str, part: int, parameters: Mapping[str, Tensor], *, last: bool
    ) -> Tensor | None: ...


class Meta(Spec):
    """How the steps of a phase learn."""

    type: str
    steps: int = Field(default=1, ge=1, description="inner steps, of plain gradient descent")
    lr: float = Field(default=1e-3, gt=0.0, description="learning rate of the inner steps")
    inner: Literal["tasks", "all"] = Field(
        default="tasks", description="what the inner steps move: branches of the task, or shared ones too"
    )

    @abstractmethod
    def build(self, model: nn.Module, tasks: Sequence[str]) -> Learner:
        """The learner for these tasks; raises ConfigError where a task has nothing to adapt."""


class Learner(nn.Module):
    """Makes the losses of a step; its own parameters train along, without decay.

    Attributes:
        inner: per task the parameters that inner steps move, by name.
        outer: all trainable parameters, by name.
        parts: how many disjoint parts of a batch a step needs.
        second_order: whether inner steps are differentiated.
    """

    def __init__(self, spec: Meta, model: nn.Module, tasks: Sequence[str]) -> None:
        super().__init__()
        self.steps, self.lr = spec.steps, spec.lr
        self.inner = inner_parameters(model, tasks, spec.inner)
        self.outer = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parts, self.second_order = 2, False

    def losses(self, loss_of: LossOf, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """Loss per task, whose backward pass gives the gradients that the method stands for.

        Args:
            loss_of: computes losses.
            weights: per task, what its loss is multiplied by in inner steps.

        Raises:
            NonFiniteLossError: inner steps led to numbers that are not finite.
        """
        raise NotImplementedError

    def move(self) -> None:
        """Called after the optimizer's step."""

    def stats(self) -> dict[str, float]:
        """Figures for the log."""
        return {}


def inner_parameters(
    model: nn.Module, tasks: Sequence[str], which: Literal["tasks", "all"]
) -> dict[str, dict[str, nn.Parameter]]:
    """Per task what trains of its branches of the adapter, with ``all`` that of shared branches too.

    Raises:
        ConfigError: a task without any.
    """
    inside = {id(p) for m in model.modules() if isinstance(m, Branch) for p in m.parameters()}
    owners = {task for m in model.modules() if isinstance(m, PerTask) for task in m}
    parts = partition(model, [*owners])

    def of(named: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        return {name: p for name, p in named.items() if id(p) in inside}

    shared = of(parts.shared) if which == "all" else {}
    found = {task: {**shared, **of(parts.per_task.get(task, {}))} for task in tasks}
    for task, parameters in found.items():
        if not parameters:
            what = f"no branch of an adapter that task {task!r} could adapt trains"
            hint = "use an adapter with branches per task, or meta.inner=all for one with shared branches"
            raise ConfigError(what, where="phases.meta", hint=hint)
    return found


class _Known(torch.autograd.Function):
    """A scalar whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(outputs[0] * gradient for gradient in ctx.gradients)


def known(loss: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """The value of a loss whose gradients have been taken: balancers may pass it backward as any other.

    Parameters without a gradient (None) get none.
    """
    pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
    value: Tensor = _Known.apply(loss.detach(), [g for _, g in pairs], *(p for p, _ in pairs))
    return value


class Adapting(Learner):
    """Judges the tasks' losses on one half of the batch after inner steps on the other half."""

    def losses(self, loss_of: LossOf, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """See ``Learner.losses``."""
        found, parameters = {}, [*self.outer.values(), *self.parameters()]
        for task, inner in self.inner.items():
            loss = loss_of(task, 1, self._adapted(task, inner, loss_of, weights[task]), last=True)
            if loss is not None:
                found[task] = known(
                    loss, parameters, torch.autograd.grad(loss, parameters, allow_unused=True)
                )
        return found

    def _adapted(
        self, task: str, inner: Mapping[str, Tensor], loss_of: LossOf, weight: float
    ) -> Mapping[str, Tensor]:
        """Functions of the parameters, so that nothing is changed and nothing has to be put back."""
        for _ in range(self.steps):
            loss = loss_of(task, 0, inner, last=False)
            if loss is None:
                break
            gradients = torch.autograd.grad(
                loss, [*inner.values()], create_graph=self.second_order, materialize_grads=True
            )
            steps = zip(inner.items(), differentiable_totals(gradients), strict=True)
            inner = {name: value - weight * self.rate(name) * g for (name, value), g in steps}
        return inner

    def rate(self, name: str) -> float | Tensor:  # noqa: ARG002
        """The step size of a parameter."""
        return self.lr


@register("meta")
class FOMAML(Meta):
    """First-order MAML: gradients at the adapted values, taken for those at the start.

    Finn, Abbeel, Levine, ICML 2017. Every other sample of a batch is for the inner steps, the rest for the
    loss that counts.
    """

    type: Literal["fomaml"] = "fomaml"

    def build(self, model: nn.Module, tasks: Sequence[str]) -> Learner:
        """See ``Meta.build``."""
        return Adapting(self, model, tasks)


@register("meta", "meta_sgd")
class MetaSGD(Meta):
    """Meta-SGD: the step size of every number that inner steps move is learned, with second derivatives.

    Li, Zhou, Chen, Li, 2017 (arXiv:1707.09835). Halves as in ``fomaml``; ``lr`` is where step sizes start.
    """

    type: Literal["metasgd"] = "metasgd"

    def build(self, model: nn.Module, tasks: Sequence[str]) -> Learner:
        """See ``Meta.build``."""
        return LearnedSteps(self, model, tasks)


class LearnedSteps(Adapting):
    """Step sizes as parameters."""

    def __init__(self, spec: Meta, model: nn.Module, tasks: Sequence[str]) -> None:
        super().__init__(spec, model, tasks)
        self.second_order = True
        moved = {name: p for inner in self.inner.values() for name, p in inner.items()}
        self.rates = nn.ParameterDict(
            {_key(name): torch.full_like(p, spec.lr, requires_grad=True) for name, p in moved.items()}
        )

    def rate(self, name: str) -> float | Tensor:
        """See ``Adapting.rate``."""
        rate: Tensor = self.rates[_key(name)]
        return rate

    def stats(self) -> dict[str, float]:
        """The mean step size."""
        sizes = torch.cat([rate.detach().reshape(-1) for rate in self.rates.values()])
        return {"step_size": float(sizes.mean())}


def _key(name: str) -> str:
    return name.replace(".", "/")  # names of parameters hold no dots


@register("meta")
class Reptile(Meta):
    """Reptile: branches move part of the way to where inner steps on each task lead, on average.

    Nichol, Achiam, Schulman, 2018 (arXiv:1803.02999). Inner steps are on the whole batch. What they do not
    move gets the gradients of the last one, and the phase's optimizer.
    """

    type: Literal["reptile"] = "reptile"
    steps: int = Field(default=3, ge=1, description="inner steps; with one it is gradient descent")
    outer: float = Field(default=0.5, gt=0.0, le=1.0, description="part of the way")

    def build(self, model: nn.Module, tasks: Sequence[str]) -> Learner:
        """See ``Meta.build``."""
        return PartOfTheWay(self, model, tasks)


class PartOfTheWay(Learner):
    """The learner of ``Reptile``."""

    def __init__(self, spec: Reptile, model: nn.Module, tasks: Sequence[str]) -> None:
        super().__init__(spec, model, tasks)
        self.parts, self.part_of_way = 1, spec.outer
        self.moved = {name: p for inner in self.inner.values() for name, p in inner.items()}
        self.rest = [p for name, p in self.outer.items() if name not in self.moved]
        self._ways: dict[str, list[Tensor]] = {}

    def losses(self, loss_of: LossOf, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """See ``Learner.losses``."""
        self._ways, found = {}, {}
        for task, inner in self.inner.items():
            values: dict[str, Tensor] = {name: p.detach().requires_grad_() for name, p in inner.items()}
            for step in range(1, self.steps + 1):
                last = step == self.steps
                loss = loss_of(task, 0, values, last=last)
                if loss is None:
                    break
                inputs = [*values.values(), *(self.rest if last else ())]
                gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
                values = self._stepped(values, gradients[: len(values)], weights[task])
                if last:
                    found[task] = known(loss, self.rest, gradients[len(values) :])
            else:
                self._note(task, inner, values)
        return found

    def _stepped(
        self, values: Mapping[str, Tensor], gradients: Sequence[Tensor | None], weight: float
    ) -> dict[str, Tensor]:
        filled = [
            torch.zeros_like(v) if g is None else g for v, g in zip(values.values(), gradients, strict=True)
        ]
        steps = zip(values.items(), differentiable_totals(filled), strict=True)
        return {name: (v - weight * self.lr * g).detach().requires_grad_() for (name, v), g in steps}

    def _note(self, task: str, start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> None:
        for name, value in end.items():
            way = value.detach() - start[name].detach()
            if not torch.isfinite(way).all():
                what, hint = f"the inner steps of task {task!r} are not finite", "lower meta.lr"
                raise NonFiniteLossError(what, where="phases.meta", hint=hint)
            self._ways.setdefault(name, []).append(way)

    @torch.no_grad()
    def move(self) -> None:
        """Move the branches; shared ones by the mean over the tasks."""
        for name, ways in self._ways.items():
            self.moved[name].add_(torch.stack(ways).mean(0), alpha=self.part_of_way)


def meta_problems(model: ModelSpec, balancer: BalancerSpec, parallel: str) -> list[str]:
    """What a recipe with such a phase cannot have, a sentence each, to be preceded by the place."""
    problems = []
    method = balancer.method if isinstance(balancer, ReconSpec) else balancer
    mode = method.mode if isinstance(method, GradientWeighting) else "exact"
    looks_back = isinstance(method, Method) and method.LOOKS_BACK
    if method.BATCHES > 1 or looks_back or mode in ("features", "last_layer"):
        problems.append(
            f"balancer {method.type!r} (mode {mode}) needs several batches, losses after the update, or the "
            "model's own graph, which these steps do not have; use e.g. balancer: fixed"
        )
    if model.adapter is None:
        problems.append("inner steps move branches of an adapter, and model.adapter is null")
    if model.backbone.recompute:
        problems.append("blocks that are recomputed would be so without the inner steps; leave out "
                        "model.backbone.recompute")  # fmt: skip
    if parallel == "fsdp":
        problems.append("sharded parameters cannot be replaced; use run.parallel=replicated")
    return problems
