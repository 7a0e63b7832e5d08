"""NYUD-v2 with four tasks, in the layouts of the archives NYUD_MT and NYUDv2, with the frames around."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from polytask.config import Location, Slot, register
from polytask.data.base import DatasetSpec, ImageSize, Record
from polytask.data.crops import Atrc
from polytask.data.files import check_folders, check_listed, picture_size, read_array, read_list, read_picture
from polytask.data.pipelines import Pipeline
from polytask.errors import DataError, DatasetNotFoundError
from polytask.tasks.base import Task
from polytask.tasks.depth import Depth
from polytask.tasks.edge import Boundary, Edge
from polytask.tasks.normals import Normals
from polytask.tasks.segmentation import Segmentation

CLASSES = (
    "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture",
    "counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat", "clothes",
    "ceiling", "books", "refridgerator", "television", "paper", "towel", "shower curtain", "box",
    "whiteboard", "person", "night stand", "toilet", "sink", "lamp", "bathtub", "bag", "otherstructure",
    "otherfurniture", "otherprop",
)  # fmt: skip
FOLDERS = {
    "image": "images", "semseg": "segmentation", "depth": "depth", "normals": "normals", "edge": "edge",
}  # fmt: skip
_COMMON = {"semseg": ".png", "depth": ".npy"}
LAYOUTS: Mapping[str, Mapping[str, str]] = {
    "NYUD_MT": {**_COMMON, "image": ".jpg", "normals": ".npy", "edge": ".npy"},
    "NYUDv2": {**_COMMON, "image": ".png", "normals": ".png", "edge": ".png"},
}
"""Kinds of files by archive; the files in ``normals`` tell which one it is."""
_ARCHIVE = "unpack NYUD_MT.tgz (of MTI-Net) or NYUDv2.tar.gz (of ATRC) and set `root` to that folder"


@register("data")
class Nyud(DatasetSpec):
    """795 training and 654 validation photos of rooms with four tasks, and the video frames around them."""

    type: Literal["nyud"] = "nyud"
    root: Location = Field(description="the folder NYUD_MT or NYUDv2")
    image_size: ImageSize = Field(default=(448, 576), description="height and width the model sees")
    pipeline: Annotated[Pipeline, Slot("pipeline")] = Atrc()
    clip: int = Field(
        default=0, ge=0, description="frames before and after the photo that samples carry too, as `clip`"
    )

    SPLITS: ClassVar[tuple[str, ...]] = ("train", "val")
    TASKS: ClassVar[Mapping[str, Task]] = {
        "semseg": Segmentation(classes=CLASSES),
        "depth": Depth(),
        "normals": Normals(weight=10.0),
        "edge": Edge(positive_weight=0.95, weight=50.0, boundary=Boundary(max_dist=0.011, truth="contours")),
    }

    FIRST_IDS: ClassVar[Mapping[str, int]] = {"semseg": 1}

    def records(self, split: str) -> list[Record]:
        """The photos of ``gt_sets/<split>.txt``, in its order."""
        self.check_split(split)
        check_folders(self.root, (*FOLDERS.values(), "gt_sets"), _ARCHIVE)
        kinds = self._kinds()
        return [self._record(name, kinds) for name in read_list(self._list(split), _ARCHIVE)]

    def check_records(self, split: str, records: Sequence[Record], tasks: Collection[str]) -> None:  # noqa: ARG002
        """All photos of the list are there."""
        check_listed([record.files["image"] for record in records], self._list(split), _ARCHIVE)

    def read(self, record: Record, name: str) -> Tensor:
        """One field (see ``DatasetSpec.read``), or ``clip``: uint8 ``[2 * clip + 1, 3, H, W]``.

        The frames of a clip are in order of time, the photo itself in the middle. Normals of NYUDv2 are
        valid everywhere, since colors cannot express a hole.
        """
        path = record.files[name]
        if name == "clip":
            frames = [_frame(frame, record.files["image"]) for frame in self._frames(record)]
            return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
        if name == "image":
            return torch.from_numpy(read_picture(path, "RGB")).permute(2, 0, 1)
        if name == "semseg":
            return torch.from_numpy(read_picture(path, "L", "P")) - 1  # uint8: 0 becomes 255
        if path.suffix == ".npy":
            return torch.from_numpy(read_array(path, (3,) if name == "normals" else (2,)))
        if name == "normals":
            return torch.from_numpy(2 * read_picture(path, "RGB").astype(np.float32) / 255 - 1)
        edge = torch.from_numpy(read_picture(path, "L"))
        return torch.where(edge == 255, 1, edge)

    def audit(self, split: str, tasks: Collection[str]) -> list[str]:  # noqa: ARG002 - of no task
        """Clips that cannot be read."""
        records = self.records(split) if self.clip else []
        found = [_frame_problem(path, r.files["image"]) for r in records for path in self._frames(r)]
        return [problem for problem in found if problem]

    # --- files -------------------------------------------------------------------------------------

    def _list(self, split: str) -> Path:
        return self.root / "gt_sets" / f"{split}.txt"

    def _kinds(self) -> Mapping[str, str]:
        for kinds in LAYOUTS.values():
            if next((self.root / "normals").glob(f"*{kinds['normals']}"), None):
                return kinds
        what = "neither .npy nor .png files of normals"
        raise DatasetNotFoundError(what, where=str(self.root / "normals"), hint=_ARCHIVE)

    def _record(self, name: str, kinds: Mapping[str, str]) -> Record:
        files = {k: self.root / folder / f"{name}{kinds[k]}" for k, folder in FOLDERS.items()}
        if self.clip:
            files["clip"] = self.root / "frames" / name
        return Record(name, files)

    def _frames(self, record: Record) -> list[Path]:
        offsets = range(-self.clip, self.clip + 1)
        return [record.files["clip"] / f"{o}.jpg" if o else record.files["image"] for o in offsets]


def _frame_problem(path: Path, photo: Path) -> str | None:
    try:
        _frame(path, photo)
    except DataError as error:
        return None if error.where == str(photo) else str(error)  # photos are looked at anyway
    return None


def _frame(path: Path, photo: Path) -> np.ndarray:
    pixels, (width, height) = read_picture(path, "RGB"), picture_size(photo)
    if pixels.shape[:2] != (height, width):
        got, expected = f"{pixels.shape[0]}x{pixels.shape[1]}", f"{height}x{width}"
        what = f"the frame has another size than the photo {photo}"
        raise DataError(what, where=str(path), got=got, expected=expected)
    return pixels
