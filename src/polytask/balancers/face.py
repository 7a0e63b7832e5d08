"""Balancers in a training loop of one's own: what is shared is found in the graph of the losses."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from polytask.balancers.base import Balancer, BalancerSpec
from polytask.balancers.solvers import Array
from polytask.balancers.weighting import find
from polytask.config import decode
from polytask.errors import ConfigError, NonFiniteLossError, PolytaskWarning, did_you_mean
from polytask.parallel import total
from polytask.tasks.base import TaskSet
from polytask.tasks.depth import Depth
from polytask.types import Partition

Leaves = dict[int, nn.Parameter]
"""Tensors that train, by identity."""


@dataclass(frozen=True)
class Outcome:
    """What a step did.

    Attributes:
        weights: of the tasks that took part.
        losses: their values.
        stats: ``conflict`` (part of the pairs whose gradients oppose each other), ``norm_ratio`` (largest
            over smallest gradient norm) and others; empty where no gradients were compared.
        gram: inner products of the gradients that were compared, ``[n, n]``, or None.
    """

    weights: dict[str, float]
    losses: dict[str, float]
    stats: dict[str, float]
    gram: Array | None

    @property
    def norms(self) -> Array | None:
        """Of the gradients, ``[n]``."""
        return None if self.gram is None else np.sqrt(np.diag(self.gram))

    @property
    def cosines(self) -> Array | None:
        """Between the gradients, ``[n, n]``."""
        norms = self.norms
        return None if norms is None else self.gram / np.maximum(np.outer(norms, norms), 1e-300)


def balancer(name: str, tasks: Iterable[str] | TaskSet, **settings: Any) -> Balancer:
    """A balancer by name.

    Args:
        name: as in a recipe, such as ``cagrad``; aliases too.
        tasks: their names, in any order.
        settings: of the method, such as ``c=0.4`` or ``mode="features"``.

    Raises:
        ConfigError: an unknown method or setting, or no task.
    """
    spec: BalancerSpec = decode(find(name, BalancerSpec), settings)
    if not isinstance(tasks, TaskSet):
        tasks = TaskSet({task: Depth() for task in tasks})  # any kind: balancers see names and weights
    if len(tasks) == 1:
        what = f"balancer {spec.type!r} has one task, whose gradient it leaves as it is"
        warnings.warn(what, PolytaskWarning, stacklevel=2)
    return spec.build(tasks)


def step(
    balancer: Balancer,
    losses: Mapping[str, Tensor],
    shared: nn.Module | Iterable[nn.Parameter] | None = None,
    features: Tensor | Sequence[Tensor] = (),
    parts: Sequence[Mapping[str, Tensor]] = (),
    accumulate: bool = False,
) -> Outcome:
    """See ``Balancer.step``."""
    values = _checked(balancer, losses)
    losses = {name: loss for name, loss in losses.items() if np.isfinite(values[name])}
    ends = [features] if isinstance(features, Tensor) else list(features)
    key = tuple(losses)
    if key not in balancer.partitions:
        balancer.partitions[key] = partition_of(losses, shared, ends)
    known = balancer.partitions[key]
    partition = Partition({n: p for n, p in known.shared.items() if p.requires_grad}, known.per_task, {})
    if accumulate:
        balancer.collect(losses, partition)
        return Outcome({}, values, {}, None)
    weights = balancer.backward(losses, partition, ends, parts) if losses else {}
    return Outcome(weights, values, dict(balancer.stats), balancer.gram)


def _checked(balancer: Balancer, losses: Mapping[str, Tensor]) -> dict[str, float]:
    """Global values of the losses.

    Raises:
        ConfigError: an unknown task, or a loss that is no scalar or does not depend on what trains.
        NonFiniteLossError: a value that may not be.
    """
    for name, loss in losses.items():
        if name not in balancer.tasks:
            hint = did_you_mean(name, balancer.tasks)
            raise ConfigError(f"unknown task {name!r}", where="losses", hint=hint)
        if loss.numel() != 1 or not loss.requires_grad:
            what = f"the loss of task {name!r} does not depend on parameters that train"
            what = what if loss.numel() == 1 else f"the loss of task {name!r} is no scalar"
            raise ConfigError(what, where="losses", got=f"shape {list(loss.shape)}")
    found = total(torch.stack([loss.detach().reshape(()) for loss in losses.values()]).double())
    values = dict(zip(losses, found.tolist(), strict=True))
    if not balancer.tolerates(values):
        task, value = next((t, v) for t, v in values.items() if not np.isfinite(v))
        raise NonFiniteLossError(f"the loss of task {task!r} is {value}", expected="a finite loss")
    return values


def partition_of(
    losses: Mapping[str, Tensor],
    shared: nn.Module | Iterable[nn.Parameter] | None = None,
    features: Sequence[Tensor] = (),
) -> Partition:
    """What the tasks share and what each owns, by a walk through the graph of the losses.

    Args:
        losses: one scalar per task.
        shared: a module, parameters, or None for all that at least two losses depend on.
        features: tensors where shared computation ends; may be empty.

    Raises:
        ConfigError: a task that depends on nothing shared, or features that are not between the two.
    """
    ends = {get_gradient_edge(z).node for z in features if z.requires_grad}
    for k, z in enumerate(features):
        if z.requires_grad and _leaves([z], ends - {get_gradient_edge(z).node})[1]:
            what, hint = "depends on another one", "give the heads `z.view_as(z)` of each, and pass those"
            raise ConfigError(what, where=f"features[{k}]", hint=hint)
    below = _leaves([z for z in features if z.requires_grad])[0]
    found = {name: _leaves([loss], ends) for name, loss in losses.items()}
    reached = [leaves for leaves, _ in found.values()]
    times = Counter(i for leaves in reached for i in leaves)
    several = {i: p for leaves in reached for i, p in leaves.items() if times[i] > 1}
    common = _given(shared) if shared is not None else below if features else several
    for name, (leaves, met) in found.items():
        if features and not met:
            raise ConfigError(f"the loss of task {name!r} does not depend on the features", where="features")
        if not met and len(losses) > 1 and not leaves.keys() & common.keys():
            what = f"the loss of task {name!r} does not depend on any shared parameter"
            raise ConfigError(what, where="shared")
    if features and not below.keys() & common.keys():
        raise ConfigError("the features are not a function of the shared parameters", where="features")
    if features and any(leaves.keys() & common.keys() for leaves in reached):
        raise ConfigError("a loss depends on shared parameters past the features", where="features")
    common = {i: p for i, p in common.items() if i in below or any(i in leaves for leaves in reached)}
    own = {
        name: {str(i): p for i, p in leaves.items() if i not in common and i not in several}
        for name, (leaves, _) in found.items()
    }
    return Partition({str(i): p for i, p in common.items()}, own, {})


def _given(shared: nn.Module | Iterable[nn.Parameter]) -> Leaves:
    parameters = shared.parameters() if isinstance(shared, nn.Module) else shared
    return {id(p): p for p in parameters if p.requires_grad}


def _leaves(roots: Sequence[Tensor], ends: Collection[Any] = ()) -> tuple[Leaves, bool]:
    """Leaves that tensors depend on without passing ``ends``, and whether they depend on one of ``ends``."""
    found: Leaves = {}
    seen: set[Any] = set()
    waiting: list[Any] = [get_gradient_edge(root).node for root in roots]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in ends:
            continue
        if (leaf := getattr(node, "variable", None)) is not None:
            found[id(leaf)] = leaf
        waiting += [following for following, _ in node.next_functions]
    return found, bool(seen & set(ends))
