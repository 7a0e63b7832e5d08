"""What losses depend on, by walks through their autograd graphs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from polytask.errors import ConfigError

Leaves = dict[int, nn.Parameter]
"""Tensors that train, by identity."""


def leaves(roots: Sequence[Tensor], ends: Collection[Any] = ()) -> tuple[Leaves, bool]:
    """Leaves that tensors depend on without passing ``ends``, and whether they depend on one of ``ends``.

    Those that the forward pass used last come last.
    """
    found: Leaves = {}
    used: dict[int, int] = {}
    seen: set[Any] = set()
    waiting: list[Any] = [(get_gradient_edge(root).node, 0) for root in roots]
    while waiting:
        node, user = waiting.pop()
        leaf = None if node in ends else getattr(node, "variable", None)
        if leaf is not None:  # one node, however often it is used
            found[id(leaf)], used[id(leaf)] = leaf, max(user, used.get(id(leaf), 0))
        if node in seen:
            continue
        seen.add(node)
        if node not in ends:
            place = node._sequence_nr()  # nodes are numbered as the forward pass makes them
            waiting += [(following, place) for following, _ in node.next_functions if following is not None]
    return {i: found[i] for i in sorted(found, key=lambda i: used[i])}, bool(seen & set(ends))


def last_leaf(root: Tensor) -> nn.Parameter | None:
    """A leaf with the fewest operations between it and the tensor."""
    waiting: list[Any] = [get_gradient_edge(root).node]
    seen: set[Any] = set()
    for node in waiting:  # grows on the way
        if (leaf := getattr(node, "variable", None)) is not None:
            return leaf  # type: ignore[no-any-return]
        fresh = [n for n, _ in node.next_functions if n is not None and n not in seen]
        seen.update(fresh)
        waiting += fresh
    return None


def last_layer(losses: Sequence[Tensor], shared: Sequence[nn.Parameter]) -> nn.Parameter:
    """The last matrix (else the last vector) that all losses depend on, in the order of the forward pass.

    Raises:
        ConfigError: they have none in common.
    """
    reached = [leaves([loss])[0] for loss in losses]
    kept = set(map(id, shared)).intersection(*reached)
    common = [p for i, p in leaves(losses)[0].items() if i in kept]
    if not common:
        what, hint = "mode 'last_layer' needs a layer that all tasks depend on", "use mode exact"
        raise ConfigError(what, where="balancer.mode", hint=hint)
    return next((p for p in reversed(common) if p.ndim > 1), common[-1])
