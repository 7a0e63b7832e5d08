"""Checkpoints: written whole or not at all, checked before use, without pickled objects.

``checkpoints/last`` and ``checkpoints/best`` are links to folders ``last-<step>``; a folder is written
under a temporary name, synced and renamed, and only then the link moves. A kill at any moment leaves the
old checkpoint in place.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import polytask
from polytask.errors import CheckpointError
from polytask.model import MultiTaskModel
from polytask.parallel import full, like, put

FORMAT = 1
_WEIGHTS, _STATE, _MANIFEST = "weights.safetensors", "state.pt", "manifest.json"
_HINT = "use the other checkpoint (last or best), or train again"


@dataclass(frozen=True)
class Saved:
    """A checkpoint read back: tensors, trainer state and manifest."""

    weights: dict[str, Tensor]
    state: dict[str, Any]
    manifest: dict[str, Any]


def weights_to_save(model: MultiTaskModel, trained: Collection[str]) -> tuple[dict[str, Tensor], list[str]]:
    """State dict without the frozen tensors that the backbone's own weight source gives back.

    Returns:
        tensors to store, and the names left out.
    """
    left_out = trunk(model, trained)
    state = {
        name: full(value).cpu().contiguous()
        for name, value in model.state_dict().items()
        if name not in left_out
    }
    return state, sorted(left_out)


def trunk(model: MultiTaskModel, trained: Collection[str]) -> set[str]:
    """Names of the frozen tensors that the backbone's own weight source gives back."""
    if model.backbone.base_digest is None:
        return set()
    return {f"backbone.net.{name}" for name, _ in model.backbone.net.named_parameters()} - set(trained)


def save(
    run: Path, name: str, weights: dict[str, Tensor], state: dict[str, Any], manifest: dict[str, Any]
) -> None:
    """Write ``checkpoints/<name>`` atomically.

    Args:
        run: run folder.
        name: ``last`` or ``best``.
        weights: tensors.
        state: tensors and plain containers only.
        manifest: plain values; hashes are added. Must hold ``step``.
    """
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    current = _linked(folder / name)
    target = folder / f"{name}-{manifest['step']:08d}"
    if current == target.name:  # this step was saved before, e.g. within the phase that ends here
        target = folder / f"{target.name}-again"
    temporary = folder / f".{target.name}.tmp"
    for stale in (target, temporary):
        if stale.exists():
            shutil.rmtree(stale)
    temporary.mkdir()
    safetensors.torch.save_file(weights, temporary / _WEIGHTS)
    torch.save(state, temporary / _STATE)
    hashes = {file: file_hash(temporary / file) for file in (_WEIGHTS, _STATE)}
    record = {
        "format": FORMAT,
        "polytask": polytask.__version__,
        "torch": torch.__version__,
        **manifest,
        "sha256": hashes,
    }
    sealed = {**record, "seal": _seal(record)}
    (temporary / _MANIFEST).write_text(json.dumps(sealed, indent=1) + "\n", encoding="utf-8")
    for file in (_WEIGHTS, _STATE, _MANIFEST, "."):
        _sync(temporary / file)
    temporary.rename(target)
    _link(folder, name, target.name)
    sweep(run, name)


def sweep(run: Path, name: str) -> None:
    """Remove what ``checkpoints/<name>`` does not point to, such as the remains of a killed run."""
    folder = run / "checkpoints"
    kept = _linked(folder / name)
    for old in [*folder.glob(f"{name}-*"), *folder.glob(f".{name}-*.tmp")]:
        if old.name != kept:
            shutil.rmtree(old)


def _seal(manifest: Mapping[str, Any]) -> str:
    """A digest of a manifest's content."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _link(folder: Path, name: str, target: str) -> None:
    temporary = folder / f".{name}.link"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(folder / name)
    _sync(folder)


def _linked(link: Path) -> str | None:
    return link.readlink().name if link.is_symlink() else None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(run: Path, name: str = "last") -> Saved:
    """Read and verify ``checkpoints/<name>`` of a run.

    Raises:
        CheckpointError: no checkpoint, a file missing, truncated or altered, or a newer format.
    """
    link = run / "checkpoints" / name
    folder = link.resolve()
    if not folder.is_dir():
        raise CheckpointError("no such checkpoint", where=str(link), hint="train first, or name a run folder")
    try:
        manifest = _read_manifest(folder / _MANIFEST)
        _verify(folder, manifest["sha256"])
        weights = safetensors.torch.load_file(folder / _WEIGHTS)
        return Saved(weights, torch.load(folder / _STATE, weights_only=True, map_location="cpu"), manifest)
    except (CheckpointError, OSError, pickle.UnpicklingError) as error:
        if link.resolve() != folder:  # a training process replaced it just now
            return read(run, name)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"checkpoint cannot be read ({error})", where=str(link), hint=_HINT) from None


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read ({error})", where=str(path), hint=_HINT) from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise CheckpointError(f"{path.name} is truncated or altered", where=str(path), hint=_HINT)
    if manifest["format"] > FORMAT:
        raise CheckpointError(
            "checkpoint was written by a newer polytask", where=str(path), got=manifest.get("polytask")
        )
    if manifest.pop("seal", None) != _seal(manifest):
        raise CheckpointError(f"{path.name} is truncated or altered", where=str(path), hint=_HINT)
    return manifest


def _verify(folder: Path, digests: Mapping[str, str]) -> None:
    for file, digest in digests.items():
        path = folder / file
        if not path.is_file():
            raise CheckpointError(f"{file} is missing", where=str(path), hint=_HINT)
        if file_hash(path) != digest:
            raise CheckpointError(f"{file} is truncated or altered", where=str(path), hint=_HINT)


def load_weights(model: MultiTaskModel, saved: Saved, where: str) -> None:
    """Put saved tensors into a model built from the same recipe.

    Raises:
        CheckpointError: other base weights, tensors missing, left over or of another shape.
    """
    base = saved.manifest["base_digest"]
    if saved.manifest["left_out"] and base != model.backbone.base_digest:
        raise CheckpointError(
            "the checkpoint was trained on other pretrained weights than those loaded now", where=where,
            got=f"{model.backbone.base_digest}", expected=f"{base}",
        )  # fmt: skip
    own = model.state_dict()
    expected = set(own) - set(saved.manifest["left_out"])
    missing, extra = sorted(expected - set(saved.weights)), sorted(set(saved.weights) - set(own))
    wrong = [n for n, v in saved.weights.items() if n in own and own[n].shape != v.shape]
    if missing or extra or wrong:
        first = (missing or extra or wrong)[0]
        raise CheckpointError(
            f"checkpoint does not fit the model: {len(missing)} tensors missing, {len(extra)} left over, "
            f"{len(wrong)} of another shape (first {first})",
            where=where, hint="use the recipe it was trained with",
        )  # fmt: skip
    with torch.no_grad():
        for name, value in saved.weights.items():
            put(own[name], value)
    model.changed |= set(saved.weights)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """State dict of an optimizer with whole tensors."""
    state = optimizer.state_dict()
    state["state"] = {
        index: {key: full(v).cpu() if isinstance(v, Tensor) else v for key, v in entry.items()}
        for index, entry in state["state"].items()
    }
    return state


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Inverse of ``optimizer_state``, sharding again what is sharded."""
    parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {
        index: {key: like(parameters[index], v) if isinstance(v, Tensor) else v for key, v in entry.items()}
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})
