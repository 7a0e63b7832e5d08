"""What a model costs: parameters, stored bytes, MACs of what executed, latency, memory."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from polytask import types
from polytask.adapters.base import Mergeable
from polytask.engine.checkpoint import weights_to_save
from polytask.errors import PolytaskWarning
from polytask.model import MultiTaskModel
from polytask.parallel import choose_device
from polytask.recipe import Recipe
from polytask.tasks.base import TaskSet


@dataclass(frozen=True)
class CostReport:
    """Figures of one model on one image (1 MAC = 2 FLOPs).

    Attributes:
        tasks: predicted tasks.
        image_size: height and width.
        total: all parameters.
        trainable: parameters that train.
        trainable_shared: of these, shared by all tasks.
        trainable_per_task: of these, owned by one task.
        adapter: of the trainable ones, in adapter branches.
        decoder: of the trainable ones, in neck and heads.
        stored_bytes: size of the tensors a checkpoint keeps.
        merged_bytes: size of the merged inference model: its parameters and buffers.
        macs_executed: multiply-accumulates of one forward pass, counted while it ran.
        macs_merged: the same for the merged inference model.
        latency_ms: median time of one forward pass of the merged model, None if not measured.
        activation_bytes: bytes autograd keeps for one training image, None if not measured.
        device: where it was measured.
        threads: CPU threads in use.
    """

    tasks: tuple[str, ...]
    image_size: tuple[int, int]
    total: int
    trainable: int
    trainable_shared: int
    trainable_per_task: dict[str, int]
    adapter: int
    decoder: int
    stored_bytes: int
    merged_bytes: int
    macs_executed: int
    macs_merged: int
    latency_ms: float | None
    activation_bytes: int | None
    device: str
    threads: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def cost(
    model: MultiTaskModel,
    tasks: TaskSet,
    image_size: tuple[int, int],
    *,
    repeats: int = 5,
    memory: bool = True,
) -> CostReport:
    """Measure a model.

    Args:
        model: is left as it was.
        tasks: tasks to predict.
        image_size: height and width.
        repeats: timed passes of the merged model; 0 skips the timing.
        memory: also run one training pass to count what autograd keeps.
    """
    device = next(model.parameters()).device
    image = torch.randn(1, 3, *image_size, generator=torch.Generator().manual_seed(0)).to(device)
    names = tuple(tasks)
    part = model.partition()
    trainable = dict(part.trainable())
    branches = branch_parameters(model)
    weights, _ = weights_to_save(model, list(trainable))
    merged = model.merged()
    return CostReport(
        tasks=names,
        image_size=image_size,
        total=sum(p.numel() for p in model.parameters()),
        trainable=types.count(trainable),
        trainable_shared=types.count(part.shared),
        trainable_per_task={task: types.count(p) for task, p in part.per_task.items()},
        adapter=types.count({n: p for n, p in trainable.items() if n in branches}),
        decoder=types.count({n: p for n, p in trainable.items() if not n.startswith("backbone.")}),
        stored_bytes=sum(w.numel() * w.element_size() for w in weights.values()),
        merged_bytes=sum(x.numel() * x.element_size() for x in [*merged.parameters(), *merged.buffers()]),
        macs_executed=count_macs(model, image, names),
        macs_merged=count_macs(merged, image, names),
        latency_ms=latency(merged, image, names, repeats) if repeats else None,
        activation_bytes=saved_activations(model, image, names) if memory else None,
        device=str(device),
        threads=torch.get_num_threads(),
    )


def branch_parameters(model: nn.Module) -> set[str]:
    """Names of what wrappers own besides the ``base`` layer of the original network."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, Mergeable) and path.startswith("backbone.")
        for name, _ in module.named_parameters()
        if not name.startswith("base.")
    }


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """A mode for the time being; every module gets its own back."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def unfused_attention(model: nn.Module) -> Iterator[None]:
    """torch's counter misses fused attention on CPU, so it is switched off while counting."""
    fused = [m for m in model.modules() if getattr(m, "fused_attn", False) is True]
    for module in fused:
        module.fused_attn = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment]


def count_macs(model: nn.Module, image: Tensor, tasks: Sequence[str]) -> int:
    """Multiply-accumulates of the matrix products and convolutions that one forward pass executed."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _flops_in_place})
    with torch.no_grad(), _mode(model, training=False), unfused_attention(model), counter:
        model(image, tasks)
    return int(counter.get_total_flops()) // 2


def _flops_in_place(_: Sequence[int], a: Sequence[int], b: Sequence[int], **__: object) -> int:
    """Of a product added in place, which torch's own table lacks."""
    return 2 * a[0] * a[1] * b[1]


def latency(model: nn.Module, image: Tensor, tasks: Sequence[str], repeats: int) -> float:
    """Median milliseconds of a forward pass, after one warm-up."""
    times = []
    with torch.no_grad(), _mode(model, training=False):
        for _ in range(repeats + 1):
            started = time.perf_counter()
            model(image, tasks)
            if image.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    return 1000 * sorted(times[1:])[repeats // 2]


def saved_activations(model: MultiTaskModel, image: Tensor, tasks: Sequence[str]) -> int:
    """Bytes of distinct storages that autograd keeps between forward and backward, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    buffers = {name: value.clone() for name, value in model.named_buffers()}
    with _mode(model, training=True), torch.random.fork_rng(), saved_tensors_hooks(pack, lambda x: x):
        output = model(torch.cat([image, image]), tasks)  # two: batch norm needs more than one value
    total = sum(seen.values()) // 2
    del output
    with torch.no_grad():
        for name, value in model.named_buffers():
            value.copy_(buffers[name])
    return total


def profile(recipe: Recipe, *, repeats: int = 5) -> CostReport:
    """Cost of a recipe's model; needs neither data nor pretrained weights (they change no figure)."""
    tasks = recipe.task_set()
    backbone = recipe.model.backbone
    plain = recipe.model.model_copy(
        update={"backbone": backbone.model_copy(update={"pretrained": False, "weights": None})}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PolytaskWarning)
        model = plain.build(tasks, recipe.data.image_size)
    if backbone.pretrained or backbone.weights:
        model.backbone.base_digest = "as loaded"
    return cost(model.to(choose_device(recipe.run.device)), tasks, recipe.data.image_size, repeats=repeats)
