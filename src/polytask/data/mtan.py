"""NYUv2 and Cityscapes as the authors of MTAN preprocessed them: small numbered arrays."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from polytask.config import Location, Slot, register
from polytask.data import cityscapes
from polytask.data.base import DatasetSpec, ImageSize, Record
from polytask.data.crops import Mtan
from polytask.data.files import check_folders, read_array
from polytask.data.maps import IGNORE
from polytask.data.pipelines import Pipeline
from polytask.errors import DataError, DatasetNotFoundError
from polytask.tasks.base import Task
from polytask.tasks.depth import Depth
from polytask.tasks.normals import Normals
from polytask.tasks.segmentation import Segmentation

NYU_CLASSES = (
    "bed", "books", "ceiling", "chair", "floor", "furniture", "objects", "picture", "sofa", "table", "tv",
    "wall", "window",
)  # fmt: skip
_ARCHIVE = "download it by the link in the README of github.com/lorenmt/mtan and set `root` to its folder"


class MtanDataset(DatasetSpec):
    """Base of the two: ``<split>/<folder>/<number>.npy`` below the root."""

    root: Location = Field(description="the folder that holds train and val")
    pipeline: Annotated[Pipeline, Slot("pipeline")] = Mtan()
    batch_size: int = Field(default=8, ge=1, description="training samples per step, over all processes")

    SPLITS: ClassVar[tuple[str, ...]] = ("train", "val", "trainval")
    FOLDERS: ClassVar[Mapping[str, str]]
    """Where the fields are, all but ``semseg``, which is in ``label_<classes>`` or else in ``label``."""

    def records(self, split: str) -> list[Record]:
        """The images of the split in the order of their numbers; ``trainval`` is the one and the other."""
        self.check_split(split)
        return [r for part in ("train", "val") if part in split for r in self._numbered(part)]

    def audit(self, split: str, tasks: Collection[str]) -> list[str]:  # noqa: ARG002 - of no task
        """Labels without an image."""
        known = {path for record in self.records(split) for path in record.files.values()}
        folders = sorted({path.parent for path in known})
        found = sorted(path for folder in folders for path in folder.glob("[0-9]*.npy"))
        return [f"{path}: there is no image for it; {_ARCHIVE}" for path in found if path not in known]

    def _numbered(self, split: str) -> list[Record]:
        folder, choices = self.root / split, (f"label_{self.labels()['semseg'].channels}", "label")
        check_folders(self.root, (split,), _ARCHIVE)
        check_folders(folder, (*self.FOLDERS.values(), choices), _ARCHIVE)
        names = {"semseg": next(c for c in choices if (folder / c).exists()), **self.FOLDERS}
        numbers = [int(path.stem) for path in (folder / "image").glob("*.npy") if path.stem.isdigit()]
        if not numbers:
            raise DatasetNotFoundError("no files 0.npy, 1.npy, …", where=str(folder / "image"), hint=_ARCHIVE)
        return [
            Record(f"{split}-{n}", {field: folder / name / f"{n}.npy" for field, name in names.items()})
            for n in sorted(numbers)
        ]

    def read(self, record: Record, name: str) -> Tensor:
        """One field (see ``DatasetSpec.read``); images are float32 in 0..255, as they were resized."""
        array = read_array(record.files[name], {"semseg": (2,), "depth": (2, 3)}.get(name, (3,)))
        if name == "image":
            return _image(array, record.where(name))
        if name == "semseg":
            return _labels(array, record.where(name))
        single = name == "depth" and array.shape[2:] == (1,)
        return torch.from_numpy(array[..., 0] if single else array)


def _image(array: np.ndarray, where: str) -> Tensor:
    """``[H, W, 3]`` in 0..1, with some room for the overshoot of a resize, to ``[3, H, W]`` in 0..255."""
    low, high = float(array.min(initial=0)), float(array.max(initial=0))
    if array.shape[2] != 3 or array.dtype.kind != "f" or not (low > -0.1 and high < 1.1):
        got = f"{array.dtype} {array.shape} from {low:g} to {high:g}"
        raise DataError("unexpected image", where=where, got=got, expected="[H, W, 3] of fractions in 0..1")
    return torch.from_numpy(array).permute(2, 0, 1).float() * 255


def _labels(array: np.ndarray, where: str) -> Tensor:
    """Class ids ``[H, W]``, stored as floats with -1 for unlabeled pixels, to int64 with 255."""
    whole = np.isfinite(array) & (array == np.rint(array))
    if not whole.all():
        raise DataError("label map with a value that is no integer", where=where, got=float(array[~whole][0]))
    ids = torch.from_numpy(array).long()
    return ids.masked_fill(ids == -1, IGNORE)


@register("data")
class Nyuv2(MtanDataset):
    """795 training and 654 test photos of rooms at 288x384 with three tasks, as MTAN and LibMTL use them."""

    type: Literal["nyuv2"] = "nyuv2"
    image_size: ImageSize = Field(default=(288, 384), description="height and width the model sees")

    TASKS: ClassVar[Mapping[str, Task]] = {
        "semseg": Segmentation(classes=NYU_CLASSES),
        "depth": Depth(),
        "normals": Normals(),
    }
    FOLDERS: ClassVar[Mapping[str, str]] = {"image": "image", "depth": "depth", "normals": "normal"}


@register("data")
class CityscapesSmall(MtanDataset):
    """2,975 training and 500 validation street scenes at 128x256 with two tasks, as MTAN and LibMTL use them.

    ``depth`` is inverse depth (disparity), normalized; its scores are in that unit.
    """

    type: Literal["cityscapes_small"] = "cityscapes_small"
    image_size: ImageSize = Field(default=(128, 256), description="height and width the model sees")
    batch_size: int = Field(default=64, ge=1, description="training samples per step, over all processes")
    classes: Literal[7, 19] = Field(default=7, description="read label_7 or label_19, else label")

    TASKS: ClassVar[Mapping[str, Task]] = cityscapes.tasks(7, inverse=True)
    FOLDERS: ClassVar[Mapping[str, str]] = {"image": "image", "depth": "depth"}

    def labels(self) -> Mapping[str, Task]:
        """The two tasks, with as many classes as chosen."""
        return cityscapes.tasks(self.classes, inverse=True)
