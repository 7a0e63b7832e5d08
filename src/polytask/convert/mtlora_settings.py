"""Official MTLoRA settings -> recipes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from polytask.config import Spec, decode
from polytask.convert.official import Draft, Settings
from polytask.data.nyud import Nyud
from polytask.data.pascal_context import PascalContext
from polytask.errors import ConfigError

TASK_NAMES = {"sal": "saliency"}
"""Official task names that differ from ours."""
USUAL = ("semseg", "normals", "sal", "human_parts")
"""The tasks of the published runs, in their order."""

_SIZES = {
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
ROLES = ("qkv", "proj", "fc1", "fc2")
_TRANSFORMS = {"type": "astmt", "border": "zero", "normal_rotation": "compat"}


class _Node(Spec):
    """A node of the official settings; keys without a counterpart here are passed over."""

    model_config = ConfigDict(extra="ignore")


_Several = BeforeValidator(lambda value: value if isinstance(value, (list, tuple)) else (value,))
_Integers = Annotated[tuple[int, ...], _Several]
_Numbers = Annotated[tuple[float, ...], _Several]


class _Swin(_Node):
    PATCH_SIZE: int = 4
    EMBED_DIM: int = 96
    DEPTHS: tuple[int, ...] = (2, 2, 6, 2)
    NUM_HEADS: tuple[int, ...] = (3, 6, 12, 24)
    WINDOW_SIZE: int = 7
    MLP_RATIO: float = 4.0
    QKV_BIAS: bool = True
    QK_SCALE: None = None
    APE: Literal[False] = False
    PATCH_NORM: Literal[True] = True


class _Lora(_Node):
    ENABLED: bool = False
    R: _Integers = (8,)
    R_PER_TASK: dict[str, _Integers] = Field(default={})
    SHARED_SCALE: _Numbers = (2.0,)
    SCALE_PER_TASK: dict[str, _Numbers] = Field(default={})
    DROPOUT: _Numbers = (0.05,)
    TRAINABLE_SCALE_SHARED: bool = False
    TRAINABLE_SCALE_PER_TASK: bool = False
    INTERMEDIATE_SPECIALIZATION: bool = False
    FREEZE_PRETRAINED: bool = True
    BIAS: Literal["none", "all", "lora_only"] = "none"
    SHARED_MODE: Literal["matrix", "matrixv2", "addition", "add", "lora_only"] = "matrix"
    QKV_ENABLED: bool = True
    PROJ_ENABLED: bool = True
    FC1_ENABLED: bool = True
    FC2_ENABLED: bool = True
    DOWNSAMPLER_ENABLED: bool = False


_UNUSED = {"TASK_SCALE", "SPLIT_QKV"}  # nothing in the official code reads them


class _Model(_Node):
    TYPE: Literal["swin"] = "swin"
    DROP_PATH_RATE: float = 0.1
    DROP_RATE: float = Field(default=0.0, le=0.0)
    SWIN: _Swin = _Swin()
    MTLORA: _Lora = _Lora()
    DECODER_HEAD: dict[str, str] | str = "hrnet"
    DECODER_CHANNELS: tuple[int, ...] = (18, 36, 72, 144)
    DECODER_DOWNSAMPLER: bool = True
    PER_TASK_DOWNSAMPLER: Literal[True] = True
    SEGFORMER_CHANNELS: int = 256


class _Data(_Node):
    IMG_SIZE: int = 224
    BATCH_SIZE: int = 32
    NUM_WORKERS: int = 4


class _Train(_Node):
    EPOCHS: int = 300
    WARMUP_EPOCHS: int = 20
    BASE_LR: float = 5e-4
    WARMUP_LR: float = 5e-7
    MIN_LR: float = 5e-6
    WEIGHT_DECAY: float = 0.05
    CLIP_GRAD: float = 5.0
    FREEZE_PATCH_EMBED: bool = False
    FREEZE_LAYER_NORM: bool = False
    FREEZE_RELATIVE_POSITION_BIAS: bool = False
    FREEZE_DOWNSAMPLE_REDUCTION: bool = False


class OfficialSettings(_Node):
    """The official settings that say something about a run, with their defaults."""

    SEED: int = 0
    DATA: _Data = _Data()
    MODEL: _Model = _Model()
    TRAIN: _Train = _Train()


def known_settings(settings: Settings, where: str) -> OfficialSettings:
    """Raises ConfigErrors for other files, and values of the wrong kind or without a counterpart here."""
    if "MODEL" not in settings:
        what, got = "these are no settings of the official MTLoRA code", ", ".join(map(str, settings))
        raise ConfigError(what, where=where, expected="a key MODEL, among others", got=got or "no keys")
    return decode(OfficialSettings, settings, source=where)


def canonical(tasks: Iterable[str]) -> tuple[str, ...]:
    """Official task names in the order of the published runs, others behind."""
    names = list(tasks)
    return (*(task for task in USUAL if task in names), *sorted(set(names) - set(USUAL)))


def from_settings(
    settings: OfficialSettings, tasks: Sequence[str], outputs: Mapping[str, int], where: str
) -> Draft:
    """The recipe of official settings.

    Args:
        settings: see ``known_settings``.
        tasks: official names.
        outputs: channels of each task, where a checkpoint tells.
        where: what the settings are from, for messages.

    Raises:
        ConfigError: a task without a rank or scale, or settings without a counterpart.
    """
    data, train, lora = _dataset(settings, tasks, outputs), settings.TRAIN, settings.MODEL.MTLORA
    known = (Nyud if data["type"] == "nyud" else PascalContext).TASKS
    names: dict[str, Any] = {TASK_NAMES.get(task, task): {} for task in tasks}
    notes = []
    for task, channels in outputs.items():
        name = TASK_NAMES.get(task, task)
        if name in known and known[name].type == "segmentation" and known[name].channels != channels:
            names[name] = {"classes": [str(number) for number in range(channels)]}
            notes.append(f"{task} has {channels} classes, others than {data['type']}, so they are numbers")
    optim = {
        "type": "adamw", "lr": train.BASE_LR, "warmup_lr": train.WARMUP_LR, "min_lr": train.MIN_LR,
        "lr_per_batch": 512, "warmup_epochs": train.WARMUP_EPOCHS, "weight_decay": train.WEIGHT_DECAY,
        "clip_norm": train.CLIP_GRAD,
    }  # fmt: skip
    recipe: dict[str, Any] = {
        "seed": settings.SEED, "data": data, "tasks": names, "model": _model(settings, tasks, where),
        "balancer": "fixed", "optim": optim, "phases": [{"name": "train", "epochs": train.EPOCHS}],
        "run": {"eval_every": 5},
    }  # fmt: skip
    return Draft(recipe, (*notes, *(_quirks(lora) if lora.ENABLED else ())))


def passed_over(settings: Settings) -> tuple[str, ...]:
    """A note about settings of the adapter that have no counterpart, such as those of later forks."""
    model = settings.get("MODEL")
    given = model.get("MTLORA") if isinstance(model, Mapping) else None
    extra = sorted(set(given) - set(_Lora.model_fields) - _UNUSED) if isinstance(given, Mapping) else []
    return (f"settings without a counterpart are passed over: {', '.join(extra)}",) if extra else ()


def _dataset(settings: OfficialSettings, tasks: Sequence[str], outputs: Mapping[str, int]) -> dict[str, Any]:
    shared = {
        "image_size": settings.DATA.IMG_SIZE, "batch_size": settings.DATA.BATCH_SIZE,
        "eval_batch_size": settings.DATA.BATCH_SIZE, "workers": settings.DATA.NUM_WORKERS,
    }  # fmt: skip
    if "depth" in tasks or outputs.get("semseg") == Nyud.TASKS["semseg"].channels:
        zooms = {"rotate": 0.0, "scales": [1.0, 1.2, 1.5]}
        return {"type": "nyud", "root": "data/NYUD_MT", **shared, "pipeline": {**_TRANSFORMS, **zooms}}
    return {"type": "pascal_context", "root": "data/PASCAL_MT", **shared, "pipeline": _TRANSFORMS}


def _model(settings: OfficialSettings, tasks: Sequence[str], where: str) -> dict[str, Any]:
    model = settings.MODEL
    kinds = model.DECODER_HEAD if isinstance(model.DECODER_HEAD, Mapping) else {}
    usual = "hrnet" if isinstance(model.DECODER_HEAD, Mapping) else model.DECODER_HEAD
    heads = {TASK_NAMES.get(t, t): _head(kinds.get(t, usual), model.SEGFORMER_CHANNELS) for t in tasks}
    first = next(iter(heads.values()))
    parts: dict[str, Any] = {
        "backbone": _backbone(model),
        "adapter": _adapter(settings, tasks, where) if model.MTLORA.ENABLED else None,
        "neck": {
            "type": "fuse", "channels": list(model.DECODER_CHANNELS) if model.DECODER_DOWNSAMPLER else None,
        },
        "head": first,
    }  # fmt: skip
    others = {task: head for task, head in heads.items() if head != first}
    return {**parts, "heads": others} if others else parts


def _head(kind: str, width: int) -> dict[str, Any]:
    """Any name that the official code does not know means its ASPP."""
    options: dict[str, dict[str, Any]] = {
        "segformer": {"width": width}, "updecoder": {"legacy": True}, "hrnet": {},
    }  # fmt: skip
    return {"type": kind if kind in options else "aspp", **options.get(kind, {})}


def _backbone(model: _Model) -> dict[str, Any]:
    swin = model.SWIN
    shape = (swin.EMBED_DIM, swin.DEPTHS, swin.NUM_HEADS)
    size = next((name for name, known in _SIZES.items() if known == shape), None)
    options: dict[str, Any] = {"window_size": swin.WINDOW_SIZE, "drop_path_rate": model.DROP_PATH_RATE}
    if size is None:
        options |= {"embed_dim": shape[0], "depths": list(shape[1]), "num_heads": list(shape[2])}
    usual = _Swin()
    for ours, key in {"patch_size": "PATCH_SIZE", "mlp_ratio": "MLP_RATIO", "qkv_bias": "QKV_BIAS"}.items():
        if getattr(swin, key) != getattr(usual, key):
            options[ours] = getattr(swin, key)
    name = f"swin_{size or 'tiny'}_patch4_window7_224"
    return {"name": name, "feature_point": "after_merge", "options": options}


def _adapter(settings: OfficialSettings, tasks: Sequence[str], where: str) -> dict[str, Any]:
    lora, train = settings.MODEL.MTLORA, settings.TRAIN
    ranks = lora.R_PER_TASK or dict.fromkeys([*tasks, "shared"], lora.R)
    place = f"{where}: MODEL.MTLORA.R_PER_TASK"
    if not all(_of(ranks, "shared", place)):
        what = "a shared rank of 0 takes away the task branches too, which has no counterpart"
        raise ConfigError(what, where=place, got=list(ranks["shared"]))
    enabled = (lora.QKV_ENABLED, lora.PROJ_ENABLED, lora.FC1_ENABLED, lora.FC2_ENABLED)
    layers = [role for role, on in zip(ROLES, enabled, strict=True) if on]
    frozen = {
        "patch_embed": train.FREEZE_PATCH_EMBED, "norm": train.FREEZE_LAYER_NORM,
        "relative_position_bias_table": train.FREEZE_RELATIVE_POSITION_BIAS,
        "downsample.reduction": train.FREEZE_DOWNSAMPLE_REDUCTION,
    }  # fmt: skip
    adapter: dict[str, Any] = {
        "type": "mtlora",
        "rank": short(ranks["shared"]),
        "task_rank": _per_task(ranks, tasks, place),
        "scale": short(lora.SHARED_SCALE),
        "dropout": short(lora.DROPOUT),
        "mode": "addition" if lora.SHARED_MODE == "add" else lora.SHARED_MODE,
        "layers": [*layers, *["reduction"] * lora.DOWNSAMPLER_ENABLED],
        "train": [part for part, off in frozen.items() if not off] if lora.FREEZE_PRETRAINED else "all",
    }
    if lora.SCALE_PER_TASK:
        adapter["task_scale"] = _per_task(lora.SCALE_PER_TASK, tasks, f"{where}: MODEL.MTLORA.SCALE_PER_TASK")
    switches = {
        "train_scale": lora.TRAINABLE_SCALE_SHARED, "train_task_scale": lora.TRAINABLE_SCALE_PER_TASK,
        "train_biases": lora.BIAS == "all",
    }  # fmt: skip
    return adapter | {name: True for name, on in switches.items() if on}


def _of(values: Mapping[str, tuple[Any, ...]], name: str, where: str) -> tuple[Any, ...]:
    if name not in values:
        raise ConfigError(f"no value for {name!r}", where=where, got=", ".join(values))
    return values[name]


def short(values: tuple[Any, ...]) -> Any:
    """One number where all stages have the same."""
    return values[0] if len(set(values)) == 1 else list(values)


def _per_task(values: Mapping[str, tuple[Any, ...]], tasks: Sequence[str], where: str) -> Any:
    own = {TASK_NAMES.get(task, task): short(_of(values, task, where)) for task in tasks}
    first = next(iter(own.values()))
    return first if all(value == first for value in own.values()) else own


def _quirks(lora: _Lora) -> list[str]:
    """Where the official code does something that is not repeated here."""
    notes = []
    if not (lora.PROJ_ENABLED and lora.FC2_ENABLED) and lora.SHARED_MODE != "lora_only":
        notes.append(
            "without branches at proj or fc2 the official code loses the residual or the streams of tasks; "
            "here they go on, so that outputs differ"
        )
    if lora.INTERMEDIATE_SPECIALIZATION:
        notes.append("task branches in all blocks are left out, as nothing reads those before the last one")
    return notes
