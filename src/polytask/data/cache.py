"""Decoded label maps in memory-mapped files, so that what is slow to read is read once.

An entry holds what ``DatasetSpec.read`` returned. It counts as long as the dataset's code and the content of
all files of the record are the same. Content is compared by hash, but only of files whose size or times are
not those they had when it was taken; ``prepare`` always compares it. Real values are kept without loss, as
places in a table of those that occur. Entries appear whole or not at all, so any number of processes may
share a folder.
"""

from __future__ import annotations

import inspect
import os
import uuid
import warnings
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor
from torch.utils.data import DataLoader

from polytask.errors import ConfigError, DataError, PolytaskWarning
from polytask.progress import track

if TYPE_CHECKING:
    from polytask.data.base import DatasetSpec, Record
    from polytask.tasks.base import Task

VERSION = 2  # of the format and of what readers share; raise it when the same files give other labels
_IRRELEVANT = {"image_size", "pipeline", "batch_size", "eval_batch_size", "workers", "label_cache"}


def home() -> Path:
    """The folder for everything that is kept: ``$POLYTASK_CACHE``, else ``~/.cache/polytask``."""
    return Path(os.environ.get("POLYTASK_CACHE") or "~/.cache/polytask").expanduser()


def label_folder(spec: DatasetSpec) -> Path | None:
    """Where labels read under these settings are kept; None if nowhere."""
    if spec.label_cache == "never":
        return None
    root = home() if spec.label_cache == "auto" else Path(spec.label_cache).expanduser()
    settings = spec.model_dump_json(exclude=_IRRELEVANT, serialize_as_any=True)
    return root / f"labels-v{VERSION}" / f"{spec.type}-{_digest(settings)}"


def read_cached(spec: DatasetSpec, record: Record, name: str, *, thorough: bool = False) -> Tensor:
    """What ``spec.read`` returns for a label map (integers as uint8 if they fit), kept if settings say so.

    With ``thorough`` the content of the files is compared even if nothing tells that it has changed.
    """
    folder = label_folder(spec)
    if folder is None or (spec.label_cache == "auto" and not (name in spec.SLOW and folder.is_dir())):
        return spec.read(record, name)
    paths = sorted({str(path) for field, path in record.files.items() if field not in record.values})
    try:
        states = [_state(path) for path in paths]
    except OSError:  # perhaps of a file that this label does not need
        return spec.read(record, name)
    entry = f"{quote(record.id, safe='')[:150]}-{_digest(repr((paths, record.index)))}"
    path, facts = folder / name / entry, {"code": _code(type(spec)), "states": repr(states)}
    kept, before = _load(path, facts["code"]) or (None, {})
    if kept is not None and before["states"] == facts["states"] and not thorough:
        return kept
    try:
        facts["content"] = " ".join(map(_hash, paths, states))
    except OSError:
        return spec.read(record, name)
    if kept is None or before["content"] != facts["content"]:
        kept, before = spec.read(record, name), {}
    if before.get("states") != facts["states"]:
        _keep(path, facts, kept.numpy())
    return kept


def _state(path: str) -> tuple[int, int, int]:
    """Size and times: no program can change a file and set the last of them, which is that of any change."""
    state = os.stat(path)
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns


@lru_cache(maxsize=4096)  # a record has several labels, and a file may hold many records
def _hash(path: str, _state: tuple[int, int, int]) -> str:
    with open(path, "rb") as file:
        return file_digest(file, partial(blake2b, digest_size=16)).hexdigest()


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=6).hexdigest()


@lru_cache
def _code(cls: type[DatasetSpec]) -> str:
    """Hash of the module of a dataset; without a file, as in a notebook, another one in each process."""
    try:
        return _digest(Path(inspect.getfile(cls)).read_text(encoding="utf-8"))
    except (OSError, TypeError):
        return uuid.uuid4().hex


# --- entries ---------------------------------------------------------------------------------------


def _load(path: Path, code: str) -> tuple[Tensor, dict[str, str]] | None:
    """The label and what is known about its files, unless other code has made it."""
    try:
        with safe_open(path, "np") as file:
            facts, codes, table = file.metadata(), file.get_tensor("codes"), file.get_tensor("table")
        if facts["code"] != code:
            return None
        if facts["sum"] != str(zlib.crc32(codes.data, zlib.crc32(table.data))):
            raise ValueError("its check sum differs")
        return torch.from_numpy(table.take(codes) if len(table) else codes), facts
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
        text = f"{path}: kept label is damaged ({error}) and will be made again"
        warnings.warn(PolytaskWarning(text), stacklevel=2)
        return None


def _keep(path: Path, facts: dict[str, str], value: np.ndarray) -> None:
    codes, table = _exact(np.ascontiguousarray(value))
    known = {**facts, "sum": str(zlib.crc32(codes.data, zlib.crc32(table.data)))}
    draft = path.with_name(f".{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(save({"codes": codes, "table": table}, known))
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        _warn_once(path.parent.parent, error.strerror or "")


@lru_cache
def _warn_once(folder: Path, reason: str) -> None:
    text = f"{folder}: labels cannot be kept ({reason}), so their files are read each time"
    warnings.warn(PolytaskWarning(text), stacklevel=2)


def _exact(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values as they are, small integers as bytes, or real values as places in a table of up to 65,536."""
    if value.dtype.kind == "f":
        table, codes = np.unique(value, return_inverse=True)
        if len(table) <= 2**16:
            return codes.reshape(value.shape).astype(np.uint8 if len(table) <= 2**8 else np.uint16), table
    elif value.size and 0 <= value.min() <= value.max() <= 255:
        value = value.astype(np.uint8)
    return value, np.empty(0, np.float32)


# --- filling ---------------------------------------------------------------------------------------


def prepare(
    spec: DatasetSpec,
    splits: Sequence[str] | None = None,
    workers: int = 0,
    tasks: Mapping[str, Task] | None = None,
) -> dict[str, Any]:
    """Decode the slow labels of some splits and tasks (by default all) into the cache.

    ``workers`` more processes help. Labels that are there already stay, if the content of their files is
    what it was. Returns folder, labels, counts per split and problems. Raises
    ConfigError if nothing is to be kept.
    """
    folder = label_folder(spec)
    if folder is None:
        raise ConfigError("no labels are kept", where=f"data.{spec.type}.label_cache", got="never")
    chosen = spec.labels() if tasks is None else tasks
    dense = [name for name, task in chosen.items() if task.dense and not task.of_image]
    names = [name for name in dense if spec.label_cache != "auto" or name in spec.SLOW]
    folder.mkdir(parents=True, exist_ok=True)
    _hash.cache_clear()  # the files may have changed since
    counts, problems = {}, list[str]()
    for split in splits or spec.split_names():
        spec.check_split(split)
        records, decode = spec.records(split), partial(_decode, spec, names)
        for record in records[:1]:  # what is wrong with all of them shows here
            decode(record)
        done = DataLoader[Any](records, None, num_workers=workers, collate_fn=decode)  # type: ignore[arg-type]
        for found in track(done, f"decoding labels ({split})", len(records)):
            problems += found
        counts[split] = len(records)
    return {"folder": str(folder), "labels": names, "counts": counts, "problems": problems}


def _decode(spec: DatasetSpec, names: Sequence[str], record: Record) -> list[str]:
    problems = []
    for name in names:
        try:
            read_cached(spec, record, name, thorough=True)
        except DataError as error:
            problems.append(str(error))
    return problems
