"""Any timm network as a backbone: features, wrappable sites, feature points and weights."""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from pydantic import Field
from timm.models import load_state_dict
from torch import Tensor, nn

from polytask.backbones.streams import Fork, MergePoint, Repeat, SharedOnly, StreamPlan, Streams, select
from polytask.config import Spec
from polytask.errors import CheckpointError, ConfigError, UnsupportedBackboneError, did_you_mean
from polytask.types import Level, Pyramids, Site

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
    weights: Path | None = Field(default=None, description="local weight file in any layout timm's filter reads")
    options: dict[str, Any] = Field(default_factory=dict)
    out_indices: tuple[int, ...] | None = Field(default=None, description="feature levels; default: four")
    feature_point: Literal["before_merge", "after_merge"] = "before_merge"
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


def create(spec: BackboneSpec, image_size: tuple[int, int]) -> nn.Module:
    """The bare timm network with its weights, without classifier."""
    where = f"model.backbone.name {spec.name}"
    if spec.name.split(".")[0] not in timm.list_models():
        raise ConfigError(
            "no such timm model", where=where, hint=did_you_mean(spec.name.split(".")[0], timm.list_models())
        )
    options: dict[str, Any] = {"num_classes": 0, **spec.options}
    try:
        net = timm.create_model(spec.name, pretrained=spec.pretrained, img_size=image_size, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise ConfigError(f"timm refuses an option ({error})", where="model.backbone.options") from None
        net = _create_sizeless(spec, options)
    except (AssertionError, ValueError) as error:
        raise _unsuitable(spec, image_size, error) from None
    except (OSError, RuntimeError) as error:
        raise _unreachable(spec, error) from None
    if spec.weights:
        load_weights(net, spec.weights)
    return net


def _create_sizeless(spec: BackboneSpec, options: dict[str, Any]) -> nn.Module:
    """Convolutional nets take any size and no ``img_size``."""
    try:
        return timm.create_model(spec.name, pretrained=spec.pretrained, **options)
    except TypeError as error:
        raise ConfigError(f"timm refuses an option ({error})", where="model.backbone.options") from None
    except (OSError, RuntimeError) as error:
        raise _unreachable(spec, error) from None


def _unreachable(spec: BackboneSpec, error: Exception) -> CheckpointError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return CheckpointError(
        f"pretrained weights of {spec.name} cannot be loaded ({reason})",
        where="model.backbone.pretrained",
        hint="go online once, or name a local file in model.backbone.weights, or set pretrained: false",
    )


def _unsuitable(spec: BackboneSpec, image_size: tuple[int, int], error: Exception) -> ConfigError:
    return ConfigError(
        f"{spec.name} cannot take this image size or option ({error})",
        where="data.image_size",
        got=f"{image_size[0]}x{image_size[1]}",
        hint="use a multiple of the backbone's patch size and total stride",
    )


def load_weights(net: nn.Module, path: Path) -> None:
    """Load a local file through the network's own timm filter, strictly but for the classifier.

    Raises:
        CheckpointError: file missing or damaged, or keys or shapes that do not fit.
    """
    where = f"model.backbone.weights {path}"
    if not path.is_file():
        raise CheckpointError("no such weight file", where=where)
    try:
        state = load_state_dict(str(path), use_ema=False, device="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile, safetensors and pickle each raise their own
        raise CheckpointError(f"weight file cannot be read ({error})", where=where) from None
    adapt = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    if adapt is not None:
        state = adapt(state, net)
    head = net.pretrained_cfg.get("classifier", "head")  # type: ignore[union-attr,operator]
    heads = tuple(f"{name}." for name in ([head] if isinstance(head, str) else head))
    state = {key: value for key, value in state.items() if not key.startswith(heads)}
    try:
        missing, unexpected = net.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"weights have other shapes ({str(error).splitlines()[1].strip()})", where=where) from None
    missing = [key for key in missing if not key.startswith(heads)]
    if missing or unexpected:
        raise CheckpointError(
            f"weights are of another network: {len(missing)} keys missing (first {missing[:2]}), "
            f"{len(unexpected)} unexpected (first {unexpected[:2]})",
            where=where,
        )


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
        info = [net.feature_info[i] for i in range(len(net.feature_info))]  # type: ignore[index,arg-type]
        self._stage_modules = [info[i]["module"] for i in self.indices]
        levels = list(zip([info[i]["num_chs"] for i in self.indices], [info[i]["reduction"] for i in self.indices], strict=True))
        self.streams, self.plan = Streams(), StreamPlan()
        self.own_streams_only = False
        """Whether readers of the pyramids never look at the shared one when they asked for a stream."""
        if self.feature_point == "after_merge":
            self._tap_merges()
            levels = [*levels[1:], levels[-1]]
        self.channels = tuple(c for c, _ in levels)
        self.strides = tuple(s for _, s in levels)
        _prune(net, self.indices)

    # --- structure -------------------------------------------------------------------------------

    def blocks(self) -> list[tuple[str, int, int]]:
        """``(module path, stage, index in stage)`` of all blocks, in execution order."""
        names = [name for name, _ in self.net.named_modules()]
        ends = [max(i for i, n in enumerate(names) if n == m or n.startswith(f"{m}.")) for m in self._stage_modules]
        found: list[tuple[str, int, int]] = []
        for position, name in enumerate(names):
            module = self.net.get_submodule(name)
            if "mlp" not in dict(module.named_children()) or any(name.startswith(f"{b}.") for b, _, _ in found):
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
                "adapters need transformer blocks with attn.qkv, attn.proj, mlp.fc1 and mlp.fc2; it has no such block",
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
            block.get_submodule(path)
        except AttributeError:
            raise UnsupportedBackboneError(
                f"block {name} ({type(block).__name__}) has no layer {path}",
                where=f"backbone {type(self.net).__name__}",
                expected="attn.qkv, attn.proj, mlp.fc1 and mlp.fc2 in every block (adapters)",
                hint="use e.g. a Swin, ViT or DeiT3, or train without an adapter",
            ) from None

    def _reduction(self, stage: int) -> str | None:
        """Path of the linear map that leads from the previous stage into this one, if there is one."""
        path = f"{self._stage_modules[stage]}.downsample.reduction"
        try:
            module = self.net.get_submodule(path)
        except AttributeError:
            return None
        return f"{path}.layer" if isinstance(module, MergePoint) else path

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
            layer = self.net.get_submodule(path)
            self.replace(path, MergePoint(layer, self.streams, stage=stage - 1))

    def fork(self, plan: StreamPlan, task_aware: frozenset[str]) -> None:
        """Install the streams of a plan; ``task_aware`` holds the roles whose layers widen to all streams.

        Raises:
            UnsupportedBackboneError: a forked block holds layers that mix the batch.
        """
        self.plan = plan
        if plan.fork == "never":
            return
        last_stage = len(self._stage_modules) - 1
        stages = [stage for _, stage, _ in self.blocks()]
        for number, (name, stage, _) in enumerate(self.blocks()):
            if number + 1 < len(stages) and stages[number + 1] == stage:
                continue
            block = self.net.get_submodule(name)
            _refuse_batch_mixing(block, name)
            if is_narrow(block):
                block.norm1 = SharedOnly(block.norm1, self.streams)  # type: ignore[arg-type]
                if "proj" not in task_aware:
                    block.attn.proj = Repeat(block.attn.proj, self.streams)  # type: ignore[union-attr,arg-type]
            carry = self.feature_point == "after_merge" and stage != last_stage
            fork = Fork(block, self.streams, stage=stage, carry=carry, recompute=stage in self.recompute)
            self.replace(name, fork)

    # --- forward ---------------------------------------------------------------------------------

    def forward(self, image: Tensor, tasks: Sequence[str] = ()) -> Pyramids:
        """``[B, 3, H, W]`` -> pyramids; streams run for those of ``tasks`` that own one.

        Raises:
            ConfigError: if the image has a size the network cannot take.
        """
        active = select(tasks, self.plan)
        self.streams.begin(active, skip_final_shared=self.own_streams_only and set(tasks) <= set(active))
        merged = self.feature_point == "after_merge"
        indices = [self.indices[-1]] if merged else list(self.indices)
        try:
            maps: list[Tensor] = self.net.forward_intermediates(  # type: ignore[operator]
                image, indices=indices, intermediates_only=True, output_fmt="NCHW"
            )
        except AssertionError as error:
            raise ConfigError(
                f"the backbone cannot take this image ({error})", got=tuple(image.shape), where="image size"
            ) from None
        last = len(self.indices) - 1
        shared: list[Level] = [*(self.streams.merged[i] for i in range(last)), maps[-1]] if merged else list(maps)
        per_task: dict[str, list[Level]] = {}
        for number, task in enumerate(self.streams.active):
            kept = [self.streams.kept[stage][number] for stage in range(last + 1)]
            per_task[task] = [
                _to_map(level, like) if isinstance(level, Tensor) else level
                for level, like in zip(kept, shared, strict=True)
            ]
        self.streams.end()
        return Pyramids(shared, per_task)


def is_narrow(block: nn.Module) -> bool:
    """Whether a forked block attends the shared stream only (see ``_NARROW_BLOCKS``)."""
    return f"{type(block).__module__}.{type(block).__qualname__}" in _NARROW_BLOCKS


def _to_map(tokens: Tensor, like: Level) -> Tensor:
    """Tokens in a block's own layout (NCHW, NHWC, or NLC with prefix) -> ``[B, C, H, W]``."""
    assert isinstance(like, Tensor)
    _, channels, height, width = like.shape
    if tokens.ndim == 3:
        grid = tokens[:, tokens.shape[1] - height * width :]
        return grid.reshape(len(tokens), height, width, channels).permute(0, 3, 1, 2)
    return tokens if tokens.shape[1:] == like.shape[1:] else tokens.permute(0, 3, 1, 2)


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


def _prune(net: nn.Module, indices: tuple[int, ...]) -> None:
    """Drop what no feature needs: the final norm, the classifier and later blocks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net.prune_intermediate_layers(list(indices), prune_norm=True, prune_head=True)  # type: ignore[operator]


@torch.no_grad()
def digest(module: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of a module's parameters."""
    hasher = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        hasher.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        hasher.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()
