"""The embedded dataset: rendered rooms with exact labels, made on first use and kept in a cache."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import uuid
import warnings
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from polytask.config import Slot, register
from polytask.data.base import DatasetSpec, ImageSize, Record
from polytask.data.cache import home
from polytask.data.maps import unit
from polytask.data.pipelines import Pipeline, Plain
from polytask.data.scenes import ATTRIBUTES, CLASSES, PARTS, SCENES, VERSION, render
from polytask.errors import ConfigError, DataError, PolytaskWarning
from polytask.files import locked
from polytask.progress import track
from polytask.tasks.attributes import Attributes
from polytask.tasks.base import Task
from polytask.tasks.classification import Classification
from polytask.tasks.depth import Depth
from polytask.tasks.edge import Boundary, Edge
from polytask.tasks.normals import Normals
from polytask.tasks.saliency import Saliency
from polytask.tasks.segmentation import Segmentation

Difficulty = Literal["easy", "standard", "hard"]
_MASKS = ("semseg", "human_parts", "saliency", "edge")
_VISIBLE = 500  # an object on fewer than one in so many pixels does not count as shown
_SLICE = 16  # images one worker renders at a time
_SERIAL_PIXELS = 2_000_000  # below this, starting workers takes longer than rendering
_RENDERING = "POLYTASK_RENDERING"  # set for workers, and for scripts that they import again


class Preset(NamedTuple):
    """Picture size and number of images."""

    height: int
    width: int
    train: int
    val: int
    test: int


PRESETS = {
    "nano": Preset(32, 48, 64, 32, 32),
    "tiny": Preset(64, 96, 1_536, 256, 256),
    "small": Preset(96, 128, 3_072, 512, 512),
    "full": Preset(192, 256, 8_192, 1_024, 1_024),
}
FIRST_SEED = {"train": 0, "val": 1_000_000, "test": 2_000_000, "pretrain": 5_000_000}


class Job(NamedTuple):
    """What one folder of the cache holds: consecutive seeds from one on."""

    height: int
    width: int
    difficulty: Difficulty
    first_seed: int
    images: int

    def layout(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each file."""
        n, h, w = self.images, self.height, self.width
        masks = {name: ((n, h, w), "u1") for name in _MASKS}
        dense = {
            "image": ((n, h, w, 3), "u1"),
            **masks,
            "depth": ((n, h, w), "f2"),
            "normals": ((n, h, w, 3), "f2"),
        }
        return {**dense, "scene": ((n,), "u1"), "attributes": ((n, len(ATTRIBUTES)), "u1")}


@register("data")
class Rooms(DatasetSpec):
    """Rendered rooms: an image is a pure function of its seed, so nothing is downloaded.

    The split ``pretrain`` has seeds of its own, for training a backbone on image-level labels (``scene``,
    ``attributes``, ``objects``) of images that the dense tasks never see.
    """

    type: Literal["rooms"] = "rooms"
    preset: Literal["nano", "tiny", "small", "full"] = Field(
        default="tiny", description="picture size and counts"
    )
    difficulty: Difficulty = "standard"
    image_size: ImageSize = Field(default=(64, 96), description="height and width; by default the preset's")
    pipeline: Annotated[Pipeline, Slot("pipeline")] = Plain()
    pretrain_size: int | None = Field(
        default=None, ge=1, description="images to pretrain on; as train if unset"
    )
    cache: Path | None = Field(default=None, description="else $POLYTASK_CACHE, else ~/.cache/polytask")

    SPLITS: ClassVar[tuple[str, ...]] = ("train", "val", "test", "pretrain")
    TASKS: ClassVar[Mapping[str, Task]] = {
        "semseg": Segmentation(classes=CLASSES),
        "human_parts": Segmentation(classes=PARTS, weight=2.0),
        "saliency": Saliency(weight=5.0),
        "normals": Normals(weight=10.0),
        "depth": Depth(max_depth=20.0),
        "edge": Edge(weight=50.0, boundary=Boundary(max_dist=0.011)),
        "scene": Classification(classes=SCENES),
        "attributes": Attributes(names=ATTRIBUTES),
        "objects": Attributes(names=CLASSES[1:]),
    }
    EMPTY_IS_IGNORED: ClassVar[frozenset[str]] = frozenset({"human_parts"})

    @model_validator(mode="before")
    @classmethod
    def _size_of_preset(cls, data: Any) -> Any:
        if isinstance(data, dict) and "image_size" not in data and data.get("preset") in PRESETS:
            return {**data, "image_size": PRESETS[data["preset"]][:2]}
        return data

    def records(self, split: str) -> list[Record]:
        """The images of a split in the order of their seeds; renders them if the cache has none."""
        self.check_split(split)
        job, folder = self.job(split), self.folder(split)
        if not folder.exists():
            _fill(folder, job, split)
        _check_sizes(folder)
        files = {name: folder / f"{name}.npy" for name in job.layout()}
        return [Record(f"{job.first_seed + i:07d}", files, i) for i in range(job.images)]

    def read(self, record: Record, name: str) -> Tensor:
        """One field out of the memory-mapped cache."""
        if name == "objects":
            return self._objects(record)
        value = torch.from_numpy(_mapped(record.files[name])[record.index : record.index + 1].copy())[0]
        if name == "image":
            return value.permute(2, 0, 1)
        if name == "normals":  # unit length got lost in half precision
            return unit(value.float().permute(2, 0, 1)).permute(1, 2, 0)
        return value.float() if value.is_floating_point() else value

    def _objects(self, record: Record) -> Tensor:
        """Which kinds of object cover at least ``1 / _VISIBLE`` of the image: uint8 ``[12]``."""
        semseg = self.read(record, "semseg").long()
        counts = semseg.flatten().bincount(minlength=len(CLASSES))
        return (counts[1:] * _VISIBLE >= semseg.numel()).to(torch.uint8)

    def audit(self, split: str, tasks: Collection[str]) -> list[str]:  # noqa: ARG002 - of no task
        """Files of the cache that differ from what was rendered."""
        folder = self.folder(split)
        return [
            f"{folder / name}: content was altered; delete {folder} to have it rendered again"
            for name, facts in _facts(folder)["files"].items()
            if _digest(folder / name) != facts["sha256"]
        ]

    def job(self, split: str) -> Job:
        """What has to be rendered for a split."""
        preset = PRESETS[self.preset]
        counts = preset._asdict() | {"pretrain": self.pretrain_size or preset.train}
        return Job(preset.height, preset.width, self.difficulty, FIRST_SEED[split], counts[split])

    def folder(self, split: str) -> Path:
        """Where the cache of a split is."""
        root = self.cache or home()
        job = self.job(split)
        name = f"{split}-{job.images}-{job.height}x{job.width}"
        return root.expanduser() / f"rooms-v{VERSION}" / f"{self.preset}-{self.difficulty}" / name

    @model_validator(mode="after")
    def _check_cache(self) -> Self:
        if self.cache is not None and self.cache.is_file():
            raise ValueError(f"cache must be a folder, {self.cache} is a file")
        return self


# --- reading the cache -----------------------------------------------------------------------------


def _mapped(path: Path) -> np.ndarray:
    try:
        return _map(path, path.stat().st_mtime_ns)
    except (OSError, ValueError) as error:
        raise DataError(
            f"cache cannot be read ({error})", where=str(path), hint=_again(path.parent)
        ) from None


@lru_cache(maxsize=128)
def _map(path: Path, _stamp: int) -> np.ndarray:
    array: np.ndarray = np.load(path, mmap_mode="r")
    return array


def _again(folder: Path) -> str:
    return f"delete {folder} to have it rendered again"


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cache is damaged ({error})", where=str(path), hint=_again(folder)) from None
    return facts


def _check_sizes(folder: Path) -> None:
    for name, facts in _facts(folder)["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != facts["bytes"]:
            raise DataError(
                "file of the cache is missing"
                if size is None
                else "file of the cache is truncated or altered",
                where=str(path),
                got=None if size is None else f"{size} bytes",
                expected=f"{facts['bytes']} bytes",
                hint=_again(folder),
            )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- filling the cache -----------------------------------------------------------------------------


def _fill(folder: Path, job: Job, split: str) -> None:
    """Render into a temporary folder and rename it, so that nobody ever sees half a cache."""
    if os.environ.get(_RENDERING):
        raise ConfigError(
            "a rendering worker runs the main script again",
            where=str(sys.argv[0]),
            hint='put what the script does under `if __name__ == "__main__":`',
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock")):
        if folder.exists():  # another process was faster
            return
        draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        draft.mkdir()
        try:
            _render(draft, job, f"rendering rooms ({split})")
            _seal(draft, job)
            _publish(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _publish(draft: Path, folder: Path) -> None:
    try:
        draft.rename(folder)
    except OSError:
        if not folder.exists():
            raise


def _seal(draft: Path, job: Job) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(draft.glob("*.npy"))
    }
    facts = {"version": VERSION, **job._asdict(), "files": files}
    (draft / "meta.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def _render(draft: Path, job: Job, description: str) -> None:
    layout = job.layout()
    needed = sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in layout.values())
    free = shutil.disk_usage(draft).free
    if free < 1.1 * needed:
        hint = "free some space or set POLYTASK_CACHE to another disk"
        raise DataError(
            "disk is too full", where=str(draft.parent), got=free, expected=f"{needed} bytes", hint=hint
        )
    for name, (shape, kind) in layout.items():
        np.lib.format.open_memmap(draft / f"{name}.npy", mode="w+", dtype=kind, shape=shape).flush()
    starts = range(0, job.images, _SLICE)
    workers = min(_cores(), len(starts))
    done = 0
    if workers > 1 and job.images * job.height * job.width > _SERIAL_PIXELS:
        try:
            for start in track(_in_parallel(draft, job, starts, workers), description, len(starts)):
                done = start + _SLICE
        except BrokenProcessPool:
            warnings.warn(
                PolytaskWarning("workers could not be used; rendering in this process"), stacklevel=2
            )
    for start in track(range(done, job.images, _SLICE), description):
        _render_slice(draft, job, start)


def _in_parallel(draft: Path, job: Job, starts: range, workers: int) -> Iterator[int]:
    settings = {_RENDERING: "1", "OMP_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(_render_slice, draft, job, start) for start in starts]
            yield from (future.result() for future in futures)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _render_slice(draft: Path, job: Job, start: int) -> int:
    """Render up to ``_SLICE`` images into the files; runs in worker processes."""
    files = {name: np.load(draft / f"{name}.npy", mmap_mode="r+") for name in job.layout()}
    for i in range(start, min(start + _SLICE, job.images)):
        scene = render(job.first_seed + i, job.height, job.width, job.difficulty)
        for name, file in files.items():
            file[i] = scene[name]
    for file in files.values():
        file.flush()
    return start


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
