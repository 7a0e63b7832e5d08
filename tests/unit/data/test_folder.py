"""Own folders: what the settings make of the files, and what is said when they do not fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from polytask.config import decode
from polytask.data.base import Samples
from polytask.data.folder import Folder
from polytask.data.verification import verify
from polytask.errors import ConfigErrors, DataError, DatasetNotFoundError
from polytask.files import override
from polytask.tasks.base import TaskSet
from tests.data.folder import SIZE, settings, write_folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_folder(tmp_path / "own")
    return tmp_path / "own"


def changed(root: Path, *changes: str) -> Folder:
    return decode(Folder, override({"data": settings(root)}, [f"data.{c}" for c in changes])["data"])


def opened(spec: Folder, *names: str) -> Samples:
    tasks = TaskSet(spec.labels())
    return spec.open("val", tasks.subset(names) if names else tasks, train=False)


def raw_of(root: Path) -> Any:
    return np.load(root / "raw.npz")


def test_fields_are_what_was_written(root: Path) -> None:
    spec, raw = changed(root), raw_of(root)
    assert [r.id for r in spec.records("val")] == [
        f"photos/val/p{i}_rgb.{'png' if i % 2 else 'JPG'}" for i in (5, 6, 7)
    ]
    for split, numbers in (("train", range(5)), ("val", range(5, 8))):
        records = spec.records(split)
        assert len(records) == len(numbers)
        for i, record in zip(numbers, records, strict=True):
            stored = {
                kind: raw[f"p{i}_{kind}"].astype(np.int64) for kind in ("mask", "ids", "depth", "normals")
            }
            with Image.open(record.files["image"]) as picture:
                assert np.array_equal(spec.read(record, "image").permute(1, 2, 0), np.array(picture))
            assert np.array_equal(spec.read(record, "marked"), stored["mask"] // 255)
            surface = np.select([stored["ids"] == 7, stored["ids"] == 400], [0, 1], 255)
            assert np.array_equal(spec.read(record, "surface"), surface)
            meters = np.where(stored["depth"] == 65535, 0, stored["depth"] / 1000)
            assert np.allclose(spec.read(record, "depth"), meters)
            vectors = (stored["normals"] / 127.5 - 1) * [1, -1, -1]
            vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
            vectors[~stored["normals"].any(-1)] = 0
            assert np.allclose(spec.read(record, "normals"), vectors, atol=1e-6)
            assert int(spec.read(record, "room")) == (1, 0, -1)[i % 3]
            assert spec.read(record, "facts").tolist() == [i % 2, -1 if i == 0 else 1]
            assert int(spec.read(record, "place")) == i % 4
    assert verify(spec).problems == []


def test_a_list_gives_the_order(root: Path) -> None:
    (root / "val.txt").write_text("photos/val/p7_rgb.png\nphotos/val/p5_rgb.png\n")
    spec = changed(
        root, "splits.val=val.txt", "targets={depth: {task: depth, file: 'depth/p6.png', scale: 0.001}}"
    )
    assert [r.id for r in spec.records("val")] == ["photos/val/p7_rgb.png", "photos/val/p5_rgb.png"]
    (root / "val.txt").write_text("photos/val/p9_rgb.png\n")
    with pytest.raises(DatasetNotFoundError, match=r"val\.txt: 1 of 1 listed photos .* first p9_rgb"):
        opened(spec)


def test_arrays_and_holes_that_are_not_numbers(root: Path) -> None:
    for i in range(8):
        values = np.ones(SIZE, np.float32)
        values[0, :2] = np.nan, np.inf
        np.save(root / "depth" / f"p{i}.npy", values)
    target = "{task: depth, file: 'depth/{star}.npy', ignore: nan, scale: 2}"
    spec = changed(root, f"targets={{depth: {target}}}")
    assert spec.read(spec.records("val")[0], "depth")[0, :3].tolist() == [0, 0, 2]
    strict = changed(root, f"targets={{depth: {target.replace('nan', '7')}}}")
    assert all("not finite" in p and "depth/p" in p for p in verify(strict).problems)
    assert len(verify(strict).problems) == 8


def test_labels_may_be_optional(root: Path) -> None:
    for folder in ("masks/val", "ids", "depth", "normals"):
        (root / folder / "p6.png").unlink()
    table = root / "table.csv"
    table.write_text("\n".join(line for line in table.read_text().splitlines() if "p6" not in line))
    with pytest.raises(
        DatasetNotFoundError,
        match=r"1 of 3 images have no label 'marked', first .*p6_rgb\.JPG, expected masks.*optional=true",
    ):
        opened(changed(root))
    assert opened(changed(root), "again").records  # does not need them
    missing = {f"{folder}/p6.png: no such file" for folder in ("masks/val", "ids", "depth", "normals")}
    problems = verify(changed(root), ["val"]).problems
    assert all(sum(words in problem for problem in problems) == 1 for words in missing)
    row = f"{table}: table has no row for photos/val/p6_rgb.JPG; set data.targets."
    assert [problem.partition(row)[2] for problem in problems[4:]] == [
        f"{name}.optional=true if that is right" for name in ("room", "facts", "place")
    ]
    with pytest.raises(DatasetNotFoundError, match=r"1 of 3 images have no label 'room'.*table\.csv"):
        opened(changed(root), "room")
    names = ("marked", "surface", "depth", "normals", "room", "facts", "place")
    spec = changed(root, *(f"targets.{name}.optional=true" for name in names))
    assert verify(spec).problems == []
    sample = opened(spec)[1]
    assert all(torch.all(sample[name] == 255) for name in ("marked", "surface"))
    assert not sample["depth"].any() and not sample["normals"].any()
    assert [sample[name].tolist() for name in ("room", "facts", "place")] == [-1, [-1, -1], -1]


def test_255_needs_a_meaning(root: Path) -> None:
    spec = changed(root, "targets.marked.ids=null")
    with pytest.raises(DataError, match=r"masks/val/p5\.png: label map with 255.*ignore: 255.*ids: "):
        spec.read(spec.records("val")[0], "marked")
    ignored = changed(root, "targets.marked.ids=null", "targets.marked.ignore=255")
    assert set(ignored.read(ignored.records("val")[0], "marked").unique().tolist()) == {0, 255}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("targets.depth.file='depth/{frame}.png'", r"targets\.depth: unknown placeholder \{frame\} \(known"),
        ("targets.depth.file='depth/{}.png'", r"unknown placeholder \{\}"),
        ("targets.depth.file=table.csv", "a task of type depth needs a file per image, got 'table.csv'"),
        ("targets.room.file='rooms/{stem}.png'", r"a task of type classification needs a \.csv file"),
        ("targets.again.file='photos/{stem}.png'", "a task of type reconstruction takes no file"),
        ("targets.depth.scale=[1, 1, 1]", "needs one number as `scale`"),
        ("targets.depth.task.type=deep", r"targets\.depth\.task.*unknown name 'deep'.*depth"),
        ("targets.depth.fyle=x", r"targets\.depth\.fyle: unknown key; did you mean 'file'"),
        ("targets={items: {task: depth, file: a.png}}", "'items' cannot name a task"),
        ("targets={}", "at least 1 item"),
        ("splits={}", "at least 1 item"),
        ("targets.room.ids={0: 1}", "only label maps take"),
    ],
)  # fmt: skip
def test_bad_settings(root: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigErrors, match=message):
        changed(root, change)


@pytest.mark.parametrize("pattern", ["pictures/*.jpg", "photos/train/*.md", "/photos/*", "", "**.jpg"])
def test_pattern_without_a_match(root: Path, pattern: str) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"data\.splits\.val: no image in .* matches, expected"):
        changed(root, f"splits.val='{pattern}'").records("val")


def test_missing_root(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"none: no such folder; set data\.root"):
        changed(tmp_path / "none").records("val")


def test_bad_tables(root: Path) -> None:
    table, spec = root / "table.csv", changed(root)
    text = table.read_text()
    unknown = (
        r"table\.csv \(room of photos/val/p6_rgb\.JPG\): unknown label, expected bath, kitchen, or nothing"
    )
    table.write_text(text.replace("p6_rgb,kitchen", "p6_rgb,cellar").replace("p7_rgb,bath", "p7_rgb,attic"))
    with pytest.raises(DataError, match=rf"{unknown}.*'cellar'"):
        opened(spec, "room")
    found = verify(spec, ["val"]).problems
    assert len(found) == 2
    assert re.search(unknown, found[0]) and "p7_rgb.png): unknown label" in found[1]
    table.write_text(text.replace("place", "where", 1))
    with pytest.raises(DataError, match=r"table\.csv: table lacks a column, expected place, got"):
        spec.records("val")
    table.write_text(text.replace("p5_rgb,", "p5_rgb,bath,3,1,1\n#"))
    assert any("unknown attribute values" in problem for problem in verify(spec).problems)
    table.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DatasetNotFoundError, match=r"table\.csv: table cannot be read"):
        spec.records("val")


def test_bad_files_are_all_listed(root: Path) -> None:
    (root / "ids" / "p5.png").write_bytes((root / "ids" / "p5.png").read_bytes()[:90])
    Image.new("RGB", SIZE[::-1]).save(root / "ids" / "p6.png")
    Image.new("L", (5, 5)).save(root / "depth" / "p7.png")
    problems = verify(changed(root), ["val"]).problems
    expected = (
        ("ids/p5.png", "cannot be read"),
        ("ids/p6.png", "as numbers"),
        ("depth/p7.png", "another size"),
    )
    assert len(problems) == 3
    assert all(file in p and what in p for p, (file, what) in zip(problems, expected, strict=True))
