"""What was trained on a frozen trunk as one file, and several of these on one trunk, switched at run time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from polytask.backbones.networks import digest_of
from polytask.config import Spec, encode
from polytask.engine.checkpoint import trunk, weights_to_save
from polytask.errors import CheckpointError, ConfigError, TaskMismatchError, did_you_mean
from polytask.files import differences
from polytask.model import MultiTaskModel

FORMAT = 1
_KEY = "adapters"
_ELSEWHERE = {"pretrained", "weights", "recompute"}
"""Settings of the backbone that may differ: where its (hashed) weights come from, and how it trains."""


class Header(Spec):
    """What a file of adapters says about itself.

    Attributes:
        format: of the file.
        base_digest: hash of the trunk as it was loaded.
        tasks: in order.
        settings: of the model, as in a recipe.
        digest: of the tensors in the file.
    """

    format: int
    base_digest: str
    tasks: tuple[str, ...]
    settings: dict[str, Any]
    digest: str


def save_adapters(model: MultiTaskModel, file: Path | str) -> None:
    """Write all that may differ from the trunk as loaded into one safetensors file, whole or not at all.

    That is: adapter branches, whatever else of the backbone trained, neck and heads, and running statistics.

    Raises:
        ConfigError: the trunk cannot be loaded again, or the file cannot be written.
    """
    file = Path(file)
    tensors, _ = weights_to_save(model, _trained(model))
    header = _header(model, digest_of(tensors))
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        safetensors.torch.save_file(tensors, temporary, {_KEY: header.model_dump_json()})
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"the file cannot be written ({error})", where=str(file)) from None


class AdapterSets:
    """Sets of adapters on the one trunk of a model; one of them, ``active``, is in use.

    A set is what ``save_adapters`` writes. The model comes with the set ``default``. Switching exchanges
    tensors and copies none, so the other sets cost their own size, and the trunk stays where it is. The model
    must not be in training then: what an optimizer remembers does not switch.

    Raises:
        ConfigError: as ``save_adapters``.
    """

    def __init__(self, model: MultiTaskModel) -> None:
        self.model, self.active = model, "default"
        self._header = _header(model, "")
        self._idle: dict[str, dict[str, Tensor]] = {}

    @property
    def names(self) -> list[str]:
        """All sets, in alphabetical order."""
        return sorted([self.active, *self._idle])

    def add(self, name: str, file: Path | str) -> None:
        """Read a set, for ``use`` to switch to.

        Raises:
            ConfigError: there is a set of that name.
            CheckpointError: the file is missing or damaged, or belongs to another trunk or other settings.
            TaskMismatchError: it belongs to other tasks.
        """
        if name in self.names:
            raise ConfigError(f"there is a set {name!r} already", where="AdapterSets", got=str(file))
        tensors, header = _read(Path(file))
        _check_origin(header, self._header, str(file))
        own = self._own()
        wrong = own.keys() ^ tensors.keys() or {n for n in own if own[n].shape != tensors[n].shape}
        if wrong:
            raise CheckpointError(
                f"{len(wrong)} tensors do not fit this model, first {min(wrong)}", where=str(file),
                hint="phases of its run trained other parts of the backbone, or this model is merged",
            )  # fmt: skip
        self._idle[name] = {key: value.to(own[key]) for key, value in tensors.items()}

    def use(self, name: str) -> None:
        """Switch the model to a set.

        Raises:
            ConfigError: there is no such set.
        """
        if name not in self.names:
            raise ConfigError(f"no set {name!r}", where="AdapterSets", hint=did_you_mean(name, self.names))
        if name == self.active:
            return
        own, coming = self._own(), self._idle.pop(name)
        self._idle[self.active] = {key: value.data for key, value in own.items()}
        for key, value in own.items():
            value.data = coming[key].to(value)  # the model may have moved to another device meanwhile
        self.active = name

    def _own(self) -> dict[str, Tensor]:
        """The model's own parameters and buffers that make up a set."""
        base = trunk(self.model, _trained(self.model))
        return {n: value for n, value in self.model.state_dict(keep_vars=True).items() if n not in base}


def _trained(model: MultiTaskModel) -> set[str]:
    return model.changed | {name for name, p in model.named_parameters() if p.requires_grad}


def base_of(model: MultiTaskModel) -> str:
    """Hash of the pretrained trunk.

    Raises:
        ConfigError: it is random, so that what was trained on it is of no use elsewhere.
    """
    base = model.backbone.base_digest
    if base is None:
        raise ConfigError(
            "adapters need a trunk that can be loaded again", where="model.backbone",
            got="random weights, or a model that trained as a whole",
            hint="set model.backbone.pretrained=true or model.backbone.weights=FILE",
        )  # fmt: skip
    return base


def _header(model: MultiTaskModel, digest: str) -> Header:
    base = base_of(model)
    if model.spec is None:
        raise ConfigError("the model has no settings", where="adapters", hint="build it with ModelSpec.build")
    settings = encode(model.spec)
    settings["backbone"] = {k: v for k, v in settings["backbone"].items() if k not in _ELSEWHERE}
    return Header(
        format=FORMAT, base_digest=base, tasks=model.tasks, settings={"model": settings}, digest=digest
    )


def _read(file: Path) -> tuple[dict[str, Tensor], Header]:
    """Tensors and header of a file of adapters."""
    try:
        with safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get(_KEY, "")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"adapters cannot be read ({error})", where=str(file)) from None
    try:
        header = Header.model_validate_json(text)
    except ValueError:
        hint = "write one with polytask.save_adapters"
        raise CheckpointError("this is no file of adapters", where=str(file), hint=hint) from None
    if header.format > FORMAT:
        raise CheckpointError("adapters were written by a newer polytask", where=str(file), got=header.format)
    if header.digest != digest_of(tensors):
        raise CheckpointError("the file is altered", where=str(file), hint="save it again")
    return tensors, header


def _check_origin(header: Header, own: Header, where: str) -> None:
    if header.tasks != own.tasks:
        raise TaskMismatchError(
            "the adapters were trained for other tasks", where=where,
            got=", ".join(header.tasks), expected=", ".join(own.tasks),
        )  # fmt: skip
    changed = differences(header.settings, own.settings)
    if changed:
        got = f"other values of {', '.join(changed)}"
        hint = "build the model with the recipe of the adapters"
        what = "the adapters were trained with other settings"
        raise CheckpointError(what, where=where, got=got, hint=hint)
    if header.base_digest != own.base_digest:
        raise CheckpointError(
            "the adapters were trained on other pretrained weights", where=where,
            got=header.base_digest, expected=own.base_digest,
        )  # fmt: skip
