"""The measuring half of Recon (see ``polytask.adapters.recon``): where do gradients of tasks point apart?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from polytask.adapters.recon import Conflicts
from polytask.balancers.base import Balancer, BalancerSpec
from polytask.balancers.scalar import EqualSpec
from polytask.config import Slot, register
from polytask.errors import ConfigError
from polytask.parallel import total
from polytask.tasks.base import TaskSet
from polytask.types import Partition

BINS = 100
"""Of width 0.02, so that the paper's thresholds (0, -0.02, -0.1) are borders between two."""


@register("balancer")
class ReconSpec(BalancerSpec):
    """Any method, while conflicts are measured for the adapter `recon`; the run leaves `conflicts.json`.

    A step that is looked at takes one more backward pass per task. Shi et al., ICLR 2023.
    """

    type: Literal["recon"] = "recon"
    method: Annotated[BalancerSpec, Slot("balancer")] = EqualSpec()
    every: int = Field(default=1, ge=1, description="look at every m-th step only")

    def build(self, tasks: TaskSet) -> Balancer:
        """The method's balancer inside of one that measures."""
        meter = ConflictMeter(tuple(tasks), self.every, self.method.build(tasks))
        meter.nonfinite = self.nonfinite
        return meter


class ConflictMeter(Balancer):
    """Counts the cosines between task gradients in each layer: a module whose parameters are all its own.

    In any loop call ``observe``; ``state_dict`` holds the counts.

    Args:
        tasks: names of all tasks.
        every: look at every m-th step only.
        method: what balances, if anything.
    """

    def __init__(self, tasks: Sequence[str], every: int = 1, method: Balancer | None = None) -> None:
        super().__init__(tasks)
        self.every, self.method = every, method or Balancer()
        self.batches, self.looks_back = self.method.batches, self.method.looks_back

    def observe(self, losses: Mapping[str, Tensor], model: nn.Module | Mapping[str, nn.Parameter]) -> None:
        """Look at a step, before its backward pass; ``.grad`` is not touched.

        Args:
            losses: one scalar per task that is present.
            model: or some of its parameters by name. Layers that only one task reaches do not count.

        Raises:
            ConfigError: parameters that are not named by layers.
        """
        steps = self.memory.get("steps", torch.zeros((), dtype=torch.int64))
        self.memory["steps"] = steps + 1
        if int(steps) % self.every:
            return
        model = dict(model.named_parameters()) if isinstance(model, nn.Module) else model
        layers = _layers(model)
        if not layers:
            if any(p.requires_grad for p in model.values()):
                what = "conflicts are counted by layer, and no shared parameter has one in its name"
                raise ConfigError(what, where="balancer 'recon'", hint="pass a module that has layers")
            return
        flat = [p for layer in layers.values() for p in layer]
        found = [
            torch.autograd.grad(loss, flat, retain_graph=True, allow_unused=True, materialize_grads=True)
            for loss in losses.values()
        ]
        rows = total(torch.stack([torch.cat([g.reshape(-1) for g in gradients]) for gradients in found]))
        sizes = [sum(p.numel() for p in layer) for layer in layers.values()]
        i, j = torch.triu_indices(len(rows), len(rows), offset=1)
        for name, block in zip(layers, torch.split(rows, sizes, dim=1), strict=True):
            gram = block.double() @ block.double().T
            cosines = gram[i, j] / (gram[i, i] * gram[j, j]).sqrt()  # not finite without a direction
            bins = ((cosines[cosines.isfinite()] + 1) * BINS / 2).long().clamp(0, BINS - 1).cpu()
            if len(bins):
                counts = torch.cat([torch.tensor([block.shape[1]]), torch.bincount(bins, minlength=BINS)])
                counts[1:] += self.memory.get(f"layer.{name}", torch.zeros_like(counts))[1:]
                self.memory[f"layer.{name}"] = counts

    def conflicts(self) -> Conflicts:
        """What was counted so far."""
        steps, found = -(-int(self.memory.get("steps", 0)) // self.every), self.memory.items()
        layers = {k.removeprefix("layer."): tuple(v.tolist()) for k, v in found if k.startswith("layer.")}
        return Conflicts(tasks=self.tasks, steps=steps, layers=layers)

    def backward(
        self,
        losses: Mapping[str, Tensor],
        partition: Partition,
        frontier: Sequence[Tensor] = (),
        parts: Sequence[Mapping[str, Tensor]] = (),
    ) -> dict[str, float]:
        """Look, then do as the method does."""
        self.observe(losses, partition.shared)
        self.method.seed = self.seed
        weights = self.method.backward(losses, partition, frontier, parts)
        self.stats, self.gram = self.method.stats, self.method.gram
        return weights

    def cost(self) -> str:
        """That of the method, and what looking adds."""
        when = f"in one of {self.every} steps" if self.every > 1 else "in each step"
        return f"{self.method.cost()}; {when}, one more per task to measure conflicts"

    def epoch_end(self) -> None:
        """Tell the method."""
        self.method.epoch_end()

    def after_step(self, losses: Mapping[str, Tensor]) -> None:
        """Tell the method."""
        self.method.after_step(losses)


def _layers(parameters: Mapping[str, nn.Parameter]) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters by module, without modules that have others below."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor):
            raise ConfigError("conflicts cannot be measured in shards", where="run.parallel")
        if parameter.requires_grad:
            groups.setdefault(name.rpartition(".")[0], []).append(parameter)
    inner = {n[:i] for n in groups for i in range(len(n)) if n[i] == "."} | {""}
    return {name: group for name, group in groups.items() if name not in inner}
