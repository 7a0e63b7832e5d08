"""Adapter folders of the PEFT library <-> low-rank branches. The only place that knows its names.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` for the bare timm network, as
``peft.get_peft_model(timm.create_model(NAME), LoraConfig(...))`` saves it. PEFT itself is not needed here.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from polytask.backbones.streams import Factors, LinearMap
from polytask.backbones.timm import Backbone
from polytask.config import encode
from polytask.engine.adapter_sets import base_of
from polytask.errors import CheckpointError, ConfigError
from polytask.files import new_folder, to_json
from polytask.model import MultiTaskModel
from polytask.parallel import put

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _BASE = "base_model.model.", "base_digest"
_NET = "backbone.net."
_KNOWN = frozenset(
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
        "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
        "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout",
        "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version",
        "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type",
        "use_rslora",
    }
)  # fmt: skip
"""Settings that are read here, or that leave their mark in the tensors alone."""
_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the base as it was."""


class Folder(NamedTuple):
    """A PEFT folder as it was read: branches by layer, other tensors by name (both timm's), and the rest."""

    branches: dict[str, Factors]
    plain: dict[str, Tensor]
    config: dict[str, Any]
    base_digest: str | None


def export_peft(model: MultiTaskModel, folder: Path | str, *, task: str | None = None) -> list[str]:
    """Write the branches of a model's backbone as a new PEFT folder.

    What else of the backbone trained goes along as plain tensors, as PEFT's own ``bias: all`` does; PEFT puts
    them into its network, and does not take them back when the adapter is unloaded.

    Args:
        model: with plain LoRA, or other branches that are the same for all tasks.
        folder: to make.
        task: whose branches, if each task has its own.

    Returns:
        Names of trained tensors that have no place there: those of neck and heads.

    Raises:
        ConfigError: task streams or no branches at all, a random trunk, or there is something at ``folder``.
    """
    base, layers = base_of(model), _branches(model.backbone, task)
    tensors = {f"{_PREFIX}{name}.lora_{x}.weight": getattr(f, x) for name, f in layers.items() for x in "AB"}
    changed = model.changed | {name for name, p in model.named_parameters() if p.requires_grad}
    for name, (own, tensor) in _places(model.backbone).items():
        if f"{_NET}{own}" in changed or not isinstance(tensor, nn.Parameter):
            layer, _, leaf = name.rpartition(".")
            tensors[f"{_PREFIX}{layer}{'.base_layer' if layer in layers else ''}.{leaf}"] = tensor
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with new_folder(Path(folder), "folder") as draft:
        safetensors.torch.save_file(content, draft / _TENSORS, {"format": "pt", _BASE: base})
        (draft / _CONFIG).write_text(to_json(_config(model, layers)) + "\n", encoding="utf-8")
    return sorted(name for name in changed if not name.startswith(_NET))


def import_peft(folder: Path | str, model: MultiTaskModel, *, task: str | None = None) -> list[str]:
    """Put a PEFT folder into a model, whose neck and heads stay as they are.

    Args:
        folder: of an adapter of the same timm network.
        model: with branches of the same layers, ranks and scales, see ``peft_settings``.
        task: whose branches, if each task has its own.

    Returns:
        Names of tensors without a place here: those of timm's final norm and classifier, which are cut off.

    Raises:
        CheckpointError: the folder is incomplete or damaged, of another kind than LoRA, or does not fit.
        ConfigError: as ``export_peft``.
    """
    where, read = str(folder), _read(Path(folder))
    layers, places = _branches(model.backbone, task), _places(model.backbone)
    _check(read, layers, model, where)
    modules = dict(model.backbone.net.named_modules())
    left = [name for name in read.plain if isinstance(modules.get(name.rpartition(".")[0]), nn.Identity)]
    plain = {name: value for name, value in read.plain.items() if name not in left}
    wrong = [n for n, value in plain.items() if n not in places or places[n][1].shape != value.shape]
    if wrong:
        raise CheckpointError(f"{len(wrong)} tensors do not fit the backbone, first {wrong[0]}", where=where)
    with torch.no_grad():
        for name, factors in read.branches.items():
            put(layers[name].A, factors.A)
            put(layers[name].B, factors.B)
        for name, value in plain.items():
            put(places[name][1], value)
    model.changed |= {f"{_NET}{places[name][0]}" for name in plain}
    return left


def peft_settings(folder: Path | str) -> dict[str, Any]:
    """What to write as ``model.adapter`` in a recipe, so that a PEFT folder fits the model.

    Raises:
        CheckpointError: as ``import_peft``; ranks or scales that differ between layers.
    """
    read = _read(Path(folder))
    kinds = {(len(factors.A), factors.scale) for factors in read.branches.values()}
    if len(kinds) > 1:
        got = ", ".join(f"rank {rank} scaled by {scale:g}" for rank, scale in sorted(kinds))
        raise CheckpointError("the adapter `lora` has one rank and scale", where=str(folder), got=got)
    rank, scale = kinds.pop()
    roles = list(dict.fromkeys(name.rpartition(".")[2] for name in read.branches))
    dropout = read.config.get("lora_dropout") or 0.0
    return {"type": "lora", "rank": rank, "alpha": scale * rank, "dropout": dropout, "layers": roles}


def _branches(backbone: Backbone, task: str | None) -> dict[str, Factors]:
    """The factors of all wrapped layers by their timm names."""
    found = {}
    for name, layer in _wrapped(backbone).items():
        factors = layer.factors(task)
        if factors is None:
            hint = "branches must be the same for all tasks, or name the task whose own they are"
            what = f"{name} is no plain low-rank layer"
            raise ConfigError(what, where="PEFT", got=None if task is None else f"task {task}", hint=hint)
        found[_timm(name)] = factors
    if not found:
        raise ConfigError("the model has no low-rank branches", where="PEFT")
    return found


def _wrapped(backbone: Backbone) -> dict[str, LinearMap]:
    return {name: layer for name, layer in backbone.net.named_modules() if isinstance(layer, LinearMap)}


def _timm(name: str) -> str:
    """The name in the bare network; ``layer`` is in a wrapper that takes features after patch merging."""
    return re.sub(r"\.reduction\.layer\b", ".reduction", name)


def _places(backbone: Backbone) -> dict[str, tuple[str, Tensor]]:
    """Own name and tensor of all of the original network, by timm names."""
    wrapped, found = _wrapped(backbone), {}
    for own, tensor in backbone.net.state_dict(keep_vars=True).items():
        layer = next((name for name in wrapped if own.startswith(f"{name}.")), None)
        rest = own if layer is None else own.removeprefix(f"{layer}.")
        if layer is None:
            found[_timm(own)] = (own, tensor)
        elif rest.startswith("base."):
            found[f"{_timm(layer)}.{rest.removeprefix('base.')}"] = (own, tensor)
    return found


def _config(model: MultiTaskModel, layers: Mapping[str, Factors]) -> dict[str, Any]:
    """What PEFT needs to know; the most common rank and scale are the default, others go by layer."""
    kinds = {name: (len(factors.A), factors.scale) for name, factors in layers.items()}
    rank, scale = Counter(kinds.values()).most_common(1)[0][0]
    others = {name: kind for name, kind in kinds.items() if kind != (rank, scale)}
    spec = model.spec
    adapter = {} if spec is None or spec.adapter is None else encode(spec.adapter)
    return {
        "peft_type": "LORA", "task_type": None, "inference_mode": True, "bias": "none", "use_rslora": False,
        "base_model_name_or_path": spec.backbone.name if spec is not None else None,
        "r": rank, "lora_alpha": scale * rank, "lora_dropout": adapter.get("dropout", 0.0),
        "rank_pattern": {name: r for name, (r, _) in others.items()},
        "alpha_pattern": {name: s * r for name, (r, s) in others.items()},
        "target_modules": list(layers),
    }  # fmt: skip


def _read(folder: Path) -> Folder:
    """A folder, understood, or refused with a sentence."""
    where = str(folder)
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / _TENSORS, "pt") as opened:
            base = (opened.metadata() or {}).get(_BASE)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        what, hint = f"a PEFT folder cannot be read ({error})", f"it holds {_CONFIG} and {_TENSORS}"
        raise CheckpointError(what, where=where, hint=hint) from None
    _check_config(config, where)
    named = {name.removeprefix(_PREFIX).replace(".base_layer.", "."): x for name, x in tensors.items()}
    sides: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    for name in [name for name in named if ".lora_" in name]:
        layer, _, leaf = name.rpartition(".lora_")
        if leaf not in ("A.weight", "B.weight"):
            raise CheckpointError(f"cannot use {name}", where=where, expected="LoRA of linear layers")
        sides[leaf[0]][layer] = named.pop(name)
    if not sides["A"] or sides["A"].keys() != sides["B"].keys():
        raise CheckpointError("every layer needs lora_A and lora_B, and there must be one", where=where)
    branches = {name: _factors(name, a, sides["B"][name], config, where) for name, a in sides["A"].items()}
    return Folder(branches, named, config, base)


def _check_config(config: Any, where: str) -> None:
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError("only LoRA can be imported", where=where, expected="peft_type LORA", got=got)
    start = config.get("init_lora_weights")
    others = [key for key, value in config.items() if value and key not in {*_KNOWN, "init_lora_weights"}]
    if start not in _STARTS:
        others.append("init_lora_weights")
    if others:
        got = ", ".join(f"{key}: {config[key]}" for key in others)
        raise CheckpointError("this is not plain LoRA on the original weights", where=where, got=got)


def _factors(layer: str, a: Tensor, b: Tensor, config: Mapping[str, Any], where: str) -> Factors:
    """Factors with the scale PEFT would give them."""
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
        got = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise CheckpointError(
            f"{layer}: no low-rank pair", where=where, expected="[r, in] and [out, r]", got=got
        )
    try:
        patterns = (config.get("alpha_pattern") or {}).items()
        found = (value for key, value in patterns if re.match(rf"(.*\.)?({key})$", layer))
        alpha = float(next(found, config["lora_alpha"]))
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise CheckpointError(f"{_CONFIG} has no usable lora_alpha ({error})", where=where) from None
    return Factors(a, b, alpha / (math.sqrt(len(a)) if config.get("use_rslora") else len(a)))


def _check(read: Folder, layers: Mapping[str, Factors], model: MultiTaskModel, where: str) -> None:
    """Whether branches are of this trunk, and there, as large and scaled as the model's."""
    if read.base_digest not in (None, base := base_of(model)):
        what = "the adapter was trained on other pretrained weights"
        raise CheckpointError(what, where=where, got=read.base_digest, expected=base)
    if strange := sorted(read.branches.keys() ^ layers.keys()):
        owner = "file" if strange[0] in read.branches else "model"
        what = f"{len(strange)} layers have a branch on one side only, first {strange[0]} of the {owner}"
        raise CheckpointError(what, where=where, hint="set model.adapter to what peft_settings gives")
    for name, own in layers.items():
        given = read.branches[name]
        if (given.A.shape, given.B.shape) != (own.A.shape, own.B.shape):
            got = f"rank {len(given.A)}, {given.A.shape[1]} to {len(given.B)} channels"
            expected = f"rank {len(own.A)}, {own.A.shape[1]} to {len(own.B)}"
            raise CheckpointError(f"{name}: branch of another shape", where=where, expected=expected, got=got)
        if not math.isclose(given.scale, own.scale, rel_tol=1e-9):
            got, expected = f"{given.scale:g}", f"{own.scale:g}"
            raise CheckpointError(f"{name}: other scale (alpha / r)", where=where, expected=expected, got=got)
