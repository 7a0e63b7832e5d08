"""Balancers in a training loop of one's own: what is shared is found in the graph of the losses."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from polytask.balancers.base import Balancer, BalancerSpec, global_values
from polytask.balancers.graph import Leaves, last_leaf, leaves
from polytask.balancers.solvers import Array
from polytask.balancers.weighting import check_names, find
from polytask.config import decode
from polytask.errors import ConfigError, NonFiniteLossError, PolytaskWarning
from polytask.tasks.base import TaskSet
from polytask.tasks.depth import Depth
from polytask.types import Partition


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
    if isinstance(tasks, str):
        raise ConfigError("tasks are a list of names", where="tasks", got=tasks, expected="such as ['depth']")
    if not isinstance(tasks, TaskSet):
        tasks = list(tasks)
        if wrong := [task for task in tasks if not isinstance(task, str)]:
            raise ConfigError("tasks are a list of names", where="tasks", got=wrong[0], expected="text")
        tasks = TaskSet({task: Depth() for task in tasks})  # any kind: balancers see names and weights
    return spec.build(tasks)


def step(
    balancer: Balancer,
    losses: Mapping[str, Tensor],
    shared: nn.Module | Iterable[nn.Parameter] | None = None,
    features: Tensor | Sequence[Tensor] | Mapping[str, Tensor] = (),
    parts: Sequence[Mapping[str, Tensor]] = (),
    accumulate: bool = False,
) -> Outcome:
    """See ``Balancer.step``."""
    try:
        return _step(balancer, losses, shared, features, parts, accumulate)
    except Exception:
        balancer.discard()
        raise


def _step(
    balancer: Balancer, losses: Mapping[str, Tensor], shared: Any, features: Any, parts: Any, accumulate: bool
) -> Outcome:
    values = _checked(balancer, losses, parts)
    losses = {name: loss for name, loss in losses.items() if np.isfinite(values[name])}
    given, ends = _given(shared), _ends(features)
    key = (*losses, *(id(p) for p in (given or {}).values() if p.requires_grad))
    known, roots = balancer.partitions.get(key), [z for z in ends or losses.values() if z.requires_grad]
    if known is None or (given is None and not all(_knows(known, root) for root in roots)):
        known = balancer.partitions[key] = partition_of(losses, given, ends)
    partition = Partition({n: p for n, p in known.shared.items() if p.requires_grad}, known.per_task, {})
    if accumulate:
        balancer.collect(losses, partition)
        return Outcome({}, values, {}, None)
    if not losses:
        balancer.discard()
    weights = balancer.backward(losses, partition, ends, parts) if losses else {}
    return Outcome(weights, values, dict(balancer.stats), balancer.gram)


def _knows(partition: Partition, root: Tensor) -> bool:
    """Whether a tensor comes from the network that was divided: its last parameter is one of those."""
    return id(last_leaf(root)) in {id(p) for _, p in partition.trainable()}


def _checked(
    balancer: Balancer, losses: Mapping[str, Tensor], parts: Sequence[Mapping[str, Tensor]]
) -> dict[str, float]:
    """Global values of the losses; not finite where one of the other ``parts`` is not.

    Raises:
        ConfigError: an unknown task, or a loss that is no scalar or does not depend on what trains.
        NonFiniteLossError: a value that may not be.
    """
    values = _values(balancer, losses, "losses")
    for k, part in enumerate(parts):
        more = _values(balancer, part, f"parts[{k}]").items()
        values |= {name: x for name, x in more if name in values and not np.isfinite(x)}
    if not balancer.tolerates(values):
        task, value = next((t, v) for t, v in values.items() if not np.isfinite(v))
        raise NonFiniteLossError(f"the loss of task {task!r} is {value}", expected="a finite loss")
    return values


def _values(balancer: Balancer, losses: Any, where: str) -> dict[str, float]:
    if not isinstance(losses, Mapping) or not losses:
        got = "none" if isinstance(losses, Mapping) else type(losses).__name__
        raise ConfigError("losses go by task", where=where, expected="{task: scalar, ...}", got=got)
    check_names(losses, balancer.tasks, where)
    for name, loss in losses.items():
        what = f"the loss of task {name!r} does not depend on parameters that train"
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ConfigError(f"the loss of task {name!r} is no scalar", where=where, got=got)
        if not loss.requires_grad:
            raise ConfigError(what, where=where)
    return global_values(losses)


def _ends(features: Any) -> list[Tensor]:
    """Features as a list; they may come as one tensor, some, or some by name."""
    ends = [features] if isinstance(features, Tensor) else features
    ends = list(ends.values()) if isinstance(ends, Mapping) else list(ends)
    if wrong := [type(z).__name__ for z in ends if not isinstance(z, Tensor)]:
        raise ConfigError("features are tensors", where="features", got=wrong[0])
    return ends


def _given(shared: Any) -> dict[str, nn.Parameter] | None:
    """What the caller says is shared, by name if it is a module."""
    if shared is None:
        return None
    if isinstance(shared, nn.Module):
        return dict(shared.named_parameters())
    parameters = list(shared) if isinstance(shared, Iterable) and not isinstance(shared, Tensor) else [shared]
    if not parameters or not all(isinstance(p, Tensor) and p.is_leaf for p in parameters):
        what, hint = "is a module or its parameters", "pass `trunk` or `trunk.parameters()`"
        raise ConfigError(what, where="shared", got=type((parameters or [shared])[0]).__name__, hint=hint)
    return {str(id(p)): p for p in parameters}


def partition_of(
    losses: Mapping[str, Tensor],
    shared: Mapping[str, nn.Parameter] | None = None,
    features: Sequence[Tensor] = (),
) -> Partition:
    """What the tasks share and what each owns, by a walk through the graph of the losses.

    Args:
        losses: one scalar per task.
        shared: parameters by name, or None for all that at least two losses depend on.
        features: tensors where shared computation ends; may be empty.

    Raises:
        ConfigError: a task that depends on nothing shared, or features that are not between the two.
    """
    frozen = shared is not None and not any(p.requires_grad for p in shared.values())
    features = [] if frozen else features  # then nothing is shared that trains
    ends = {get_gradient_edge(z).node for z in features if z.requires_grad}
    for k, z in enumerate(features):
        if z.requires_grad and leaves([z], ends - {get_gradient_edge(z).node})[1]:
            what, hint = "depends on another one", "give the heads `z.view_as(z)` of each, and pass those"
            raise ConfigError(what, where=f"features[{k}]", hint=hint)
    below = leaves([z for z in features if z.requires_grad])[0]
    found = {name: leaves([loss], ends) for name, loss in losses.items()}
    times = Counter(i for reached, _ in found.values() for i in reached)
    several = {i: p for reached, _ in found.values() for i, p in reached.items() if times[i] > 1}
    names = {id(p): name for name, p in (shared or {}).items()}
    given = {id(p): p for p in (shared or {}).values() if p.requires_grad}
    common = given if shared is not None else below if features else several
    _check(found, common, below, bool(features), frozen)
    common = {i: p for i, p in common.items() if i in below or times[i]}
    if apart := several.keys() - common.keys():
        warnings.warn(
            f"{len(apart)} parameters that several tasks depend on are not among the shared ones: they get "
            "the plain sum of the gradients",
            PolytaskWarning, stacklevel=4,
        )  # fmt: skip
    own = {
        name: {str(i): p for i, p in reached.items() if i not in common and i not in several}
        for name, (reached, _) in found.items()
    }
    return Partition({names.get(i, str(i)): p for i, p in common.items()}, own, {})


def _check(
    found: Mapping[str, tuple[Leaves, bool]], common: Leaves, below: Leaves, has_features: bool, frozen: bool
) -> None:
    """Raises ConfigError for what does not belong together."""
    for name, (reached, met) in found.items():
        if has_features and not met:
            raise ConfigError(f"the loss of task {name!r} does not depend on the features", where="features")
        if not met and not frozen and len(found) > 1 and not reached.keys() & common.keys():
            what = f"the loss of task {name!r} does not depend on any shared parameter"
            raise ConfigError(what, where="shared")
    if has_features and not below.keys() & common.keys():
        raise ConfigError("the features are not a function of the shared parameters", where="features")
    if has_features and any(reached.keys() & common.keys() for reached, _ in found.values()):
        raise ConfigError("a loss depends on shared parameters past the features", where="features")
