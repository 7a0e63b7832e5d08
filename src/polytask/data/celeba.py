"""CelebA: aligned faces with 40 attributes and identities, laid out flat or as in the archive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
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
_NUMBERS = (("file", "U32"), ("number", "i8"))
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
        photos, *lists = self._paths()
        names, signs = _attributes(lists[0])
        people, part = (_numbers(path, names) for path in lists[1:])
        astray = ~np.isin(part, (0, 1, 2))
        if astray.any():
            where, got = f"{lists[2]} ({names[astray][0]})", int(part[astray][0])
            raise DataError("partition that is not 0, 1 or 2", where=where, got=got)
        if self.split_by == "person":
            part = by_person(people)
        chosen = np.flatnonzero(part == self.SPLITS.index(split))
        if not len(chosen):
            raise DatasetNotFoundError(f"split {split} lists no samples", where=str(lists[2]), hint=_ARCHIVE)
        files = {"attributes": lists[0], "identity": lists[1]}
        columns = (column[chosen].tolist() for column in (names, signs, people))
        return [
            Record(name, {"image": photos / name, **files}, values={"attributes": row, "identity": person})
            for name, row, person in zip(*columns, strict=True)
        ]

    def read(self, record: Record, name: str) -> Tensor:
        """The photo, or what the lists say (see ``DatasetSpec.read``)."""
        if name == "identity":
            return torch.tensor(record.values[name])
        if name == "attributes":
            signs = torch.tensor(record.values[name])
            if not (signs.abs() == 1).all():
                got = int(signs[signs.abs() != 1][0])
                raise DataError("attribute that is neither -1 nor 1", where=record.where(name), got=got)
            return (signs + 1) // 2
        return torch.from_numpy(read_picture(record.files["image"], "RGB")).permute(2, 0, 1)

    def check_records(self, split: str, records: Sequence[Record], tasks: Collection[str]) -> None:  # noqa: ARG002
        """Nobody is in two of the published splits, if the task is to tell persons apart."""
        if "identity" not in tasks or self.split_by == "person":
            return
        path, *parts = self._paths()[2:]
        people, part = (read_table(p, _NUMBERS)["number"] for p in (path, *parts))
        distinct, splits = np.unique(np.unique(people * 3 + part) // 3, return_counts=True)
        astray = distinct[splits > 1]
        if len(astray):
            what = f"{len(astray)} of {len(distinct)} persons are in more than one split, first {astray[0]}"
            hint = "set data.split_by=person for other splits, or leave out the task identity"
            raise DataError(what, where=str(path), hint=hint)

    def audit(self, split: str, tasks: Collection[str]) -> list[str]:
        """Persons in several splits."""
        try:
            self.check_records(split, (), tasks)
        except DataError as error:
            return [str(error)]
        return []

    def _paths(self) -> list[Path]:
        """Folder of the images and the three lists."""
        check_folders(self.root, _PLACES, _ARCHIVE)
        return [next(self.root / c for c in choices if (self.root / c).exists()) for choices in _PLACES]

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


def _attributes(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Files, and what the list says about each, in the order of ``ATTRIBUTES`` whatever its own order."""
    try:
        with path.open(encoding="utf-8") as lines:
            header = [line.split() for line in islice(lines, 2)][-1]
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"list cannot be read ({error})", where=str(path), hint=_ARCHIVE) from None
    if sorted(header) != sorted(ATTRIBUTES):
        expected = f"the {len(ATTRIBUTES)} of CelebA"
        what, other = "another set of attributes in the second line", sorted({*header} ^ {*ATTRIBUTES})
        raise DataError(what, where=str(path), expected=expected, got=f"a difference in {', '.join(other)}")
    faces = read_table(path, [("file", "U32"), ("signs", "i1", (len(ATTRIBUTES),))], skip=2)
    return faces["file"], faces["signs"][:, [header.index(name) for name in ATTRIBUTES]]


def _numbers(path: Path, names: np.ndarray) -> np.ndarray:
    """The number that a list gives each of the files, which it has to name in the same order."""
    table = read_table(path, _NUMBERS)
    if not np.array_equal(table["file"], names):
        expected = f"the {len(names)} files of the list of attributes, in its order"
        both = zip(table["file"], names, strict=False)
        other = next((f", the first other one {a}" for a, b in both if a != b), "")
        got = f"{len(table)} files{other}"
        raise DataError("list of other files", where=str(path), got=got, expected=expected)
    return np.asarray(table["number"])
