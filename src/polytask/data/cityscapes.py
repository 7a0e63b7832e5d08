"""Cityscapes in its official layout: fine or coarse labels, and depth from disparity."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from polytask.config import Location, Slot, register
from polytask.data.base import DatasetSpec, ImageSize, Record
from polytask.data.files import check_folders, read_picture
from polytask.data.maps import IGNORE
from polytask.data.pipelines import Pipeline, Plain
from polytask.errors import DataError, DatasetNotFoundError
from polytask.tasks.base import Task
from polytask.tasks.depth import Depth
from polytask.tasks.segmentation import Segmentation

CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
    "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
CATEGORIES = ("flat", "construction", "object", "nature", "sky", "human", "vehicle")
CLASS_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Ids in the label files of ``CLASSES``."""
CATEGORY_IDS = (7, 11, 17, 21, 23, 24, 26)
"""The first id of each of ``CATEGORIES``; a category ends where the next begins."""
_IDS = 34

_ARCHIVE = "unpack the zip files of cityscapes-dataset.com into one folder and set `root` to it"
_STEREO = "unpack disparity_trainvaltest.zip and camera_trainvaltest.zip (or _trainextra), or leave depth out"


def tasks(classes: int, *, inverse: bool) -> dict[str, Task]:
    """Both tasks, with 19 classes or 7 categories, and meters or inverse depth."""
    semseg = Segmentation(classes=CLASSES if classes == 19 else CATEGORIES)
    return {"semseg": semseg, "depth": Depth(inverse=inverse)}


@register("data")
class Cityscapes(DatasetSpec):
    """Street scenes: 2,975 to train on, 500 to validate, and 19,998 more with coarse labels."""

    type: Literal["cityscapes"] = "cityscapes"
    root: Location = Field(description="the folder that holds leftImg8bit and gtFine or gtCoarse")
    image_size: ImageSize = Field(default=(512, 1024), description="height and width the model sees")
    pipeline: Annotated[Pipeline, Slot("pipeline")] = Plain()
    annotation: Literal["fine", "coarse"] = Field(
        default="fine", description="gtFine or gtCoarse, which has the split train_extra too"
    )
    classes: Literal[7, 19] = Field(default=19, description="19 classes, or 7 categories")
    depth_kind: Literal["meters", "inverse", "disparity"] = Field(
        default="meters", description="depth in meters, 1 / meters, or disparity in pixels of the full size"
    )
    max_depth: float = Field(default=80.0, gt=0.0, description="what is farther away (meters) is invalid")

    SPLITS: ClassVar[tuple[str, ...]] = ("train", "val")
    TASKS: ClassVar[Mapping[str, Task]] = tasks(19, inverse=False)

    def labels(self) -> Mapping[str, Task]:
        """Both tasks, with as many classes and the kind of depth as chosen."""
        return tasks(self.classes, inverse=self.depth_kind != "meters")

    def split_names(self) -> tuple[str, ...]:
        """Test labels are not public."""
        return (*self.SPLITS, "train_extra") if self.annotation == "coarse" else self.SPLITS

    def records(self, split: str) -> list[Record]:
        """The images of the split by city and number."""
        self.check_split(split)
        folders = [f"leftImg8bit/{split}", f"gt{self.annotation.title()}/{split}"]
        check_folders(self.root, folders, _ARCHIVE)
        found = sorted((self.root / folders[0]).glob("*/[!.]*_leftImg8bit.png"))
        if not found:
            raise DatasetNotFoundError("no images", where=str(self.root / folders[0]), hint=_ARCHIVE)
        return [self._record(split, path) for path in found]

    def read(self, record: Record, name: str) -> Tensor:
        """One field (see ``DatasetSpec.read``)."""
        if name == "image":
            return torch.from_numpy(read_picture(record.files[name], "RGB")).permute(2, 0, 1)
        return torch.from_numpy(self._semseg(record.files) if name == "semseg" else self._depth(record.files))

    def audit(self, split: str, tasks: Collection[str]) -> list[str]:  # noqa: ARG002 - of no task
        """Labels without an image."""
        known = {record.files["semseg"] for record in self.records(split)}
        found = sorted(self.root.glob(f"gt{self.annotation.title()}/{split}/*/[!.]*_labelIds.png"))
        return [f"{path}: there is no image for it; {_ARCHIVE}" for path in found if path not in known]

    # --- files -------------------------------------------------------------------------------------

    def _record(self, split: str, image: Path) -> Record:
        stem, labels = image.name.removesuffix("_leftImg8bit.png"), f"gt{self.annotation.title()}"

        def place(folder: str, ending: str) -> Path:
            return self.root / folder / split / image.parent.name / f"{stem}_{ending}"

        files = {
            "image": image,
            "semseg": place(labels, f"{labels}_labelIds.png"),
            "depth": place("disparity", "disparity.png"),
            "camera": place("camera", "camera.json"),
        }
        return Record(stem, files)

    def _semseg(self, files: Mapping[str, Path]) -> np.ndarray:
        ids = read_picture(files["semseg"], "L", "P")
        unknown = (ids >= _IDS) & (ids != IGNORE)
        if unknown.any():
            got, expected = int(ids[unknown][0]), f"0 to {_IDS - 1}"
            raise DataError("unknown label id", where=str(files["semseg"]), got=got, expected=expected)
        table = np.full(IGNORE + 1, IGNORE, np.uint8)
        if self.classes == 19:
            table[list(CLASS_IDS)] = np.arange(19)
        else:
            table[CATEGORY_IDS[0] : _IDS] = np.searchsorted(CATEGORY_IDS, range(7, _IDS), "right") - 1
        return np.take(table, ids)

    def _depth(self, files: Mapping[str, Path]) -> np.ndarray:
        """``[H, W]`` in the unit of ``depth_kind``; 0 where it is not known or beyond the maximum."""
        for path in (files["depth"], files["camera"]):
            if not path.is_file():
                raise DataError("no such file", where=str(path), hint=_STEREO)
        stored = read_picture(files["depth"], "I;16", "I").astype(np.float32)
        disparity = np.maximum(stored - 1, 0) / 256  # pixels
        product = _baseline_times_focus(files["camera"])  # meters x pixels
        valid = disparity * self.max_depth >= product
        value = {"disparity": disparity, "inverse": disparity / product}.get(self.depth_kind)
        if value is None:
            value = product / np.where(valid, disparity, 1)
        return np.where(valid, value, 0).astype(np.float32)


def _baseline_times_focus(path: Path) -> float:
    try:
        camera = json.loads(path.read_bytes())
        product = float(camera["extrinsic"]["baseline"]) * float(camera["intrinsic"]["fx"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        what = f"no extrinsic.baseline and intrinsic.fx can be read ({error!r})"
        raise DataError(what, where=str(path), hint="unpack it again") from None
    if not 0 < product < float("inf"):
        raise DataError("baseline times focal length is not positive", where=str(path), got=product)
    return product
