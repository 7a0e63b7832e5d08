"""PASCAL-Context for multi-task learning, in the layout of the archive PASCAL_MT (or PASCALContext)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from polytask.config import Location, Slot, register
from polytask.data.base import DatasetSpec, ImageSize, Record
from polytask.data.files import check_folders, check_listed, picture_size, read_list, read_mat, read_picture
from polytask.data.maps import VectorMap, plain, stretch
from polytask.data.pipelines import Astmt, Pipeline
from polytask.data.thinning import contours, thin
from polytask.errors import DataError
from polytask.progress import track
from polytask.tasks.base import Task
from polytask.tasks.edge import Edge
from polytask.tasks.normals import Normals
from polytask.tasks.saliency import Saliency
from polytask.tasks.segmentation import Segmentation

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
PARTS = ("background", "head", "torso", "upper_arms", "lower_arms", "upper_legs", "lower_legs")
PART_NAMES = (
    (),
    ("hair", "head", "lear", "rear", "lebrow", "rebrow", "leye", "reye", "mouth", "nose"),
    ("neck", "torso"),
    ("luarm", "ruarm"),
    ("llarm", "rlarm", "lhand", "rhand"),
    ("luleg", "ruleg"),
    ("llleg", "rlleg", "lfoot", "rfoot"),
)
"""Names in the annotation files of what makes up each of ``PARTS``."""
_PART_OF = {name: part for part, names in enumerate(PART_NAMES) for name in names}
_PERSON = 15

WITH_NORMALS = frozenset(
    {
        3, 4, 6, 9, 10, 11, 13, 15, 17, 18, 22, 23, 29, 30, 33, 34, 36, 37, 38, 39, 41, 43, 46, 49,
        50, 51, 53, 55, 56, 59, 61, 62, 65, 66, 68, 69, 72, 73, 78, 83, 84, 85, 87, 88, 95, 96, 101,
        104, 105, 107, 111, 113, 115, 122, 124, 135, 141, 142, 143, 146, 150, 154, 157, 158, 159,
        165, 172, 174, 181, 183, 184, 191, 193, 195, 197, 199, 202, 213, 215, 216, 219, 220, 223,
        225, 228, 230, 232, 233, 238, 239, 242, 243, 246, 250, 251, 252, 255, 260, 261, 263, 269,
        272, 273, 275, 281, 283, 284, 285, 286, 287, 288, 290, 291, 292, 293, 295, 304, 307, 309,
        310, 314, 315, 319, 323, 329, 330, 331, 336, 342, 345, 349, 350, 351, 352, 355, 357, 368,
        370, 371, 374, 379, 380, 383, 384, 397, 401, 403, 405, 407, 408, 411, 412, 413, 414, 417,
        419, 421, 423, 427, 429, 430, 432, 440, 441, 442, 443, 444, 446, 454, 457,
    }
)  # fmt: skip
"""Context ids (1..459) where the distilled normals can be trusted: classes that occur indoors too."""

_FOLDERS = (
    "JPEGImages", "ImageSets/Context", "pascal-context/trainval",
    "human_parts", "normals_distill", "sal_distill",
)  # fmt: skip
_SEMSEG = ("semseg/VOC12", "semseg/pascal-context")  # in order of preference
_ARCHIVE = (
    "unpack PASCAL_MT.tgz, which the authors of ASTMT publish at data.vision.ee.ethz.ch "
    "(kmaninis/share/MTL), and set `root` to the folder PASCAL_MT"
)


@register("data")
class PascalContext(DatasetSpec):
    """4,998 training and 5,105 validation photos with five tasks; some labels are distilled from networks.

    Needs scipy (``pip install polytask[data]``). Nothing is ever written into the data folder.
    """

    type: Literal["pascal_context"] = "pascal_context"
    root: Location = Field(description="the folder PASCAL_MT or PASCALContext")
    image_size: ImageSize = Field(default=(448, 448), description="height and width the model sees")
    pipeline: Annotated[Pipeline, Slot("pipeline")] = Astmt()
    batch_size: int = Field(default=32, ge=1, description="training samples per step, over all processes")
    eval_batch_size: int = Field(
        default=32, ge=1, description="evaluation samples per pass, over all processes"
    )
    require_parts: bool = Field(default=False, description="only photos of persons with annotated parts")
    edges: Literal["laplacian", "contours"] = Field(
        default="laplacian", description="true edges: those to train on, or those of the published odsF"
    )

    SPLITS: ClassVar[tuple[str, ...]] = ("train", "val")
    TASKS: ClassVar[Mapping[str, Task]] = {
        "semseg": Segmentation(classes=CLASSES),
        "human_parts": Segmentation(classes=PARTS, weight=2.0),
        "saliency": Saliency(weight=5.0),
        "normals": Normals(weight=10.0),
        "edge": Edge(positive_weight=0.95, weight=50.0),
    }
    EMPTY_IS_IGNORED: ClassVar[frozenset[str]] = frozenset({"human_parts"})
    SLOW: ClassVar[frozenset[str]] = frozenset(TASKS)

    def split_names(self) -> tuple[str, ...]:
        """And ``test_new``, the photos of ``val`` that odsF is published for, where there is their list."""
        return (*self.SPLITS, *(["test_new"] if self._list("test_new").is_file() else []))

    def records(self, split: str) -> list[Record]:
        """The photos of ``ImageSets/Context/<split>.txt``, in its order."""
        self.check_split(split)
        check_folders(self.root, (*_FOLDERS, _SEMSEG), _ARCHIVE)
        found = [self._record(name) for name in read_list(self._list(split), _ARCHIVE)]
        if not self.require_parts:
            return found
        return [r for r in track(found, f"looking for persons ({split})") if _may_have_parts(r)]

    def check_records(self, split: str, records: Sequence[Record], tasks: Collection[str]) -> None:  # noqa: ARG002
        """All photos of the list are there."""
        check_listed([record.files["image"] for record in records], self._list(split), _ARCHIVE)

    def read(self, record: Record, name: str) -> Tensor:
        """One field, with validity as the official loaders have it (see ``DatasetSpec.read``)."""
        readers = {
            "image": self._image,
            "semseg": self._semseg,
            "human_parts": self._human_parts,
            "saliency": self._saliency,
            "normals": self._normals,
            "edge": self._edge,
        }
        return readers[name](record.files)

    # --- files -------------------------------------------------------------------------------------

    def _list(self, split: str) -> Path:
        return self.root / "ImageSets" / "Context" / f"{split}.txt"

    def _record(self, name: str) -> Record:
        labels = [self.root / folder / f"{name}.png" for folder in _SEMSEG]
        context = self.root / "pascal-context" / "trainval" / f"{name}.mat"
        files = {
            "image": self.root / "JPEGImages" / f"{name}.jpg",
            "semseg": next((path for path in labels if path.is_file()), labels[0]),
            "human_parts": self.root / "human_parts" / f"{name}.mat",
            "saliency": self.root / "sal_distill" / f"{name}.png",
            "normals": self.root / "normals_distill" / f"{name}.png",
            "edge": context,
            "context": context,
        }
        return Record(name, files)

    # --- fields ------------------------------------------------------------------------------------

    def _image(self, files: Mapping[str, Path]) -> Tensor:
        return torch.from_numpy(read_picture(files["image"], "RGB")).permute(2, 0, 1)

    def _semseg(self, files: Mapping[str, Path]) -> Tensor:
        return torch.from_numpy(read_picture(files["semseg"], "P", "L"))

    def _human_parts(self, files: Mapping[str, Path]) -> Tensor:
        path = files["human_parts"]
        drawn: np.ndarray | None = None
        for part, mask in _parts(path):
            drawn = np.zeros(mask.shape, np.uint8) if drawn is None else drawn
            if mask.shape != drawn.shape:
                raise DataError("masks differ in size", where=str(path), got=mask.shape, expected=drawn.shape)
            drawn[mask != 0] = part
        if drawn is None:
            width, height = picture_size(files["image"])
            drawn = np.zeros((height, width), np.uint8)
        return torch.from_numpy(drawn)

    def _saliency(self, files: Mapping[str, Path]) -> Tensor:
        return torch.from_numpy((read_picture(files["saliency"], "L") > 127).astype(np.uint8))

    def _normals(self, files: Mapping[str, Path]) -> Tensor:
        colors = read_picture(files["normals"], "RGB")
        ids = _context(files["context"])
        if ids.shape != colors.shape[:2]:
            where, expected = str(files["normals"]), f"{ids.shape} as {files['context']}"
            raise DataError(
                "normals and LabelMap differ in size", where=where, got=colors.shape[:2], expected=expected
            )
        valid = np.isin(ids, list(WITH_NORMALS))
        vectors = 2.0 * colors.astype(np.float32) / 255.0 - 1.0
        normals = torch.from_numpy(np.where(valid[..., None], vectors, np.float32(0)))
        width, height = picture_size(files["image"])
        if ids.shape == (height, width):
            return normals
        return plain(stretch(VectorMap(normals.permute(2, 0, 1)), (height, width))).permute(1, 2, 0)

    def _edge(self, files: Mapping[str, Path]) -> Tensor:
        ids = _context(files["context"])
        lines = boundaries(ids) if self.edges == "laplacian" else thin(contours(ids))
        return torch.from_numpy(lines.astype(np.uint8))


def boundaries(ids: np.ndarray) -> np.ndarray:
    """Thin lines between regions of ``[H, W]`` ids: non-zero four-neighbor Laplacian, thinned; boolean."""
    padded = np.pad(ids.astype(np.float64), 1, mode="reflect")
    around = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    return thin(around != 4 * padded[1:-1, 1:-1])


# --- annotations ------------------------------------------------------------------------------------


def _context(path: Path) -> np.ndarray:
    ids: np.ndarray = read_mat(path, "LabelMap")
    if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.number):
        raise DataError("LabelMap is no map of ids", where=str(path), got=f"{ids.dtype} {ids.shape}")
    return ids


def _may_have_parts(record: Record) -> bool:
    try:
        return any(_parts(record.files["human_parts"]))
    except DataError:
        return True  # and so it stays, to be refused when it is read


def _parts(path: Path) -> Iterator[tuple[int, np.ndarray]]:
    """Part number and mask of every annotated part of every person, in the order of the file."""
    try:
        objects = read_mat(path, "anno")["objects"].item().flat
        for person in (found for found in objects if found["class_ind"].item() == _PERSON):
            for part in person["parts"].flat:  # none if it is an empty array
                yield _PART_OF[part["part_name"].item()], part["mask"]
    except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise DataError(
            f"unexpected annotation ({error!r})", where=str(path), hint="unpack it again"
        ) from None
