"""Any timm network as a backbone: features, wrappable sites, feature points and weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from polytask.backbones.layouts import normed, read_layout, to_map
from polytask.backbones.networks import create, digest
from polytask.backbones.streams import Fork, MergePoint, Repeat, SharedOnly, StreamPlan, Streams, select
from polytask.backbones.swin import quicken
from polytask.config import Location, Spec
from polytask.errors import ConfigError, UnsupportedBackboneError
from polytask.types import Level, Pyramids, Site, materialize

ROLES = {"attn.qkv": "qkv", "attn.proj": "proj", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}
# Blocks written `x + f(attn(norm1(x)))` whose attention takes its batch size from the normed input, so
# that one stream can be attended and all streams leave `proj`. Others attend every (equal) stream.
_NARROW_BLOCKS = ("timm.models.swin_transformer.SwinTransformerBlock", "timm.models.vision_transformer.Block")


class BackboneSpec(Spec):
    """A timm network.

    ``options`` go to ``timm.create_model`` as they are (``window_size``, ``drop_path_rate``, ``depths``…).
    """

    name: str = Field(description="timm model name, see `polytask list backbones`")
    pretrained: bool = Field(default=False, description="load timm's published weights (hub or local cache)")
    weights: Location | None = Field(
        default=None, description="local weight file in any layout timm's filter reads"
    )
    options: dict[str, Any] = Field(default_factory=dict)
    out_indices: tuple[int, ...] | None = Field(default=None, description="feature levels; default: four")
    feature_point: Literal["before_merge", "after_merge"] = "before_merge"
    final_norm: bool = Field(default=False, description="the network's last norm, on the last level only")
    recompute: tuple[int, ...] = Field(
        default=(), description="stages whose forked block is recomputed in the backward pass, to save memory"
    )

    def build(self, image_size: tuple[int, int]) -> Backbone:
        """The network for ``[B, 3, H, W]`` images of this size.

        Raises:
            ConfigError: unknown name or an option or image size the network cannot take.
            CheckpointError: weights missing, unreachable or of another network.
        """
        if self.pretrained and self.weights:
            raise ConfigError("`pretrained` and `weights` exclude each other", where="model.backbone")
        net = create(self, image_size)
        return Backbone(net, self, image_size)


class Backbone(nn.Module):
    """A timm network that reports its sites and returns pyramids.

    Attributes:
        channels: channels of each level, fine to coarse.
        strides: image size over level size, per level.
    """

    def __init__(self, net: nn.Module, spec: BackboneSpec, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.net, self.image_size = net, image_size
        self.feature_point = spec.feature_point
        self.recompute = spec.recompute
        self.indices = _levels(net, spec)
        self.base_digest = digest(net) if spec.pretrained or spec.weights else None
        """Hash of the loaded weights, or None for a random start."""
        info: list[dict[str, Any]] = [net.feature_info[i] for i in self.indices]  # type: ignore[index,misc]
        self._stage_modules: list[str] = [level["module"] for level in info]
        levels: list[tuple[int, int]] = [(level["num_chs"], level["reduction"]) for level in info]
        self.streams, self.plan = Streams(), StreamPlan()
        self._layouts: dict[int, str] = {}  # of forked blocks, read in the first pass with streams
        self.own_streams_only = False
        """Whether readers of the pyramids never look at the shared one when they asked for a stream."""
        if self.feature_point == "after_merge":
            self._tap_merges()
            levels = [*levels[1:], levels[-1]]
        self.channels = tuple(c for c, _ in levels)
        self.strides = tuple(s for _, s in levels)
        self.final_norm = _prune(net, self.indices, keep_norm=spec.final_norm)
        quicken(net)

    # --- structure -------------------------------------------------------------------------------

    def blocks(self) -> list[tuple[str, int, int]]:
        """``(module path, stage, index in stage)`` of all blocks, in execution order."""
        names = [name for name, _ in self.net.named_modules()]
        ends = [
            max((i for i, n in enumerate(names) if f"{n}.".startswith(f"{m}.")), default=-1)
            for m in self._stage_modules
        ]
        if -1 in ends:
            raise UnsupportedBackboneError(
                f"its feature levels are not modules of the network ({self._stage_modules[ends.index(-1)]})",
                where=f"backbone {type(self.net).__name__}",
                hint="use e.g. a Swin, ViT or DeiT3, or train without an adapter",
            )  # fmt: skip
        found: list[tuple[str, int, int]] = []
        for position, name in enumerate(names):
            module = self.net.get_submodule(name)
            if "mlp" not in dict(module.named_children()) or any(
                name.startswith(f"{b}.") for b, _, _ in found
            ):
                continue
            stage = next((k for k, end in enumerate(ends) if position <= end), None)
            if stage is not None:
                found.append((name, stage, sum(s == stage for _, s, _ in found)))
        return found

    def sites(self) -> Iterator[Site]:
        """Wrappable layers in execution order.

        Raises:
            UnsupportedBackboneError: if blocks lack the children that adapters wrap.
        """
        blocks = self.blocks()
        if not blocks:
            raise UnsupportedBackboneError(
                "adapters need transformer blocks with attn.qkv, attn.proj, mlp.fc1 and mlp.fc2; "
                "it has no such block",
                where=f"backbone {type(self.net).__name__}",
                hint="use e.g. a Swin, ViT or DeiT3, or train without an adapter",
            )
        last_stage = len(self._stage_modules) - 1
        for number, (name, stage, index) in enumerate(blocks):
            is_end = number + 1 == len(blocks) or blocks[number + 1][1] != stage
            if index == 0 and (reduction := self._reduction(stage)):
                yield Site(name=reduction, stage=stage - 1, block=-1, role="reduction", is_stage_end=False)
            block = self.net.get_submodule(name)
            for path, role in ROLES.items():
                self._require(block, name, path)
                yield Site(
                    name=f"{name}.{path}", stage=stage, block=index, role=role, is_stage_end=is_end,
                    is_last=is_end and stage == last_stage,
                )  # fmt: skip

    def _require(self, block: nn.Module, name: str, path: str) -> None:
        try:
            layer = block.get_submodule(path)
        except AttributeError:
            layer = None
        if not isinstance(layer, nn.Linear):
            found = (
                f"has no layer {path}"
                if layer is None
                else f"has a {type(layer).__name__} as {path}, not a linear layer"
            )
            raise UnsupportedBackboneError(
                f"block {name} ({type(block).__name__}) {found}",
                where=f"backbone {type(self.net).__name__}",
                expected="attn.qkv, attn.proj, mlp.fc1 and mlp.fc2 in every block (adapters)",
                hint="use e.g. a Swin, ViT or DeiT3, or train without an adapter",
            )

    def _reduction(self, stage: int) -> str | None:
        """Path of the linear map that leads from the previous stage into this one, if there is one."""
        path = f"{self._stage_modules[stage]}.downsample.reduction"
        try:
            module = self.net.get_submodule(path)
        except AttributeError:
            return None
        if isinstance(module, MergePoint):
            return f"{path}.layer"
        return path if isinstance(module, nn.Linear) else None

    def replace(self, name: str, module: nn.Module) -> None:
        """Put a module at a dotted path of the net."""
        self.net.set_submodule(name, module)

    def _tap_merges(self) -> None:
        for stage in range(1, len(self._stage_modules)):
            path = self._reduction(stage)
            if path is None:
                raise UnsupportedBackboneError(
                    "`feature_point: after_merge` needs stages that begin with downsample.reduction",
                    where=f"backbone {type(self.net).__name__}, stage {stage}",
                    hint="use a Swin, or feature_point: before_merge",
                )
            if self.indices[stage] != self.indices[stage - 1] + 1:
                raise ConfigError(
                    "`feature_point: after_merge` needs levels without a gap",
                    where="model.backbone.out_indices", got=self.indices,
                )  # fmt: skip
            layer = self.net.get_submodule(path)
            self.replace(path, MergePoint(layer, self.streams, stage=stage - 1))

    def fork(self, plan: StreamPlan, task_aware: frozenset[str]) -> None:
        """Install the streams of a plan; ``task_aware`` holds the roles whose layers widen to all streams.

        Raises:
            UnsupportedBackboneError: see ``check_fork``.
        """
        self.check_fork(plan)
        self.plan = plan
        if plan.fork == "passes":
            image = torch.zeros(1, 3, *self.image_size)
            self.streams.share(self.net, lambda: self.forward(image, plan.tasks[:1]))
        if plan.fork != "stage_end":
            return
        last_stage = len(self._stage_modules) - 1
        for stage, name in self._last_blocks().items():
            block = self.net.get_submodule(name)
            if is_narrow(block):
                block.norm1 = SharedOnly(block.norm1, self.streams)  # type: ignore[arg-type]
                if "proj" not in task_aware:
                    block.attn.proj = Repeat(block.attn.proj, self.streams)  # type: ignore[union-attr,arg-type]
            carry = self.feature_point == "after_merge" and stage != last_stage
            fork = Fork(block, self.streams, stage=stage, carry=carry, recompute=stage in self.recompute)
            self.replace(name, fork)

    def check_recompute(self) -> None:
        """Raise ConfigError where ``recompute`` names a stage without a forked block: it would do nothing."""
        stages = range(len(self._stage_modules)) if self.plan.fork == "stage_end" else range(0)
        wrong = [stage for stage in self.recompute if stage not in stages]
        if wrong:
            expected = f"stages from 0 to {len(stages) - 1}" if stages else "an adapter with task streams"
            where = "model.backbone.recompute"
            raise ConfigError("nothing to recompute there", where=where, got=wrong, expected=expected)

    def _last_blocks(self) -> dict[int, str]:
        return {stage: name for name, stage, _ in self.blocks()}

    def check_fork(self, plan: StreamPlan) -> None:
        """Refuse what ``fork`` would refuse, before anything changes.

        Raises:
            UnsupportedBackboneError: a stage without a block, or a forked block that mixes the batch.
        """
        if plan.fork != "stage_end":
            return
        last = self._last_blocks()
        without = [module for stage, module in enumerate(self._stage_modules) if stage not in last]
        if without:
            raise UnsupportedBackboneError(
                "task streams need a transformer block in every feature level; "
                f"there is none in {without[0]}",
                where=f"backbone {type(self.net).__name__}",
                hint="choose other levels in model.backbone.out_indices",
            )  # fmt: skip
        for name in last.values():
            _refuse_batch_mixing(self.net.get_submodule(name), name)

    # --- forward ---------------------------------------------------------------------------------

    def forward(self, image: Tensor, tasks: Sequence[str] = ()) -> Pyramids:
        """``[B, 3, H, W]`` -> pyramids; streams run for those of ``tasks`` that own one.

        Raises:
            ConfigError: if the image has a size the network cannot take.
        """
        active = select(tasks, self.plan)
        if self.plan.fork == "passes" and not self.streams.task:
            return Pyramids([], self.streams.passes(lambda: self.forward(image).shared, active))
        self.streams.begin(active, skip_final_shared=self.own_streams_only and set(tasks) <= set(active))
        merged = self.feature_point == "after_merge"
        indices = [self.indices[-1]] if merged else list(self.indices)
        left: dict[int, Tensor] = {}
        hooks = self._listen(left) if active and not self._layouts else []
        try:
            maps: list[Tensor] = self.net.forward_intermediates(  # type: ignore[operator]
                image, indices=indices, intermediates_only=True, output_fmt="NCHW"
            )
        except AssertionError as error:
            what = f"the backbone cannot take this image ({error})"
            hint = "a ViT takes other sizes with dynamic_img_size: true in model.backbone.options"
            raise ConfigError(what, got=tuple(image.shape), where="image size", hint=hint) from None
        finally:
            for hook in hooks:
                hook.remove()
        last = len(self.indices) - 1
        shared: list[Level] = (
            [*(self.streams.merged[i] for i in range(last)), maps[-1]] if merged else list(maps)
        )
        for stage, tokens in left.items():
            self._layouts[stage] = read_layout(
                tokens, materialize(shared[stage]), self.net, self._stage_modules[stage]
            )
        per_task: dict[str, list[Level]] = {}
        for number, task in enumerate(self.streams.active):
            kept = [self.streams.kept[stage][number] for stage in range(last + 1)]
            per_task[task] = [
                to_map(self._layouts.get(i, "last"), level, materialize(like), self.net)
                if isinstance(level, Tensor)
                else level
                for i, (level, like) in enumerate(zip(kept, shared, strict=True))
            ]
        for levels in (shared, *per_task.values()) if self.final_norm else ():
            levels[-1] = normed(materialize(levels[-1]), self.net)
        self.streams.end()
        return Pyramids(shared, per_task)

    def _listen(self, left: dict[int, Tensor]) -> list[RemovableHandle]:
        """Note what the network goes on with after the blocks at which task streams end."""
        forks = [m for m in self.net.modules() if isinstance(m, Fork) and not m.carry]
        return [fork.register_forward_hook(lambda fork, _, y: left.update({fork.stage: y})) for fork in forks]


def is_narrow(block: nn.Module) -> bool:
    """Whether a forked block attends the shared stream only (see ``_NARROW_BLOCKS``)."""
    return f"{type(block).__module__}.{type(block).__qualname__}" in _NARROW_BLOCKS


def _refuse_batch_mixing(block: nn.Module, name: str) -> None:
    for path, module in block.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UnsupportedBackboneError(
                "streams need layers that treat every sample alone; batch statistics would mix tasks",
                where=f"block {name}.{path}", got=type(module).__name__,
            )  # fmt: skip


def _levels(net: nn.Module, spec: BackboneSpec) -> tuple[int, ...]:
    """Indices of the feature levels: the last four, or four evenly spaced ones of a plain transformer."""
    if not callable(getattr(net, "forward_intermediates", None)):
        raise UnsupportedBackboneError(
            "this timm network has no forward_intermediates", where=f"model.backbone.name {spec.name}",
            hint="choose a network with feature extraction",
        )  # fmt: skip
    strides = [info["reduction"] for info in net.feature_info]  # type: ignore[union-attr]
    count = len(strides)
    if spec.out_indices is not None:
        wrong = [i for i in spec.out_indices if not 0 <= i < count]
        if wrong or list(spec.out_indices) != sorted(set(spec.out_indices)):
            raise ConfigError(
                "levels must be ascending and exist", where="model.backbone.out_indices",
                got=spec.out_indices, expected=f"indices from 0 to {count - 1}",
            )  # fmt: skip
        return spec.out_indices
    if len(set(strides)) == 1 and count >= 4:
        return tuple(count * k // 4 - 1 for k in range(1, 5))
    return tuple(range(max(0, count - 4), count))


def _prune(net: nn.Module, indices: tuple[int, ...], *, keep_norm: bool) -> bool:
    """Drop what no feature needs: the final norm unless kept (if there is one), classifier, later blocks."""
    if keep_norm and not isinstance(getattr(net, "norm", None), nn.LayerNorm):
        where = f"backbone {type(net).__name__}"
        raise UnsupportedBackboneError("it has no final norm of tokens", where=where)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net.prune_intermediate_layers(list(indices), prune_norm=not keep_norm, prune_head=True)  # type: ignore[operator]
    return keep_norm
