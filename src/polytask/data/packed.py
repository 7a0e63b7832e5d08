"""Datasets in tar files: WebDataset shards with an index, read at random from a folder or an object store."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b, file_digest
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, Literal

import fsspec.core
import numpy as np
import torch
from PIL import Image as Picture
from pydantic import Field
from torch import Tensor

from polytask.config import Slot, Spec, decode, encode, register
from polytask.data.base import DatasetSpec, ImageSize, Record
from polytask.data.cache import home
from polytask.data.files import DAMAGE
from polytask.data.pipelines import Pipeline, Plain
from polytask.errors import ConfigErrors, DataError, DatasetNotFoundError, MissingDependencyError
from polytask.files import locked, new_folder
from polytask.progress import track
from polytask.tasks.base import Task

_INDEX, _WINDOW = "index.json", 8
_HINT = "name what `polytask data pack` made, or pack again"
Sample = tuple[str, dict[str, tuple[int, int]]]
"""The id of a sample, and offset and bytes of its members."""


class Shard(Spec):
    """A tar file."""

    sha256: str
    samples: tuple[Sample, ...]


class Index(Spec):
    """What is in a packed folder; shards are named after split and number."""

    format: Literal["polytask-packed-1"] = "polytask-packed-1"
    dataset: str
    tasks: dict[str, Annotated[Task, Slot("task")]]
    splits: dict[str, tuple[Shard, ...]]

    def find(self, path: Path) -> Shard:
        """The shard with the name of a path."""
        split, _, number = path.stem.rpartition("-")
        return self.splits[split][int(number)]


# --- writing ---------------------------------------------------------------------------------------


def pack(
    spec: DatasetSpec,
    out: Path,
    splits: Sequence[str] = (),
    *,
    tasks: Mapping[str, Task] | None = None,
    per_shard: int = 256,
) -> dict[str, int]:
    """Write what is read of a dataset into a new folder; returns samples per split.

    Args:
        spec: the dataset.
        out: folder to make.
        splits: by default all.
        tasks: whose labels to keep, by default all.
        per_shard: samples per tar file.

    Raises:
        ConfigError: unknown split, or there is something at ``out`` already.
        DataError: something cannot be read, or is no label of its task.
    """
    tasks = dict(spec.labels() if tasks is None else tasks)
    for name in spec.EMPTY_IS_IGNORED & tasks.keys():
        tasks[name] = tasks[name].model_copy(update={"empty_is_ignored": True})
    found: dict[str, tuple[Shard, ...]] = {}
    with new_folder(out, "OUT") as draft:
        for split in splits or spec.split_names():
            spec.check_split(split)
            records, shards = spec.records(split), list[Shard]()
            spec.check_records(split, records, tasks)
            for start in track(range(0, len(records), per_shard), f"packing {split}"):
                path = draft / f"{split}-{len(shards):06d}.tar"
                shards.append(_write(spec, records[start : start + per_shard], tasks, path))
            found[split] = tuple(shards)
        index = encode(Index(dataset=spec.type, tasks=tasks, splits=found))
        (draft / _INDEX).write_text(json.dumps(index), encoding="utf-8")
    return {split: sum(len(shard.samples) for shard in shards) for split, shards in found.items()}


def _write(spec: DatasetSpec, records: Sequence[Record], tasks: Mapping[str, Task], path: Path) -> Shard:
    samples = list[Sample]()
    with tarfile.open(path, "w") as tar:
        for number, record in enumerate(records):
            samples.append((record.id, {}))
            for name, content in _members(spec, record, tasks):
                member = tarfile.TarInfo(f"{path.stem}-{number:06d}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
                start = tar.offset + -member.size // 512 * 512  # in whole blocks
                samples[-1][1][name] = (start, member.size)
    return Shard(sha256=_digest(path), samples=tuple(samples))


def _members(spec: DatasetSpec, record: Record, tasks: Mapping[str, Task]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a sample's files: id, image and labels, all without loss and checked."""
    yield "id.txt", record.id.encode()
    image = spec.read(record, "image")
    photo, pixels = record.files.get("image"), image.numpy()
    original = photo.read_bytes() if photo and photo.suffix.lower() in (".jpg", ".jpeg") else b""
    if original and np.array_equal(_decoded("image.jpg", original), pixels):
        yield "image.jpg", original
    else:
        yield _file("image", pixels)
    for name, task in tasks.items():
        if not task.of_image:
            raw = spec.read(record, name)
            spec.encode(record, name, task, raw, image)
            yield _file(name, raw.numpy())
    if "clip" in record.files:
        yield _file("clip", spec.read(record, "clip").numpy())


def _file(name: str, value: np.ndarray) -> tuple[str, bytes]:
    buffer, is_image = io.BytesIO(), name == "image"
    if value.dtype == np.uint8 and value.ndim == 2 + is_image:
        Picture.fromarray(np.moveaxis(value, 0, -1) if is_image else value).save(buffer, "PNG")
        return f"{name}.png", buffer.getvalue()
    np.save(buffer, value)
    return f"{name}.npy", buffer.getvalue()


def _decoded(name: str, content: bytes) -> np.ndarray:
    if name.endswith(".npy"):
        return np.asarray(np.load(io.BytesIO(content), allow_pickle=False))
    with Picture.open(io.BytesIO(content)) as picture:
        is_image = name.startswith("image.")
        return np.moveaxis(np.array(picture.convert("RGB")), -1, 0) if is_image else np.array(picture)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


# --- reading ---------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _open(root: str) -> tuple[Index, Path]:
    """What is there, and where its shards are, or for a URL are kept."""
    content = _of_store(root, _INDEX, lambda files, place: files.cat_file(place))
    try:
        index = decode(Index, json.loads(content))
    except (ValueError, ConfigErrors) as error:
        raise DataError(f"damaged index ({error})", where=f"{root}/{_INDEX}", hint=_HINT) from None
    kept = home() / "packed" / blake2b(root.encode() + content, digest_size=8).hexdigest()
    return index, kept if "://" in root else Path(root)


def _of_store(root: str, name: str, use: Callable[[Any, str], Any]) -> Any:
    """What ``use`` makes of a file system and the path in it of a file below the root."""
    where = f"{root}/{name}"
    try:
        return use(*fsspec.core.url_to_fs(where))
    except ImportError as error:  # of the package for this kind of store
        raise MissingDependencyError(str(error), where=where) from None
    except FileNotFoundError:
        kind = DatasetNotFoundError if name == _INDEX else DataError
        raise kind("no such file", where=where, hint=_HINT) from None
    except Exception as error:  # whatever a store raises
        raise DataError(f"file cannot be read ({error!r})", where=where) from None


@register("data")
class Packed(DatasetSpec):
    """What ``polytask data pack`` made of a dataset, in a folder or behind an fsspec URL such as s3://."""

    type: Literal["packed"] = "packed"
    root: str = Field(description="folder with index.json, or its URL (s3://bucket/name, https://…)")
    image_size: ImageSize = Field(default=(256, 256), description="height and width the model sees")
    pipeline: Annotated[Pipeline, Slot("pipeline")] = Plain()
    window: int | None = Field(
        default=None, ge=1, description="shards mixed in training; all of a folder, 8 of a URL if unset"
    )
    keep: int | None = Field(default=None, ge=2, description="shards of a URL in the cache; all if unset")

    TASKS: ClassVar[Mapping[str, Task]] = {}
    SPLITS: ClassVar[tuple[str, ...]] = ()

    def labels(self) -> Mapping[str, Task]:
        """The tasks of the dataset that was packed."""
        return _open(self.root)[0].tasks

    def split_names(self) -> tuple[str, ...]:
        """The splits that were packed."""
        return tuple(_open(self.root)[0].splits)

    def records(self, split: str) -> list[Record]:
        """The samples in the order they had."""
        self.check_split(split)
        (index, folder), found = _open(self.root), list[Record]()
        for number, shard in enumerate(index.splits[split]):
            names = [member.rpartition(".")[0] for member in shard.samples[0][1]]
            files = dict.fromkeys(names, folder / f"{split}-{number:06d}.tar")
            found += [Record(name, files, i) for i, (name, _) in enumerate(shard.samples)]
        return found

    def read(self, record: Record, name: str) -> Tensor:
        """One field as it was read when it was packed; of a URL, the shard is fetched first."""
        path = record.files[name]
        members = _open(self.root)[0].find(path).samples[record.index][1]
        member = next(member for member in members if member.rpartition(".")[0] == name)
        offset, size = members[member]
        with self._shard(path) as file:
            file.seek(offset)
            content = file.read(size)
        try:
            return torch.from_numpy(_decoded(member, content))
        except DAMAGE as error:
            what = f"{member} cannot be decoded ({error})"
            raise DataError(what, where=record.where(name), hint=_HINT) from None

    def audit(self, split: str, tasks: Collection[str]) -> list[str]:  # noqa: ARG002 - of no task
        """Shards of a folder that are not as they were written; those of a URL are checked when fetched."""
        index, folder = _open(self.root)
        paths = [folder / f"{split}-{number:06d}.tar" for number in range(len(index.splits[split]))]
        altered = [p for p in paths if p.is_file() and _digest(p) != index.find(p).sha256]
        return [f"{path}: content was altered; {_HINT}" for path in altered]

    def shuffle(self, records: Sequence[Record], generator: torch.Generator) -> list[int]:
        """Any order, or shards in any order and samples in any order within ``window`` of them."""
        window = self.window or (_WINDOW if "://" in self.root else None)
        if window is None:
            return super().shuffle(records, generator)
        shards = [[*g] for _, g in groupby(range(len(records)), lambda i: records[i].files["image"])]
        mixed, order = torch.randperm(len(shards), generator=generator).tolist(), list[int]()
        for start in range(0, len(mixed), window):
            pool = [i for shard in mixed[start : start + window] for i in shards[shard]]
            order += [pool[i] for i in torch.randperm(len(pool), generator=generator).tolist()]
        return order

    def _shard(self, path: Path) -> BinaryIO:
        try:
            return path.open("rb")
        except FileNotFoundError:
            if "://" in self.root:
                return self._fetch(path)
            raise DataError("no such shard", where=str(path), hint=_HINT) from None

    def _fetch(self, path: Path) -> BinaryIO:
        """Bring a shard into the cache, once for all processes and whole; perhaps remove the oldest."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        with locked(path.with_name(".lock")):
            if not path.exists():
                _of_store(self.root, path.name, lambda files, place: files.get_file(place, str(draft)))
                if _digest(draft) != _open(self.root)[0].find(path).sha256:
                    raise DataError("shard was altered", where=f"{self.root}/{path.name}", hint=_HINT)
                draft.replace(path)
            file = path.open("rb")
            kept = sorted(path.parent.glob("*.tar"), key=lambda p: p.stat().st_mtime_ns)
            for old in kept[: -self.keep] if self.keep else ():
                old.unlink()  # who has it open can still read it
            return file
