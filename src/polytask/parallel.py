"""Several processes, by torch.distributed itself: start, sums, and a batch norm that sees the whole batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import fully_shard
from torch.distributed.nn.functional import all_reduce as differentiable_all_reduce
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor

from polytask.errors import ConfigError, PolytaskError


def world() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process, 0 for the one that writes files."""
    return dist.get_rank() if world() > 1 else 0


def choose_device(name: str) -> torch.device:
    """The device of this process; ``auto`` takes CUDA if there is any.

    Raises:
        ConfigError: a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"no such device ({reason})", where="run.device", got=name) from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            "this kind of device is not supported", where="run.device", got=name, expected="auto, cpu or cuda"
        )
    if device.type == "cuda":
        index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", "0"))
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise ConfigError("no such CUDA device", where="run.device", got=name, hint="use run.device=cpu")
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return device


def is_first() -> bool:
    """Whether this is the process that talks, also before the group is made and after it has gone."""
    return int(os.environ.get("RANK", "0")) == 0


def start(device: torch.device) -> bool:
    """Join the process group that ``torchrun`` (or SLURM with it) describes in the environment.

    Returns:
        whether this call created the group (then the caller destroys it).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return False
    store, index, size = next(rendezvous("env://"))
    # torchrun keeps one store over its restarts: without a name of its own, a new group would read
    # the addresses of the dead one
    attempt = PrefixStore(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{size}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # counts of metrics stay on the CPU
    dist.init_process_group(backend, store=attempt, rank=index, world_size=size)
    return True


def first(action: Callable[[], None]) -> None:
    """Run an action in the first process while the others wait; what it refuses, all of them raise."""
    problem: list[PolytaskError | None] = [None]
    if rank() == 0:
        try:
            action()
        except PolytaskError as error:
            problem = [error]
    if world() > 1:
        dist.broadcast_object_list(problem)
    if problem[0] is not None:
        raise problem[0]


def total(tensor: Tensor) -> Tensor:
    """Sum of a tensor over all processes (no gradient flows)."""
    if world() == 1:
        return tensor
    summed = tensor.detach().clone()
    dist.all_reduce(summed)
    return summed


def differentiable_totals(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sums of tensors over all processes, as one exchange through which gradients flow."""
    if world() == 1:
        return list(tensors)
    flat: Tensor = differentiable_all_reduce(  # type: ignore[no-untyped-call]
        torch.cat([tensor.reshape(-1) for tensor in tensors])
    )
    pieces = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]


def gather(rows: Tensor) -> Tensor:
    """Rows of all processes below each other, in the order of the processes; their numbers may differ."""
    if world() == 1:
        return rows
    parts = [rows] * world()
    dist.all_gather_object(parts, rows)
    return torch.cat(parts)


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
    for parameter, piece in zip(used, torch.split(flat, [p.numel() for p in used]), strict=True):
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
    gradients = [
        p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.grad is not None
    ]
    if gradients:
        torch._foreach_mul_(gradients, factor.clamp(max=1.0))


def finite(gradient: Tensor) -> bool:
    """Whether all values, of this process's shard if it is sharded, are finite."""
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return bool(torch.isfinite(local).all())


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics cover the batch of all processes, on CPU as on GPU.

    torch's ``SyncBatchNorm`` refuses CPU tensors. With one process this is the plain layer.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``[B, C, H, W]`` -> same shape."""
        if not self.training or world() == 1:
            return super().forward(input)
        wide = input.float()  # sums over many pixels do not fit the precision of bfloat16
        mean, variance, count = _moments(wide)
        self._track(mean.detach(), variance.detach(), count.detach())
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight
        normed = (wide - mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1)
        if self.affine:
            normed = normed + self.bias.view(1, -1, 1, 1)
        return normed.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if not self.track_running_stats or self.num_batches_tracked is None:
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * count / (count - 1), momentum)


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Batch norms use the statistics of the batch and do not add them to their running ones."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracking = [norm.track_running_stats for norm in norms]
    try:
        for norm in norms:
            norm.track_running_stats = norm.track_running_stats and not norm.training
        yield
    finally:
        for norm, tracked in zip(norms, tracking, strict=True):
            norm.track_running_stats = tracked


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance per channel and the number of values, over all processes, in one exchange.

    Each process fills its own row of ``[world, 2 C + 1]`` with its mean, its squared deviations and its
    count; the rows are then combined (Chan, Golub, LeVeque 1983), so that nothing cancels.
    """
    dims = (0, 2, 3)
    own = x.mean(dims)
    deviations = (x - own.view(1, -1, 1, 1)).square().sum(dims)
    row = torch.cat([own, deviations, own.new_tensor([x.numel() / x.shape[1]])])
    above, below = row.new_zeros(rank(), len(row)), row.new_zeros(world() - rank() - 1, len(row))
    rows: Tensor = differentiable_all_reduce(  # type: ignore[no-untyped-call]
        torch.cat([above, row[None], below])
    )
    means, squares, counts = torch.split(rows, [len(own), len(own), 1], dim=1)
    count = counts.sum()
    mean = (means * counts).sum(0) / count
    return mean, (squares + counts * (means - mean).square()).sum(0) / count, count


def shard(net: nn.Module, blocks: Iterable[str], device: torch.device) -> None:
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
    mesh = init_device_mesh(device.type, (world(),))
    for name in names:
        block = fully_shard(net.get_submodule(name), mesh=mesh, reshard_after_forward=True)
        block.set_gradient_divide_factor(1.0)
        block.set_force_sum_reduction_for_comms(True)


def full(value: Tensor) -> Tensor:
    """The whole tensor, gathered if it is sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def put(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    target.copy_(like(target, value))


def like(target: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, sharded if ``target`` of the same shape is."""
    if isinstance(target, DTensor) and value.shape == target.shape:
        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    return value
