"""The CelebA reader against fabricated folders, and what it says when the folder is not right."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polytask.config import decode
from polytask.data.base import Record
from polytask.data.celeba import ATTRIBUTES, CelebA, by_person
from polytask.data.verification import verify
from polytask.errors import DataError, DatasetNotFoundError
from polytask.tasks.base import TaskSet
from tests.data.celeba import SPLITS, Face, write_celeba

Written = tuple[CelebA, dict[str, Face]]


@pytest.fixture(params=[False, True], ids=["archive", "flat"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Written:
    faces = write_celeba(tmp_path / "CelebA", flat=request.param)
    return decode(CelebA, {"root": str(tmp_path / "CelebA"), "image_size": 32}), faces


def one_list(spec: CelebA, name: str) -> Path:
    return next(spec.root.rglob(name))


def test_fields_are_what_was_written(written: Written) -> None:
    spec, faces = written
    for split in SPLITS:
        records = spec.records(split)
        assert [r.id for r in records] == [name for name, face in faces.items() if face.split == split]
        for record in records:
            with Image.open(record.files["image"]) as picture:
                pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
            assert torch.equal(spec.read(record, "image"), pixels)
            assert spec.read(record, "attributes").tolist() == faces[record.id].attributes
            assert int(spec.read(record, "identity")) == faces[record.id].person
    assert verify(spec).problems == []


def test_attributes_are_the_forty_in_their_order() -> None:
    assert len(set(ATTRIBUTES)) == 40
    assert [ATTRIBUTES[i] for i in (0, 20, 31, 39)] == ["5_o_Clock_Shadow", "Male", "Smiling", "Young"]


def test_reconstruction_is_what_the_model_sees(written: Written) -> None:
    spec, _ = written
    sample = spec.open("train", TaskSet(spec.labels()), train=True, seed=1)[(2, 0)]
    seen = spec.pipeline.denormalize(sample["image"]).float() / 255
    assert sample["reconstruction"].shape == (3, 32, 32)
    assert float((sample["reconstruction"] - seen).abs().max()) < 0.003


def test_a_person_in_two_splits_is_refused(written: Written) -> None:
    spec, _ = written
    path = one_list(spec, "identity_CelebA.txt")
    path.write_text(path.read_text().replace("8692", "2880"))
    message = r"identity_CelebA\.txt: 1 of 6 persons are in more than one split, first 2880; set .*person"
    tasks = TaskSet(spec.labels())
    with pytest.raises(DataError, match=message):
        spec.open("val", tasks, train=False)
    others = tasks.subset(["attributes", "reconstruction"])
    assert len(spec.open("val", others, train=False)) == len(spec.records("val"))
    (problem,) = verify(spec).problems
    assert re.search(message, problem)
    assert verify(spec, tasks=others).problems == []
    apart = spec.model_copy(update={"split_by": "person"})
    people = [{r.values["identity"] for r in apart.records(split)} for split in SPLITS]
    assert people == [{7, 15, 31, 2880}, {2937}, {9040}]
    assert sum(len(apart.records(split)) for split in SPLITS) == 14
    assert apart.open("val", tasks, train=False).records
    assert verify(apart).problems == []


def test_splits_by_person_are_disjoint_and_of_a_tenth() -> None:
    people = np.random.default_rng(0).integers(0, 10177, 50_000)
    part = by_person(people)
    counts = [len(np.unique(people[part == k])) for k in range(3)]
    assert sum(counts) == len(np.unique(people))
    assert counts[1] == counts[2] == -(-sum(counts) // 10)
    assert by_person(np.array([5, 3, 9, 3])).tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("list_attr_celeba.txt", ("000002.jpg", "000002.jpg 1"), r"list cannot be read \(.*41.*42.*row 2"),
        ("list_attr_celeba.txt", (" 1 ", " yes "), "list cannot be read"),
        (
            "list_eval_partition.txt",
            ("000003.jpg 0", "000003.jpg 5"),
            r"\(000003.*not 0, 1 or 2, got 5",
        ),
        ("list_eval_partition.txt", ("000003.jpg 0\n", ""), "list of other files, expected the 14 files"),
        ("identity_CelebA.txt", ("000003.jpg", "000099.jpg"), "list of other files.*first .* 000099.jpg"),
        ("list_attr_celeba.txt", (" Young", ""), "another set of attributes .*difference in Young"),
        ("list_attr_celeba.txt", ("Male", "Female"), "another set .* the 40 of CelebA.* Female, Male"),
        ("list_attr_celeba.txt", ("Male", "Bald"), "another set .*difference in Male"),
    ],
)
def test_bad_lists(written: Written, name: str, change: tuple[str, str], message: str) -> None:
    spec, _ = written
    path = one_list(spec, name)
    path.write_text(path.read_text().replace(*change, 1))
    with pytest.raises(DataError, match=f"{name}:? {message}"):
        spec.records("train")


def test_attribute_of_zero_is_refused(written: Written) -> None:
    spec, _ = written
    path = one_list(spec, "list_attr_celeba.txt")
    path.write_text(path.read_text().replace(" 1 ", " 0 ", 1))
    (problem,) = verify(spec).problems
    assert problem == f"{path} (attributes of 000001.jpg): attribute that is neither -1 nor 1, got 0"


def test_attributes_are_found_by_name(written: Written) -> None:
    spec, faces = written
    path = one_list(spec, "list_attr_celeba.txt")
    count, header, *rows = (line.split() for line in path.read_text().splitlines())
    order = np.random.default_rng(0).permutation(len(header))
    shuffled = [[row[0], *(row[1 + i] for i in order)] for row in rows]
    lines = (count, [header[i] for i in order], *shuffled)
    path.write_text("\n".join(" ".join(line) for line in lines))  # here without the space at the end
    for record in spec.records("train"):
        assert spec.read(record, "attributes").tolist() == faces[record.id].attributes


@pytest.mark.filterwarnings("ignore:.*input contained no data")
def test_missing_parts(written: Written) -> None:
    spec, _ = written
    one_list(spec, "000001.jpg").unlink()
    assert len(spec.records("train")) == 6  # files are not looked for
    assert any("000001.jpg: no such file" in problem for problem in verify(spec, ["train"]).problems)
    path = one_list(spec, "list_eval_partition.txt")
    path.write_text("")
    with pytest.raises(DataError, match="list cannot be read"):
        spec.records("train")
    path.unlink()
    with pytest.raises(DatasetNotFoundError, match=r"lacks list_eval_partition\.txt or Eval/"):
        spec.records("train")


def test_empty_split(written: Written) -> None:
    spec, _ = written
    path = one_list(spec, "list_eval_partition.txt")
    path.write_text(path.read_text().replace(" 2\n", " 1\n"))
    with pytest.raises(DatasetNotFoundError, match="split test lists no samples"):
        spec.records("test")


@pytest.mark.slow
def test_the_whole_set_opens_quickly(tmp_path: Path) -> None:
    (tmp_path / "img_align_celeba").mkdir()
    names = [f"{i:06d}.jpg" for i in range(1, 202_600)]
    signs = " 1 -1" * 20
    header = f"{len(names)}\n{' '.join(ATTRIBUTES)} \n"
    (tmp_path / "list_attr_celeba.txt").write_text(header + "".join(f"{n} {signs}\n" for n in names))
    part = [0] * 162_770 + [1] * 19_867 + [2] * 19_962
    (tmp_path / "list_eval_partition.txt").write_text(
        "".join(f"{n} {p}\n" for n, p in zip(names, part, strict=True))
    )
    people = [f"{n} {i // 20 + 20_000 * p}\n" for i, (n, p) in enumerate(zip(names, part, strict=True))]
    (tmp_path / "identity_CelebA.txt").write_text("".join(people))
    started = time.process_time()
    assert len(CelebA(root=tmp_path).records("train")) == 162_770
    assert time.process_time() - started < 10


def test_batches_may_hold_several_images_of_a_person() -> None:
    records = [Record(str(i), values={"identity": i % 10}) for i in range(83)]

    def order(run: int, seed: int = 0) -> list[int]:
        spec = CelebA(root=Path("anywhere"), images_per_person=run)
        return spec.shuffle(records, torch.Generator().manual_seed(seed))

    assert order(1) == torch.randperm(83, generator=torch.Generator().manual_seed(0)).tolist()
    for seed in range(3):
        shuffled = order(4, seed)
        assert sorted(shuffled) == list(range(83))
        runs = [len(list(run)) for _, run in itertools.groupby(i % 10 for i in shuffled)]
        assert len(runs) <= 23  # two runs of four each, and the rest
        assert order(4, seed) == shuffled != order(4, seed + 1)
