"""CelebA: aligned faces with 40 attributes and identities, laid out flat or as in the archive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from polytask.config import Location, Slot, register
from polytask.data.base import DatasetSpec, ImageSize, Record
from polytask.data.files import check_folders, read_picture, read_table
from polytask.data.pipelines import Pipeline, Plain
from polytask.errors import DataError, DatasetNotFoundError
from polytask.tasks.attributes import Attributes
from polytask.tasks.base import Task
from polytask.tasks.embedding import Embedding
from polytask.tasks.reconstruction import Reconstruction

ATTRIBUTES = (
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips",
    "Big_Nose", "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin",
    "Eyeglasses", "Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open",
    "Mustache", "Narrow_Eyes", "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline",
    "Rosy_Cheeks", "Sideburns", "Smiling", "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat",
    "Wearing_Lipstick", "Wearing_Necklace", "Wearing_Necktie", "Young",
)  # fmt: skip
_PLACES = (
    ("img_align_celeba", "Img/img_align_celeba"),
    ("list_attr_celeba.txt", "Anno/list_attr_celeba.txt"),
    ("identity_CelebA.txt", "Anno/identity_CelebA.txt"),
    ("list_eval_partition.txt", "Eval/list_eval_partition.txt"),
)
_ARCHIVE = "get the aligned images and the lists at mmlab.ie.cuhk.edu.hk/projects/CelebA.html and set `root`"


@register("data")
class CelebA(DatasetSpec):
    """202,599 faces of 10,177 persons: attributes, identity (metric learning) and reconstruction."""

    type: Literal["celeba"] = "celeba"
    root: Location = Field(description="the folder with Anno, Eval and Img, or with the lists and the images")
    image_size: ImageSize = Field(default=(64, 64), description="height and width the model sees")
    pipeline: Annotated[Pipeline, Slot("pipeline")] = Plain()
    split_by: Literal["partition", "person"] = Field(
        default="partition", description="the published splits, or others with every person in one of them"
    )
    images_per_person: int = Field(
        default=1, ge=1, description="images of a person in a row in training; metric learning needs a few"
    )

    SPLITS: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    TASKS: ClassVar[Mapping[str, Task]] = {
        "attributes": Attributes(names=ATTRIBUTES),
        "identity": Embedding(),
        "reconstruction": Reconstruction(),
    }

    def records(self, split: str) -> list[Record]:
        """The faces of a split in the order of the lists; a missing file shows when it is read."""
        self.check_split(split)
        check_folders(self.root, _PLACES, _ARCHIVE)
        paths = [next(self.root / c for c in choices if (self.root / c).exists()) for choices in _PLACES]
        faces = read_table(paths[1], [("file", "U32"), ("signs", "i1", (len(ATTRIBUTES),))], skip=2)
        people, part = (_numbers(path, faces["file"]) for path in paths[2:])
        if not np.isin(part, (0, 1, 2)).all():
            raise DataError("partition that is not 0, 1 or 2", where=str(paths[3]))
        if self.split_by == "person":
            part = by_person(people)
        _check_apart(people, part, paths[2])
        signs = faces["signs"]
        attributes = np.select([signs == -1, signs == 1], [0, 1], 2)  # 2 is refused by the task
        chosen = np.flatnonzero(part == self.SPLITS.index(split))
        if not len(chosen):
            raise DatasetNotFoundError(f"split {split} lists no samples", where=str(paths[3]), hint=_ARCHIVE)
        files = {"attributes": paths[1], "identity": paths[2]}
        columns = (column[chosen].tolist() for column in (faces["file"], attributes, people))
        return [
            Record(name, {"image": paths[0] / name, **files}, values={"attributes": row, "identity": person})
            for name, row, person in zip(*columns, strict=True)
        ]

    def read(self, record: Record, name: str) -> Tensor:
        """The photo, or what the lists say (see ``DatasetSpec.read``)."""
        if name in record.values:
            return torch.tensor(record.values[name])
        return torch.from_numpy(read_picture(record.files["image"], "RGB")).permute(2, 0, 1)

    def shuffle(self, records: Sequence[Record], generator: torch.Generator) -> list[int]:
        """Runs of ``images_per_person`` images, in any order."""
        order, met, runs = super().shuffle(records, generator), Counter[Any](), {}
        for index in order:
            person = records[index].values["identity"]
            runs[index] = (person, met[person] // self.images_per_person)
            met[person] += 1
        place = {run: number for number, run in enumerate(runs.values())}
        return sorted(order, key=lambda index: place[runs[index]])


def by_person(people: np.ndarray) -> np.ndarray:
    """0 (train), 1 (val) or 2 (test) for each image; val and test get a tenth of the persons each."""
    distinct = np.unique(people)
    tenth = -(-len(distinct) // 10)
    return np.searchsorted(distinct[[-min(2 * tenth, len(distinct)), -tenth]], people, side="right")


def _check_apart(people: np.ndarray, part: np.ndarray, path: Path) -> None:
    distinct, splits = np.unique(np.unique(people * 3 + part) // 3, return_counts=True)
    astray = distinct[splits > 1]
    if len(astray):
        what = f"{len(astray)} of {len(distinct)} persons are in more than one split, first {astray[0]}"
        raise DataError(what, where=str(path), hint="set data.split_by=person for other splits")


def _numbers(path: Path, names: np.ndarray) -> np.ndarray:
    """The number that a list gives each of the files, which it has to name in the same order."""
    table = read_table(path, [("file", "U32"), ("number", "i8")])
    if not np.array_equal(table["file"], names):
        expected = f"the {len(names)} files of the list of attributes, in its order"
        raise DataError("list of other files", where=str(path), got=f"{len(table)} files", expected=expected)
    return np.asarray(table["number"])
