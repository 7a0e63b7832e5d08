"""Oxford-IIIT Pet: cats and dogs with trimaps and breeds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from polytask.config import Location, Slot, register
from polytask.data.base import DatasetSpec, ImageSize, Record
from polytask.data.files import check_folders, check_listed, read_picture, read_table
from polytask.data.maps import IGNORE
from polytask.data.pipelines import Pipeline, Plain
from polytask.errors import DataError
from polytask.tasks.base import Task
from polytask.tasks.classification import Classification
from polytask.tasks.segmentation import Segmentation

BREEDS = (
    "Abyssinian", "American Bulldog", "American Pit Bull Terrier", "Basset Hound", "Beagle", "Bengal",
    "Birman", "Bombay", "Boxer", "British Shorthair", "Chihuahua", "Egyptian Mau", "English Cocker Spaniel",
    "English Setter", "German Shorthaired", "Great Pyrenees", "Havanese", "Japanese Chin", "Keeshond",
    "Leonberger", "Maine Coon", "Miniature Pinscher", "Newfoundland", "Persian", "Pomeranian", "Pug",
    "Ragdoll", "Russian Blue", "Saint Bernard", "Samoyed", "Scottish Terrier", "Shiba Inu", "Siamese",
    "Sphynx", "Staffordshire Bull Terrier", "Wheaten Terrier", "Yorkshire Terrier",
)  # fmt: skip
_LISTS = {"train": "annotations/trainval.txt", "test": "annotations/test.txt"}
_COLUMNS = (("file", "U64"), ("breed", "i4"), ("species", "i4"), ("number", "i4"))
_ARCHIVE = "unpack images.tar.gz and annotations.tar.gz of robots.ox.ac.uk/~vgg/data/pets and set `root`"


@register("data")
class Pets(DatasetSpec):
    """3,680 photos to train on and 3,669 to test on: trimaps, 37 breeds, cat or dog."""

    type: Literal["pets"] = "pets"
    root: Location = Field(description="the folder that holds images and annotations")
    image_size: ImageSize = Field(default=(224, 224), description="height and width the model sees")
    pipeline: Annotated[Pipeline, Slot("pipeline")] = Plain()
    border: Literal["class", "ignore"] = Field(
        default="class", description="the outline of the pet in trimaps: a third class, or unlabeled"
    )

    SPLITS: ClassVar[tuple[str, ...]] = tuple(_LISTS)
    TASKS: ClassVar[Mapping[str, Task]] = {
        "trimap": Segmentation(classes=("pet", "background", "border")),
        "breed": Classification(classes=BREEDS),
        "species": Classification(classes=("cat", "dog")),
    }

    FIRST_IDS: ClassVar[Mapping[str, int]] = {"trimap": 1, "breed": 1, "species": 1}

    def labels(self) -> Mapping[str, Task]:
        """With two classes of pixels if the border is ignored."""
        two = {"trimap": Segmentation(classes=("pet", "background"))}
        return {**self.TASKS, **(two if self.border == "ignore" else {})}

    def records(self, split: str) -> list[Record]:
        """The photos of the list, in its order; other files in the folders do not matter."""
        self.check_split(split)
        check_folders(self.root, ("images", "annotations/trimaps", _LISTS[split]), _ARCHIVE)
        path, found = self.root / _LISTS[split], []
        for name, breed, species, _ in read_table(path, _COLUMNS).tolist():
            photo, trimap = self.root / f"images/{name}.jpg", self.root / f"annotations/trimaps/{name}.png"
            files = {"image": photo, "trimap": trimap, "breed": path, "species": path}
            found.append(Record(name, files, values={"breed": breed, "species": species}))
        return found

    def check_records(self, split: str, records: Sequence[Record], tasks: Collection[str]) -> None:  # noqa: ARG002
        """All photos of the list are there."""
        check_listed([record.files["image"] for record in records], self.root / _LISTS[split], _ARCHIVE)

    def read(self, record: Record, name: str) -> Tensor:
        """The photo, whatever kind of file it is; the trimap, or what the list says, from 0."""
        number = record.values.get(name)
        if number is not None:
            if number < 1:
                raise DataError("number below 1", where=record.where(name), got=number)
            return torch.tensor(number - 1)
        path = record.files[name]
        if name == "image":
            return torch.from_numpy(read_picture(path, "RGB")).permute(2, 0, 1)
        stored = read_picture(path, "L")
        if not np.isin(stored, (1, 2, 3)).all():
            got = min(set(stored.flat) - {1, 2, 3})
            raise DataError("trimap with another value", where=str(path), got=got, expected="1, 2 or 3")
        border = 3 if self.border == "class" else IGNORE + 1
        return torch.from_numpy(np.where(stored == 3, border, stored) - 1)
