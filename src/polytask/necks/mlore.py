"""A decoder of low-rank experts, of which a router chooses per image and task.

Yang et al.: "Multi-Task Dense Prediction via Mixture of Low-Rank Experts", CVPR 2024. At each level two
modules map features to those of every task. A module adds a dense 3x3 convolution that all tasks share (on
features without gradient), low-rank 3x3 convolutions that all tasks share too, each weighted by a gate, and a
low-rank one of the task's own. As gates are the same everywhere in an image, the weighted experts are one
convolution whose kernel is mixed from dense ones: so they are run here, in training (where dense kernels are
made once a step) and in inference (see ``merged_experts``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.adapters.base import Mergeable, fold_batch_norms
from polytask.config import register
from polytask.errors import ConfigError
from polytask.necks.base import Levels, Neck, NeckSpec, Size
from polytask.necks.merged_experts import MergedModule
from polytask.necks.routing import Gates, Router, mixed_convolution, to_grid
from polytask.parallel import BatchNorm2d
from polytask.types import Drainable, PerTask, Pyramids, materialize

Rank = Annotated[int, Field(ge=1)]


@register("neck")
class MLoRE(NeckSpec):
    """Mixture of low-rank experts (Yang et al., CVPR 2024); the head `upsampled` belongs to it.

    Levels of different sizes are brought to one grid. ``gates`` says which comes first, the softmax over all
    experts or the choice of the best ones. Checkpoints do not tell, so there is no default: published models
    of PASCAL-Context have ``softmax_first``, that of NYUD-v2 ``top_first``.
    """

    type: Literal["mlore"] = "mlore"
    gates: Gates
    width: int = Field(default=192, ge=4, multiple_of=4, description="channels of the task features")
    ranks: tuple[Rank, ...] = Field(
        default=(8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 64), min_length=2,
        description="rank of each expert",
    )  # fmt: skip
    task_rank: Rank = Field(default=32, description="rank of each task's own path")
    chosen: int = Field(default=9, ge=1, description="experts that act on an image")
    stride: int | None = Field(
        default=None, ge=1, description="of the grid; default: that of the levels, or 16 where they differ"
    )
    any_size: bool = Field(
        default=False, description="take images of other sizes, by resizing the router's map of the grid"
    )
    memory: Literal["bank", "on_the_fly"] = Field(
        default="bank",
        description="merged: keep all dense kernels, or make them from the factors in each pass",
    )

    PENALTIES: ClassVar[tuple[str, ...]] = ("expert_balance",)
    EXPERTS: ClassVar[bool] = True

    def build(self, levels: Levels, tasks: Sequence[str]) -> ExpertNeck:
        """Raises ConfigError for other than four levels, or more chosen experts than there are."""
        channels, strides, image_size = levels
        if len(channels) != 4:
            what, hint = "the neck takes four levels", "set model.backbone.out_indices"
            raise ConfigError(what, where="model.neck", got=len(channels), hint=hint)
        if self.chosen > len(self.ranks):
            expected = f"at most the {len(self.ranks)} of `ranks`"
            raise ConfigError("more experts than there are", where="model.neck.chosen", got=self.chosen,
                              expected=expected)  # fmt: skip
        stride = self.stride or (strides[0] if len(set(strides)) == 1 else 16)
        if any(size % stride for size in image_size):
            what, got = f"the grid of stride {stride} does not cover it", f"{image_size[0]}x{image_size[1]}"
            expected = f"multiples of {stride}"
            raise ConfigError(what, where="data.image_size", got=got, expected=expected)
        sizes = [(image_size[0] // s, image_size[1] // s) for s in (stride, strides[0])]
        return ExpertNeck(self, channels, tasks, *sizes)


class LowRank(nn.Module):
    """A 3x3 convolution to ``rank`` channels and a 1x1 convolution back."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, rank, 3, padding=1), nn.Conv2d(rank, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, h, w]`` -> the same shape."""
        y: Tensor = self.up(self.down(x))
        return y

    def dense(self) -> tuple[Tensor, Tensor]:
        """Weight ``[C, 9 C]`` and bias ``[C]`` of the same map as one 3x3 convolution."""
        up = self.up.weight.flatten(1)
        assert self.down.bias is not None and self.up.bias is not None
        return up @ self.down.weight.flatten(1), self.up.bias + up @ self.down.bias


class Experts(nn.ModuleList):
    """Low-rank convolutions that all tasks of a module share."""

    def __init__(self, width: int, ranks: Sequence[int]) -> None:
        super().__init__(LowRank(width, rank) for rank in ranks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # weights: Kaiming-uniform already

    def dense(self) -> tuple[Tensor, Tensor]:
        """Kernels ``[N, C, 9 C]`` and biases ``[N, C]``."""
        kernels, biases = zip(*(expert.dense() for expert in self), strict=True)  # type: ignore[operator]
        return torch.stack(kernels), torch.stack(biases)


class TaskPath(nn.Module):
    """What a module has per task."""

    def __init__(self, spec: MLoRE, grid: Size) -> None:
        super().__init__()
        width = spec.width
        self.enter, self.leave = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.router = Router(width, len(spec.ranks), spec.chosen, spec.gates, grid)
        self.own = LowRank(width, spec.task_rank)
        self.expert_norm, self.norm = BatchNorm2d(width), BatchNorm2d(width)


class ExpertModule(nn.Module):
    """One of the two modules of a level."""

    def __init__(self, spec: MLoRE, tasks: Sequence[str], grid: Size) -> None:
        super().__init__()
        self.experts = Experts(spec.width, spec.ranks)
        self.common = nn.Conv2d(spec.width, spec.width, 3, padding=1)
        self.tasks = PerTask({task: TaskPath(spec, grid) for task in tasks})

    def forward(self, maps: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Maps ``[B, C, h, w]`` of tasks -> theirs, and gates ``[T, B, N]``."""
        paths: list[TaskPath] = [self.tasks[task] for task in maps]  # type: ignore[misc]
        entered = [p.enter(x) for p, x in zip(paths, maps.values(), strict=True)]
        gates, factors = zip(*(p.router(u) for p, u in zip(paths, entered, strict=True)), strict=True)
        flat = torch.cat(entered)  # [T B, C, h, w]
        kernels, biases = self.experts.dense()
        summed = mixed_convolution(flat, torch.cat(gates), kernels, biases).chunk(len(paths))
        common = self.common(flat.detach()).chunk(len(paths))
        found = {}
        for number, (task, path) in enumerate(zip(maps, paths, strict=True)):
            own = factors[number][:, None, None, None] * path.own(entered[number])
            together = path.expert_norm(summed[number]) + own + common[number]
            found[task] = path.leave(F.gelu(path.norm(together)))
        return found, torch.stack(gates)


class LevelMix(nn.Sequential):
    """Weights of the four levels at each place, and their weighted sum."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Conv2d(4 * width, width, 1), BatchNorm2d(width), nn.GELU(), nn.Conv2d(width, 4, 3, padding=1)
        )

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Four ``[B, C, h, w]`` -> one."""
        x = torch.cat([*levels], 1)
        for layer in self:
            x = layer(x)
        mixed: Tensor = (x.softmax(1)[:, :, None] * torch.stack([*levels], 1)).sum(1)
        return mixed


class ExpertNeck(Neck, Drainable, Mergeable):
    """See ``MLoRE``. Leaves the penalty ``expert_balance``."""

    def __init__(
        self, spec: MLoRE, channels: Sequence[int], tasks: Sequence[str], grid: Size, finest: Size
    ) -> None:
        super().__init__()
        self.spec, self.channels, self.grid, self.finest = spec, spec.width, grid, finest
        self._gates: dict[str, Tensor] = {}  # of the last pass, by task ``[8, N]``
        self.projections = nn.ModuleList(nn.Conv2d(c, spec.width, 1) for c in channels)
        first, second = (nn.ModuleList(ExpertModule(spec, tasks, grid) for _ in channels) for _ in range(2))
        self.first, self.second = first, second
        self.mix = PerTask({task: LevelMix(spec.width) for task in tasks})

    def forward(self, pyramids: Pyramids, tasks: Sequence[str]) -> dict[str, Tensor]:
        """Pyramids -> ``[B, C, h, w]`` per task on the grid.

        Raises:
            ConfigError: an image of another size, without ``any_size``.
        """
        if not tasks:
            return {}
        levels: dict[str, list[Tensor]] = {task: [] for task in tasks}
        gates: list[Tensor] = []
        for number, maps in enumerate(self._projected(pyramids, tasks)):
            for modules in (self.first, self.second):
                maps, chosen = modules[number](maps)
                gates.append(chosen)
            for task, found in maps.items():
                levels[task].append(found)
        self._record(gates, tasks)
        return {task: self.mix[task](found) for task, found in levels.items()}

    def _projected(self, pyramids: Pyramids, tasks: Sequence[str]) -> list[dict[str, Tensor]]:
        """Per level the map of each task; tasks with the same pyramid have the same."""
        found = []
        grid = self._grid(materialize(pyramids.of(tasks[0])[0]))
        for number, convolution in enumerate(self.projections):
            own = {id(level): level for level in (pyramids.of(task)[number] for task in tasks)}
            made = {key: _project(materialize(level), convolution, grid) for key, level in own.items()}
            found.append({task: made[id(pyramids.of(task)[number])] for task in tasks})
        return found

    def _grid(self, level: Tensor) -> Size:
        """Of an image whose finest level this is."""
        if level.shape[-2:] == self.finest:
            return self.grid
        if not self.spec.any_size:
            what, hint = "the routers were made for another image size", "set model.neck.any_size=true"
            got, expected = (f"{h}x{w}" for h, w in (level.shape[-2:], self.finest))
            raise ConfigError(what, where="model.neck", got=got, hint=hint,
                              expected=f"a finest level of {expected}")  # fmt: skip
        height, width = (
            max(1, g * n // f) for g, n, f in zip(self.grid, level.shape[-2:], self.finest, strict=True)
        )
        return height, width

    def _record(self, gates: Sequence[Tensor], tasks: Sequence[str]) -> None:
        """Penalty: squared coefficients of variation of the experts' importance, summed over modules."""
        importance = torch.stack([g.mean((0, 1)) for g in gates])  # [8, N]
        self.recorded_penalties["expert_balance"] = (importance.var(1) / importance.mean(1).square()).sum()
        by_task = torch.stack([g.detach().mean(1) for g in gates], 1)  # [T, 8, N]
        self._gates = dict(zip(tasks, by_task, strict=True))

    def usage(self) -> dict[str, dict[str, Tensor]]:
        """Mean gates of the last forward pass, by module and task ``[N]``."""
        names = [f"level {level + 1}, module {module + 1}" for level in range(4) for module in range(2)]
        return {name: {t: gates[k] for t, gates in self._gates.items()} for k, name in enumerate(names)}

    def merged(self) -> ExpertNeck:
        """The same with one convolution per image, task and module, batch norms folded."""
        memory = self.spec.memory
        if isinstance(self.first[0], MergedModule):
            return self
        with torch.no_grad():
            for number, (one, two) in enumerate(zip(self.first, self.second, strict=True)):
                self.first[number] = MergedModule(one, memory, two, enters=True)  # type: ignore[arg-type]
                self.second[number] = MergedModule(two, memory, None, enters=False)  # type: ignore[arg-type]
            for mix in self.mix.values():
                fold_batch_norms(mix)
        return self


def _project(level: Tensor, convolution: nn.Module, grid: Size) -> Tensor:
    """On the smaller of the two grids."""
    if level.shape[-2] > grid[0]:
        return convolution(to_grid(level, grid))  # type: ignore[no-any-return]
    return to_grid(convolution(level), grid)
