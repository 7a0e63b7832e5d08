"""Images and labels of one's own, described in the recipe: where the files are, and what they hold."""

from __future__ import annotations

import csv
import glob
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import torch
from PIL import Image as Picture
from pydantic import Field, model_validator
from torch import Tensor

from polytask import tasks as _tasks  # noqa: F401 - registers
from polytask.config import Location, Slot, Spec, register
from polytask.data.base import DatasetSpec, Record
from polytask.data.files import check_folders, check_listed, picture_size, read_array, read_list, read_picture
from polytask.data.maps import IGNORE
from polytask.data.pipelines import Pipeline, Plain
from polytask.errors import DataError, DatasetNotFoundError
from polytask.tasks.attributes import Attributes
from polytask.tasks.base import Task, TaskName
from polytask.tasks.classification import Classification
from polytask.tasks.normals import about_unit

_OPTIONAL = "set data.targets.{}.optional=true if that is right"
_LIST = "list images from the root"
_FIELD = re.compile(r"\{(\w*)\}")
_FIELDS = ("stem", "star", "folder", "split")
_NUMBERS = ("L", "P", "1", "I", "I;16", "F")  # Pillow's modes of pictures whose pixels are numbers


class Target(Spec):
    """Where the labels of one task are, and what is in them."""

    task: Annotated[Task, Slot("task")]
    file: str = Field(default="", description="label map, with placeholders, or .csv, from the root")
    ids: dict[int, int] | None = Field(default=None, description="stored id to class; others are unknown")
    scale: float | tuple[float, float, float] | None = Field(
        default=None, description="what stored values are multiplied by, perhaps per channel"
    )
    ignore: float | Literal["nan"] | None = Field(default=None, description="stored value of unknown pixels")
    optional: bool = Field(default=False, description="images without a label are unknown, and no error")

    @model_validator(mode="after")
    def _fits_task(self) -> Self:
        dense, whole = self.task.dense, self.task.of_image
        if self.file.endswith(".csv") == dense or bool(self.file) == whole:
            kind = "takes no file" if whole else "needs a file per image" if dense else "needs a .csv file"
            raise ValueError(f"a task of type {self.task.type} {kind}, got {self.file!r}")
        if (whole or not dense) and (self.ids, self.scale, self.ignore) != (None,) * 3:
            raise ValueError("only label maps take `ids`, `scale` and `ignore`")
        if isinstance(self.scale, tuple) and self.task.unknown(1, 1).ndim != 3:
            raise ValueError(f"a task of type {self.task.type} needs one number as `scale`")
        unknown = [name for name in _FIELD.findall(self.file) if name not in _FIELDS]
        if unknown:
            raise ValueError(f"unknown placeholder {{{unknown[0]}}} (known: {', '.join(_FIELDS)})")
        return self

    def table(self, root: Path, name: str) -> dict[str, list[str]]:
        """The cells of the .csv for each image that its first column names; empty for maps."""
        if self.task.dense:
            return {}
        path, columns = root / self.file, self.task.names if isinstance(self.task, Attributes) else (name,)
        try:
            with path.open(encoding="utf-8-sig", newline="") as lines:
                rows = list(csv.DictReader(lines, restval=""))
        except (OSError, ValueError, csv.Error) as error:
            raise DatasetNotFoundError(f"table cannot be read ({error})", where=str(path)) from None
        for column in columns:
            if rows and column not in rows[0]:
                raise DataError("table lacks a column", where=str(path), got=list(rows[0]), expected=column)
        return {next(iter(row.values())): [row[column] for column in columns] for row in rows}

    def numbers(self, cells: Sequence[str], where: str) -> Tensor:
        """The raw label that cells of the table stand for; raises DataError if they stand for none."""
        classes = self.task.classes if isinstance(self.task, Classification) else ()
        found = []
        for text in cells:
            try:
                found.append(classes.index(text) if text in classes else int(text or -1))
            except ValueError:
                expected = f"{', '.join(classes) or 'a number'}, or nothing where unknown"
                raise DataError("unknown label", where=where, got=text, expected=expected) from None
        return torch.tensor(found if isinstance(self.task, Attributes) else found[0])

    def decode(self, path: Path) -> Tensor:
        """The raw label in a file: ids mapped, values scaled, unknown pixels marked.

        Raises:
            DataError: unreadable, of another shape, or with 255 that has no stated meaning.
        """
        unknown = self.task.unknown(1, 1).numpy()
        if path.suffix == ".npy":
            stored = read_array(path, (unknown.ndim,))
        else:
            stored = read_picture(path, *(("RGB",) if unknown.ndim == 3 else _NUMBERS))
        if stored.shape[2:] != unknown.shape[2:]:
            shape = f"height x width x {unknown.shape[2]}"
            raise DataError(
                "map of an unexpected shape", where=str(path), got=list(stored.shape), expected=shape
            )
        if unknown.max() == IGNORE and self.ids is None and self.ignore is None and (stored == IGNORE).any():
            hint = "say `ignore: 255` if it marks unlabeled pixels, or `ids: {0: 0, 255: 1}` if it is a class"
            raise DataError("label map with 255, which may mean two things", where=str(path), hint=hint)
        hole: np.ndarray = ~np.isfinite(stored) if self.ignore == "nan" else stored == self.ignore
        values = stored.astype(np.float32 if stored.dtype.kind == "f" else np.int64)
        if self.ids is not None:
            values = np.full_like(values, unknown.max())
            for old, new in self.ids.items():
                values[stored == old] = new
        elif stored.ndim == 3 and path.suffix != ".npy":
            values = stored / np.float32(127.5) - 1
        if self.scale is not None:
            values = values * np.asarray(self.scale, np.float32)
        values[hole.all(-1) if hole.ndim == 3 else hole] = unknown.max()
        if stored.ndim == 3:
            about_unit(torch.from_numpy(values).permute(2, 0, 1), str(path))
            values = values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)
        return torch.from_numpy(values)


@register("data")
class Folder(DatasetSpec):
    """Own images and labels, without code: patterns of file names, and a task for each kind of label."""

    type: Literal["folder"] = "folder"
    root: Location = Field(description="folder that all patterns start from")
    splits: dict[str, str] = Field(min_length=1, description="pattern of images, or .txt list, per split")
    targets: dict[TaskName, Target] = Field(min_length=1, description="what there are labels for, by task")
    pipeline: Annotated[Pipeline, Slot("pipeline")] = Plain()

    def labels(self) -> Mapping[str, Task]:
        """The tasks of the targets."""
        return {name: target.task for name, target in self.targets.items()}

    def split_names(self) -> tuple[str, ...]:
        """The keys of ``splits``."""
        return tuple(self.splits)

    def records(self, split: str) -> list[Record]:
        """The images of a split, sorted by name, or in the order of its list."""
        self.check_split(split)
        check_folders(self.root, (), "set data.root")
        tables = {name: target.table(self.root, name) for name, target in self.targets.items()}
        return [self._record(path, split, tables) for path in self._images(split)]

    def check_records(self, split: str, records: Sequence[Record], tasks: Collection[str]) -> None:
        """All photos of a list are there, and so are their labels; those of tables mean something."""
        listing = self.root / self.splits[split]
        if listing.suffix == ".txt":
            check_listed([record.files["image"] for record in records], listing, _LIST)
        for name in tasks:
            target = self.targets[name]
            labels = {r.id: r.files[name] for r in records if name in r.files and name not in r.values}
            bare = [image for image, path in labels.items() if not (target.task.dense and path.is_file())]
            if bare:
                what = f"{len(bare)} of {len(records)} images have no label {name!r}, first {bare[0]}"
                where, hint = str(self.root), _OPTIONAL.format(name)
                raise DatasetNotFoundError(what, where=where, expected=target.file, hint=hint)
            for record in (r for r in records if name in r.values):
                self.read(record, name)

    def read(self, record: Record, name: str) -> Tensor:
        """The photo, or a label as its target says (see ``DatasetSpec.read``)."""
        path = record.files.get(name)
        if name == "image":
            return torch.from_numpy(read_picture(record.files[name], "RGB")).permute(2, 0, 1)
        target = self.targets[name]
        if name in record.values:
            return target.numbers(record.values[name], record.where(name))
        if path is None:
            width, height = picture_size(record.files["image"])
            return target.task.unknown(height, width)
        if not (target.task.dense and path.is_file()):
            what = "no such file" if target.task.dense else f"table has no row for {record.id}"
            raise DataError(what, where=str(path), hint=_OPTIONAL.format(name))
        return target.decode(path)

    def _images(self, split: str) -> list[Path]:
        pattern, kinds = self.splits[split], Picture.registered_extensions()
        if pattern.endswith(".txt"):
            paths = [self.root / name for name in read_list(self.root / pattern, _LIST)]
        else:
            names = sorted(glob.glob(pattern, root_dir=self.root, recursive=True))
            paths = [self.root / name for name in names if Path(name).suffix.lower() in kinds]
        if not paths:
            what, expected = f"no image in {self.root} matches", f"a pattern such as images/{split}/*.jpg"
            raise DatasetNotFoundError(what, where=f"data.splits.{split}", got=pattern, expected=expected)
        return paths

    def _record(self, path: Path, split: str, tables: Mapping[str, Mapping[str, list[str]]]) -> Record:
        own = path.relative_to(self.root) if path.is_relative_to(self.root) else path
        pattern = self.splits[split]
        before, _, after = ("*" if pattern.endswith(".txt") else Path(pattern).stem).rpartition("*")
        star = path.stem.removeprefix(before).removesuffix(after)
        fields = dict(zip(_FIELDS, (path.stem, star, own.parent.as_posix(), split), strict=True))
        files, values = {"image": path}, dict[str, list[str]]()
        for name, target in self.targets.items():
            label = self.root / _FIELD.sub(lambda m: fields[m[1]], target.file)
            known = [key for key in (own.as_posix(), path.name, path.stem) if key in tables[name]]
            if known:
                values[name] = tables[name][known[0]]
            if target.file and (known or not target.optional or (target.task.dense and label.is_file())):
                files[name] = label
        return Record(own.as_posix(), files, values=values)
