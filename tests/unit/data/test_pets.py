"""The Oxford-IIIT Pet reader against a fabricated folder, and what it says when the folder is not right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polytask.config import decode
from polytask.data.pets import BREEDS, Pets
from polytask.data.verification import verify
from polytask.errors import DataError, DatasetNotFoundError
from polytask.tasks.base import TaskSet
from tests.data.pets import Pet, write_pets

Written = tuple[Pets, dict[str, Pet]]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    pets = write_pets(tmp_path / "pets")
    return decode(Pets, {"root": str(tmp_path / "pets"), "image_size": 32}), pets


def test_fields_are_what_was_written(written: Written) -> None:
    spec, pets = written
    for split, listed in (("train", "trainval"), ("test", "test")):
        records = spec.records(split)
        assert [r.id for r in records] == [name for name, pet in pets.items() if pet.split == listed]
        for record in records:
            pet = pets[record.id]
            with Image.open(record.files["image"]) as picture:
                pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
            assert torch.equal(spec.read(record, "image"), pixels)
            assert np.array_equal(spec.read(record, "trimap"), pet.trimap - 1)
            assert int(spec.read(record, "breed")) == pet.breed - 1
            assert int(spec.read(record, "species")) == pet.species - 1
            assert (pet.species == 1) == record.id[0].isupper()
    assert verify(spec).problems == []


def test_breeds_are_the_fixed_37_in_order_of_the_alphabet() -> None:
    assert len(BREEDS) == 37
    assert sorted(BREEDS, key=str.lower) == list(BREEDS)
    names = {"Abyssinian": 1, "american_bulldog": 2, "Bengal": 6, "yorkshire_terrier": 37, "Sphynx": 34}
    for name, number in names.items():
        assert BREEDS[number - 1].lower().replace(" ", "_") == name.lower()


def test_border_may_be_ignored(written: Written) -> None:
    spec, pets = written
    binary = decode(Pets, {"root": str(spec.root), "border": "ignore"})
    assert binary.labels()["trimap"].channels == 2
    assert set(binary.labels()) == set(spec.labels())
    record = binary.records("test")[0]
    expected = np.where(pets[record.id].trimap == 3, 255, pets[record.id].trimap - 1)
    assert np.array_equal(binary.read(record, "trimap"), expected)
    binary.open("test", TaskSet(binary.labels()), train=False)[0]


def test_trimap_with_another_value(written: Written) -> None:
    spec, _ = written
    record = spec.records("test")[0]
    Image.new("L", (9, 9), 4).save(record.files["trimap"])
    with pytest.raises(DataError, match=r"yorkshire_terrier_9\.png: trimap with another value, .*got 4"):
        spec.read(record, "trimap")
    Image.new("I;16", (9, 9), 1).save(record.files["trimap"])
    with pytest.raises(DataError, match="unexpected mode"):
        spec.read(record, "trimap")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Bengal_3 six 1 2", "list cannot be read"),
        ("Bengal_3 6", "list cannot be read"),
    ],
)
def test_bad_lines(written: Written, line: str, message: str) -> None:
    spec, _ = written
    (spec.root / "annotations" / "test.txt").write_text(f"{line}\n")
    with pytest.raises(DataError, match=f"test.txt: {message}"):
        spec.records("test")


def test_class_out_of_range_names_list_and_photo(written: Written) -> None:
    spec, _ = written
    (spec.root / "annotations" / "test.txt").write_text("Bengal_3 38 3 2\nyorkshire_terrier_9 0 0 1\n")
    first, second, *below = verify(spec, ["test"]).problems
    for name, problem in (("breed", first), ("species", second)):
        assert f"test.txt ({name} of Bengal_3): image with an unknown class id" in problem
    assert [problem.partition("test.txt ")[2] for problem in below] == [
        f"({name} of yorkshire_terrier_9): number below 1, got 0" for name in ("breed", "species")
    ]


def test_missing_parts(written: Written) -> None:
    spec, _ = written
    (spec.root / "images" / "Bengal_3.jpg").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"test\.txt: 1 of 3 listed photos .* first Bengal_3"):
        spec.open("test", TaskSet(spec.TASKS), train=False)
    (spec.root / "annotations" / "trainval.txt").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"lacks annotations/trainval\.txt"):
        spec.records("train")
