"""Inference with mixtures of low-rank experts: one convolution per image, task and module.

In eval mode all between the map that enters a module and its nonlinearity is linear, so that the gates mix
kernels: ``K = alpha * sum_e gate_e W_e + m W_task + W_common``, with the batch norm of the experts' sum in
alpha (exact at the borders too, since padding sits on the 3x3 convolutions only). The other batch norm scales
what comes out, which is less to scale than the kernels of all tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.necks.routing import convolve_each
from polytask.types import PerTask

if TYPE_CHECKING:
    from polytask.necks.mlore import ExpertModule, TaskPath


class Bank(nn.Module):
    """The experts' dense kernels, kept, or made from the factors in each pass."""

    def __init__(self, module: ExpertModule, memory: str) -> None:
        super().__init__()
        kernels, biases = module.experts.dense()
        self.register_buffer("biases", biases)
        self.register_buffer("kernels", kernels if memory == "bank" else None)
        factors = _factors(module) if memory == "on_the_fly" else (None, None, None)
        for name, factor in zip(("down", "up", "owner"), factors, strict=True):
            self.register_buffer(name, factor)

    kernels: Tensor | None
    biases: Tensor
    down: Tensor
    up: Tensor
    owner: Tensor

    def forward(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Gates ``[G, N]`` -> kernels ``[G, C, 9 C]`` and biases ``[G, C]``."""
        if self.kernels is not None:
            mixed = (gates @ self.kernels.flatten(1)).view(len(gates), *self.kernels.shape[1:])
        else:
            mixed = (self.up * gates[:, None, self.owner]) @ self.down
        return mixed, gates @ self.biases


def _factors(module: ExpertModule) -> tuple[Tensor, Tensor, Tensor]:
    """All experts' factors side by side, ``[R, 9 C]`` and ``[C, R]``, and the expert of each rank ``[R]``."""
    experts: list[Any] = list(module.experts)
    down = torch.cat([e.down.weight.flatten(1) for e in experts])
    owner = [number for number, e in enumerate(experts) for _ in range(e.down.out_channels)]
    up = torch.cat([e.up.weight.flatten(1) for e in experts], 1)
    return down, up, torch.tensor(owner, device=up.device)


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Factor and summand of a batch norm in eval mode, ``[C]`` each."""
    assert norm.running_mean is not None and norm.running_var is not None
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    return factor, norm.bias - norm.running_mean * factor


class MergedPath(nn.Module):
    """What is left of one task's path.

    Args:
        path: of a module.
        memory: keep the dense kernel of the task's own path (``bank``), or its factors (``on_the_fly``).
        common: bias of the module's common convolution, ``[C]``.
        leave: what follows the nonlinearity: the path's own 1x1 convolution, or one that has the next
            module's in it.
        enters: whether the module's first 1x1 convolution is its own to do.
    """

    def __init__(
        self, path: TaskPath, memory: str, common: Tensor, leave: nn.Conv2d, *, enters: bool
    ) -> None:
        super().__init__()
        self.enter = path.enter if enters else nn.Identity()
        self.router, self.leave = path.router, leave
        alpha, shift = _affine(path.expert_norm)
        kernel, bias = path.own.dense()
        factor, summand = _affine(path.norm)
        dense = memory == "bank"
        buffers = {
            "alpha": alpha, "bias": shift + common, "own_bias": bias,
            "factor": factor[:, None, None], "summand": summand[:, None, None],
            "kernel": kernel if dense else None, "down": None if dense else path.own.down.weight.flatten(1),
            "up": None if dense else path.own.up.weight.flatten(1),
        }  # fmt: skip
        for name, value in buffers.items():
            self.register_buffer(name, None if value is None else value.detach().clone())

    alpha: Tensor
    bias: Tensor
    own_bias: Tensor
    factor: Tensor
    summand: Tensor
    kernel: Tensor | None
    down: Tensor
    up: Tensor

    def own(self) -> Tensor:
        """Dense kernel of the task's own path, ``[C, 9 C]``."""
        return self.up @ self.down if self.kernel is None else self.kernel


class MergedModule(nn.Module):
    """One of the two modules of a level."""

    def __init__(
        self, module: ExpertModule, memory: str, following: ExpertModule | None, *, enters: bool
    ) -> None:
        super().__init__()
        self.bank = Bank(module, memory)
        assert module.common.bias is not None
        self.register_buffer("common", module.common.weight.detach().flatten(1).clone())  # [C, 9 C]
        paths: dict[str, Any] = dict(module.tasks.items())
        nexts: dict[str, Any] = {} if following is None else dict(following.tasks.items())
        leave = {t: _joined(p.leave, nexts[t].enter) if nexts else p.leave for t, p in paths.items()}
        self.tasks = PerTask(
            {t: MergedPath(p, memory, module.common.bias, leave[t], enters=enters) for t, p in paths.items()}
        )

    common: Tensor

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002
        """Stays in eval mode: statistics are folded, and gates are to have no noise."""
        return super().train(mode=False)

    def forward(self, maps: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Maps ``[B, C, h, w]`` of tasks -> theirs, and gates ``[T, B, N]``."""
        paths: list[MergedPath] = [self.tasks[task] for task in maps]  # type: ignore[misc]
        entered = [path.enter(x) for path, x in zip(paths, maps.values(), strict=True)]
        gates, factors = zip(*(p.router(u) for p, u in zip(paths, entered, strict=True)), strict=True)
        kernels, biases = self.mixed(paths, gates, factors)
        summed = convolve_each(torch.cat(entered), kernels, biases)
        found = {
            task: path.leave(F.gelu(torch.addcmul(path.summand, path.factor, v)))
            for task, path, v in zip(maps, paths, summed.chunk(len(paths)), strict=True)
        }
        return found, torch.stack(gates)

    def mixed(
        self, paths: Sequence[MergedPath], gates: Sequence[Tensor], factors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Kernels ``[T B, C, 9 C]`` and biases ``[T B, C]`` of all maps, before the last batch norm."""
        kernels, biases = self.bank(torch.cat([*gates]))
        by_task = len(paths), len(gates[0])
        for number, (path, m) in enumerate(zip(paths, factors, strict=True)):
            # one view each, as autograd lets views that come several at once not be written to
            kernel, bias = kernels.unflatten(0, by_task)[number], biases.unflatten(0, by_task)[number]
            kernel.mul_(path.alpha[:, None]).addcmul_(m[:, None, None], path.own()).add_(self.common)
            bias.mul_(path.alpha).addcmul_(m[:, None], path.own_bias).add_(path.bias)
        return kernels, biases


def _joined(first: nn.Conv2d, second: nn.Conv2d) -> nn.Conv2d:
    """Two 1x1 convolutions as one."""
    joined = nn.Conv2d(first.in_channels, second.out_channels, 1).to(first.weight)
    assert first.bias is not None and second.bias is not None and joined.bias is not None
    weight = second.weight.flatten(1)
    with torch.no_grad():
        joined.weight.copy_((weight @ first.weight.flatten(1))[..., None, None])
        joined.bias.copy_(weight @ first.bias + second.bias)
    return joined
