"""Several processes, by torch.distributed itself: start, sums, and a batch norm that sees the whole batch."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from polytask.errors import ConfigError
from torch.distributed.nn.functional import all_reduce as differentiable_all_reduce


def world() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process, 0 for the one that writes files."""
    return dist.get_rank() if world() > 1 else 0


def start(device: torch.device) -> bool:
    """Join the process group that ``torchrun`` (or SLURM with it) describes in the environment.

    Returns:
        whether this call created the group (then the caller destroys it).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return False
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return True


def total(tensor: Tensor) -> Tensor:
    """Sum of a tensor over all processes (no gradient flows)."""
    if world() == 1:
        return tensor
    summed = tensor.detach().clone()
    dist.all_reduce(summed)
    return summed


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up ``.grad`` over all processes, as one flat exchange.

    Per-task autograd bypasses DDP's hooks, so the step does this itself after the balancer. Losses are
    shares of the global batch's loss, so gradients are summed, not averaged. A parameter that got a
    gradient in no process keeps ``None``.
    """
    if world() == 1:
        return
    owned = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]  # FSDP sums its own
    if not owned:
        return
    device = owned[0].device
    present = total(torch.tensor([p.grad is not None for p in owned], dtype=torch.int32, device=device))
    used = [p for p, flag in zip(owned, present.tolist(), strict=True) if flag]
    if not used:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in used])
    dist.all_reduce(flat)
    for parameter, piece in zip(used, flat.split([p.numel() for p in used]), strict=True):
        parameter.grad = piece.view_as(parameter)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm over all gradients, over all shards where parameters are sharded."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    shards = [g.to_local() for g in gradients if isinstance(g, DTensor)]
    norm = nn.utils.get_total_norm(whole) if whole else torch.zeros((), device=shards[0].device)
    if shards:
        squares = nn.utils.get_total_norm(shards) ** 2
        norm = torch.sqrt(norm**2 + total(squares))
    return norm


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiply gradients by ``factor`` where that shrinks them."""
    gradients = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, factor.clamp(max=1.0))


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics cover the batch of all processes, on CPU as on GPU.

    torch's ``SyncBatchNorm`` refuses CPU tensors. With one process this is the plain layer.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """``[B, C, H, W]`` -> same shape."""
        if not self.training or world() == 1:
            return super().forward(input)
        dims = (0, 2, 3)
        local = torch.cat([input.sum(dims), (input * input).sum(dims), input.new_tensor([input.numel() / input.shape[1]])])
        sums = differentiable_all_reduce(local)
        first, second, count = sums.split([self.num_features, self.num_features, 1])
        mean = first / count
        variance = second / count - mean * mean
        self._track(mean.detach(), variance.detach(), count.detach())
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight
        shift = (self.bias if self.affine else 0) - mean * scale
        return input * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        self.num_batches_tracked += 1  # type: ignore[operator]
        momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)  # type: ignore[arg-type]
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * count / (count - 1), momentum)


def shard(net: nn.Module, blocks: Iterable[str]) -> None:
    """FSDP2: keep each block's parameters sharded over all processes, gathered only while it runs.

    What lies outside the blocks stays replicated. Gradients are summed, as everywhere here.

    Raises:
        ConfigError: without a process group, or nothing to shard.
    """
    names = list(blocks)
    if not dist.is_initialized() or not names:
        raise ConfigError(
            "FSDP needs transformer blocks and a process group", where="run.parallel",
            got=f"{len(names)} blocks", hint="start with torchrun, or use run.parallel=replicated",
        )  # fmt: skip
    for name in names:
        block = fully_shard(net.get_submodule(name))
        block.set_gradient_divide_factor(1.0)
        block.set_force_sum_reduction_for_comms(True)
