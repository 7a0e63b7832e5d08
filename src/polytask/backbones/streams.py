"""Streams: task-owned copies of the token batch that ride through unmodified blocks.

Streams are stream-major in dimension 0, ``[S * B, ...]`` with S = 1 + active tasks; stream 0 is shared.
Norms, activations, residuals, window partitions and attention are batch-wise, so blocks carry streams
without knowing; only wrapped layers look.

Where tasks own layers anywhere, e.g. inside a residual branch, the network runs once per task instead.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from polytask.errors import ConfigError, UnsupportedBackboneError
from polytask.types import Factored, Level, PerTask

Kept = Tensor | Factored


@dataclass(frozen=True)
class StreamPlan:
    """Where streams begin and for whom.

    Attributes:
        fork: ``never``; ``stage_end``: in the last block of each stage, for that stage's features only; or
            ``passes``: a pass of the network per task.
        tasks: tasks that own a stream, in order.
        all_or_none: whether the shared stream depends on every task's stream, so that a subset of the
            tasks cannot run alone.
    """

    fork: Literal["never", "stage_end", "passes"] = "never"
    tasks: tuple[str, ...] = ()
    all_or_none: bool = False


@dataclass
class Streams:
    """What one forward pass carries; shared by the wrapped layers of one backbone.

    Attributes:
        active: tasks with a stream in this pass.
        skip_final_shared: the shared stream is read by nobody after the last block.
        origin: what the forked block that runs right now got, before it was repeated.
        kept: per stage the features that left the trunk, one per active task.
        merged: per stage the shared features after the stage's downsampling.
        task: whose pass runs, if each task has one.
        once: what the first pass left for the others.
        plain: layers must be differentiable twice, which fused operations are not.
    """

    active: tuple[str, ...] = ()
    skip_final_shared: bool = False
    origin: Tensor | None = None
    kept: dict[int, list[Kept]] = field(default_factory=dict)
    merged: dict[int, Level] = field(default_factory=dict)
    task: str = ""
    once: dict[Once, Any] = field(default_factory=dict)
    plain: bool = False

    def begin(self, active: tuple[str, ...], *, skip_final_shared: bool) -> None:
        """Forget the last pass and name the streams of the next one."""
        self.active, self.skip_final_shared = active, skip_final_shared
        self.end()

    def end(self) -> None:
        """Let go of the features, so that nothing outlives the pass."""
        self.kept.clear()
        self.merged.clear()

    def passes(self, call: Callable[[], list[Level]], tasks: Sequence[str]) -> dict[str, list[Level]]:
        """What ``call`` returns in the pass of each task."""
        results, self.once = {}, {}
        try:
            for self.task in tasks:
                results[self.task] = call()
        finally:
            self.task, self.once = "", {}
        return results

    @torch.no_grad()
    def share(self, net: nn.Module, trial: Callable[[], Any]) -> None:
        """Let the largest modules that end before any private layer begins run once; a trial shows which.

        Raises:
            ConfigError: a private layer that the trial does not meet.
        """
        private = [module for module in net.modules() if isinstance(module, Private)]
        calls: Counter[nn.Module] = Counter()
        early: set[nn.Module] = set()

        def note(module: nn.Module, *_: Any) -> None:
            calls[module] += 1
            if not any(layer.is_met for layer in private):
                early.add(module)

        hooks = [module.register_forward_hook(note) for module in net.modules()]
        net.eval()
        trial()
        net.train()
        for hook in hooks:
            hook.remove()
        inside: tuple[str, ...] = ()
        for name, module in net.named_modules():
            if isinstance(module, Private) and not module.is_met:
                raise ConfigError(f"{name!r} takes no part in the features", where="model.adapter.layers")
            taps = any(isinstance(part, MergePoint) for part in module.modules())
            if module in early and calls[module] == 1 and not taps and not name.startswith(inside):
                inside += (f"{name}.",)
                module.forward = Once(module, self)  # keeps all names

    @property
    def count(self) -> int:
        """S, the number of streams."""
        return 1 + len(self.active)

    def repeat(self, x: Tensor) -> Tensor:
        """``[B, ...]`` -> ``[S * B, ...]``, equal streams."""
        if len(x) == 1:  # no copy
            return x.expand(self.count, *x.shape[1:])
        return x.unsqueeze(0).expand(self.count, *x.shape).flatten(0, 1)

    def split(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``[S * B, ...]`` -> the shared stream and the list of task streams, each ``[B, ...]``."""
        shared, *tasks = x.chunk(self.count)
        return shared, tasks


class SharedOnly(nn.Module):
    """Runs a layer on the shared stream alone, for use where all streams are still equal."""

    def __init__(self, layer: nn.Module, streams: Streams) -> None:
        super().__init__()
        self.layer, self.streams = layer, streams

    def forward(self, x: Tensor) -> Tensor:
        """``[S * B, ...]`` -> ``[B, ...]``."""
        origin = self.streams.origin  # rather than a slice of x, whose gradient would be a padded copy
        return self.layer(x if origin is None else origin)  # type: ignore[no-any-return]


class Repeat(nn.Module):
    """Runs a layer on the shared stream and hands its output to all streams."""

    def __init__(self, layer: nn.Module, streams: Streams) -> None:
        super().__init__()
        self.layer, self.streams = layer, streams

    def forward(self, x: Tensor) -> Tensor:
        """``[B, ...]`` -> ``[S * B, ...]``."""
        return self.streams.repeat(self.layer(x))


class Fork(nn.Module):
    """Runs the last block of a stage on all streams.

    The task streams end here, as the features of this stage, unless ``carry``: then they go on through
    the next stage's downsampling and end at its ``MergePoint``. Only the shared stream walks on.
    """

    def __init__(
        self, block: nn.Module, streams: Streams, *, stage: int, carry: bool, recompute: bool
    ) -> None:
        super().__init__()
        self.block, self.streams = block, streams
        self.stage, self.carry, self.recompute = stage, carry, recompute
        mlp = getattr(block, "mlp", None)
        if recompute and type(mlp) is Mlp and isinstance(mlp.norm, nn.Identity):  # treats every token alone
            mlp.forward = InPieces(mlp, streams)  # type: ignore[method-assign]  # keeps all names

    def forward(self, x: Tensor, *extra: Any, **options: Any) -> Tensor:
        """Tokens of the shared stream ``[B, ...]`` -> the same, or ``[S * B, ...]`` with ``carry``.

        What else the network hands its blocks (position embeddings, an attention mask) goes on.
        """
        streams = self.streams
        now = (streams.active, streams.skip_final_shared)  # a recomputation may come after the next pass
        if self.recompute and torch.is_grad_enabled():
            y: Tensor = checkpoint(self._run, now, x, *extra, use_reentrant=False, **options)
        else:
            y = self._run(now, x, *extra, **options)
        if self.carry or not streams.active:
            return y
        shared, tasks = streams.split(y)
        streams.kept[self.stage] = list(tasks)
        return shared

    def _run(self, now: tuple[tuple[str, ...], bool], x: Tensor, *extra: Any, **options: Any) -> Tensor:
        streams = self.streams
        if not now[0]:
            return self.block(x, *extra, **options)  # type: ignore[no-any-return]
        before = (streams.active, streams.skip_final_shared)
        try:
            streams.active, streams.skip_final_shared = now
            streams.origin = x
            mask = options.get("attn_mask")
            if isinstance(mask, Tensor) and len(mask) == len(x):  # one per sample
                options["attn_mask"] = streams.repeat(mask)
            y: Tensor = self.block(streams.repeat(x), *extra, **options)
        finally:
            streams.origin = None
            streams.active, streams.skip_final_shared = before
        return y


class InPieces:
    """``forward`` of a recomputed block's MLP, its widest part: an eighth of the tokens at a time."""

    def __init__(self, mlp: nn.Module, streams: Streams) -> None:
        self.mlp, self.streams = mlp, streams

    def __call__(self, x: Tensor) -> Tensor:
        """``[S * B, L, C]`` -> the same."""
        if not torch.is_grad_enabled():
            return type(self.mlp).forward(self.mlp, x)  # type: ignore[no-any-return]
        now = (self.streams.active, self.streams.skip_final_shared)
        pieces = x.chunk(8, 1)
        return torch.cat([checkpoint(self._run, now, piece, use_reentrant=False) for piece in pieces], 1)

    def _run(self, now: tuple[tuple[str, ...], bool], x: Tensor) -> Tensor:
        streams = self.streams
        before = (streams.active, streams.skip_final_shared)
        try:
            streams.active, streams.skip_final_shared = now
            y: Tensor = type(self.mlp).forward(self.mlp, x)
        finally:
            streams.active, streams.skip_final_shared = before
        return y


class MergePoint(nn.Module):
    """Wraps the linear map of a stage's downsampling, where features "after merge" are taken.

    The shared stream goes through; task streams end here, with the map still pending (``Factored``), so
    that a neck which starts with its own linear map composes the two matrices.
    """

    def __init__(self, layer: nn.Module, streams: Streams, *, stage: int) -> None:
        super().__init__()
        self.layer, self.streams, self.stage = layer, streams, stage

    def forward(self, x: Tensor) -> Tensor:
        """Merged tokens ``[S * B, H, W, C_in]`` -> ``[B, H, W, C]``."""
        shared_in, task_ins = self.streams.split(x)
        weight = composable_weight(self.layer)
        if task_ins and weight is None:
            shared, tasks = self.streams.split(self.layer(x))
            self.streams.kept[self.stage] = list(tasks)
        else:
            shared = self.layer(shared_in)
            if weight is not None:
                self.streams.kept[self.stage] = [Factored(task, weight) for task in task_ins]
        self.streams.merged[self.stage] = shared.permute(0, 3, 1, 2)
        return shared


def composable_weight(layer: nn.Module) -> Tensor | None:
    """The matrix of a layer that acts as one bias-free linear map right now, else None."""
    if isinstance(layer, nn.Linear):
        return layer.weight if layer.bias is None else None
    return layer.linear_weight() if isinstance(layer, LinearMap) else None


class Factors(NamedTuple):
    """A low-rank change of a matrix, ``s B A`` with A ``[r, in]`` and B ``[out, r]``."""

    A: Tensor
    B: Tensor
    scale: float


class LinearMap(nn.Module):
    """A wrapped linear layer that can say which single matrix it currently amounts to."""

    @property
    def weight(self) -> Tensor:
        """Refused: a network that reads it would compute past the branches."""
        raise UnsupportedBackboneError(
            "the network reads `.weight` of an adapted layer and would bypass the adapter",
            hint="use a backbone that calls its linear layers, e.g. Swin, ViT or DeiT3",
        )

    def factors(self, task: str | None = None) -> Factors | None:  # noqa: ARG002
        """What a task (None: every task) adds to the original matrix, if that is all the wrapper does."""
        return None

    def linear_weight(self) -> Tensor | None:
        """``[C, C_in]`` if the layer acts as one bias-free linear map right now, else None."""
        return None


def select(names: Sequence[str], plan: StreamPlan) -> tuple[str, ...]:
    """The tasks whose streams must run so that ``names`` can be answered."""
    wanted = tuple(task for task in plan.tasks if task in names)
    return plan.tasks if wanted and plan.all_or_none else wanted


class Private(nn.Module):
    """A layer of which every task has a copy; it is that of the task whose pass runs."""

    def __init__(self, layer: nn.Module, streams: Streams, tasks: Sequence[str]) -> None:
        super().__init__()
        self.streams, self.is_met = streams, False
        self.tasks = PerTask({task: copy.deepcopy(layer) for task in tasks})

    def __getattr__(self, name: str) -> Any:
        """Networks that read e.g. ``.weight`` of a layer get that of the task."""
        if name == "tasks" or name.startswith("_") or not self.streams.task:
            return super().__getattr__(name)
        self.is_met = True
        return getattr(self.tasks[self.streams.task], name)

    def forward(self, *args: Any, **options: Any) -> Any:
        """As the task's copy."""
        self.is_met = True
        return self.tasks[self.streams.task](*args, **options)


class Once:
    """``forward`` of a module that computes in the first pass and hands out copies in the others."""

    def __init__(self, module: nn.Module, streams: Streams) -> None:
        self.module, self.streams = module, streams

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The same in all passes of one run."""
        once = self.streams.once
        if self in once:
            return tree_map_only(Tensor, Tensor.clone, once[self])
        y = type(self.module).forward(self.module, *args, **options)
        once[self] = tree_map_only(Tensor, Tensor.clone, y)  # copies, as what follows may work in place
        return y
