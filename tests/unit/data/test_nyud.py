"""The reader of both NYUD archives against fabricated folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polytask.config import decode
from polytask.data.base import train_loader
from polytask.data.nyud import CLASSES, LAYOUTS, Nyud
from polytask.data.verification import verify
from polytask.errors import DataError, DatasetNotFoundError
from polytask.tasks import Segmentation
from polytask.tasks.base import TaskSet
from tests.data.nyud import SPLITS, Room, write_nyud

Written = tuple[Nyud, dict[str, Room]]


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def written(layout: str, tmp_path: Path) -> Written:
    rooms = write_nyud(tmp_path / "nyud", layout, clip=2)
    return decode(Nyud, {"root": str(tmp_path / "nyud"), "image_size": [24, 32], "clip": 2}), rooms


@pytest.fixture
def one(tmp_path: Path) -> Nyud:
    write_nyud(tmp_path / "nyud")
    return decode(Nyud, {"root": str(tmp_path / "nyud")})


def test_fields_are_what_was_written(written: Written, layout: str) -> None:
    spec, rooms = written
    for split, ids in SPLITS.items():
        records = spec.records(split)
        assert tuple(record.id for record in records) == ids
        for record in records:
            room = rooms[record.id]
            assert np.array_equal(spec.read(record, "image").permute(1, 2, 0), room.image)
            semseg = spec.read(record, "semseg").numpy()
            assert np.array_equal(semseg, np.where(room.semseg == 0, 255, room.semseg.astype(int) - 1))
            assert np.array_equal(spec.read(record, "depth"), room.depth)
            assert np.array_equal(spec.read(record, "edge"), room.edge)
            normals = room.normals if layout == "NYUD_MT" else 2 * (room.normals / 255) - 1
            assert np.allclose(spec.read(record, "normals"), normals, atol=1e-6)


def test_only_arrays_of_normals_have_holes(written: Written, layout: str) -> None:
    spec, _ = written
    sample = spec.load(spec.records("val")[0], spec.TASKS)
    holes = (sample["normals"] == 0).all(0).float().mean()
    assert float(holes) == pytest.approx(3 / 30 if layout == "NYUD_MT" else 0)
    assert (sample["depth"][:, -1] == 0).all()
    assert {0, 39, 255} >= set(sample["semseg"][0, 0, :2].tolist())


def test_classes_and_weights() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 40
    assert {name: task.weight for name, task in Nyud.TASKS.items()} == {
        "semseg": 1, "depth": 1, "normals": 10, "edge": 50
    }  # fmt: skip


# --- clips -----------------------------------------------------------------------------------------


def test_clip_is_in_order_of_time_around_the_photo(written: Written) -> None:
    spec, rooms = written
    for record in spec.records("train"):
        room = rooms[record.id]
        order = [room.frames[-2], room.frames[-1], room.image, room.frames[1], room.frames[2]]
        clip = spec.read(record, "clip")
        assert clip.dtype == torch.uint8
        assert np.array_equal(clip.permute(0, 2, 3, 1), np.stack(order))
        near = spec.model_copy(update={"clip": 1})
        assert torch.equal(near.read(record, "clip"), clip[1:4])


@pytest.mark.parametrize("train", [True, False])
def test_frames_of_a_clip_are_augmented_as_the_photo_is(written: Written, train: bool) -> None:
    spec, _ = written
    samples = spec.open("train", TaskSet(spec.TASKS), train=train, seed=1)
    files = spec.records("train")[0].files
    for path in files["clip"].iterdir():  # frames equal to the photo must stay equal to it
        shutil.copy(files["image"], path)
    for epoch in range(4):
        sample = samples[(epoch, 0)]
        assert sample["clip"].shape == (5, 3, 24, 32)
        assert all(torch.equal(frame, sample["image"]) for frame in sample["clip"])


def test_clips_reach_the_batch_and_nothing_else_changes(written: Written) -> None:
    spec, _ = written
    still = spec.model_copy(update={"clip": 0})
    with_clip, without = (
        next(iter(train_loader(s.open("train", TaskSet(s.TASKS), train=True), batch_size=2, epoch=0, seed=0)))
        for s in (spec, still)
    )
    clip = with_clip.pop("clip")
    assert clip.shape == (2, 5, 3, 24, 32)
    assert torch.equal(clip[:, 2], with_clip["image"])
    assert with_clip.keys() == without.keys()
    assert all(torch.equal(with_clip[k], without[k]) for k in ("image", *spec.TASKS))


def test_verify_names_missing_and_odd_frames(written: Written) -> None:
    spec, _ = written
    assert verify(spec).problems == []
    first, second = (record.files["clip"] for record in spec.records("train"))
    shutil.rmtree(first)
    odd = next(second.glob("-1.*"))
    Image.new("RGB", (7, 5)).save(odd)
    problems = verify(spec, ["train"]).problems
    assert len(problems) == 4 + 1
    assert all(sum(f"{first.name}/{o}.jpg: no such file" in p for p in problems) == 1 for o in (-2, -1, 1, 2))
    spec.records("val")[0].files["image"].write_bytes(b"")
    assert len(verify(spec, ["val"]).problems) == 1
    assert f"{odd.name}: the frame has another size than the photo" in problems[-1]
    assert "expected 30x40, got '5x7'" in problems[-1]


def test_class_ids_are_told_as_they_stand_in_the_file(one: Nyud) -> None:
    record = one.records("val")[1]
    Image.new("L", (40, 30), 99).save(record.files["semseg"])
    expected = "label map with an unknown class id, expected 1 to 40, got 99"
    assert verify(one, ["val"]).problems == [f"{record.files['semseg']}: {expected}"]
    Image.new("L", (40, 30), 3).save(record.files["semseg"])
    with pytest.raises(DataError, match="expected 1 to 2, got 3"):
        one.label(record, "semseg", Segmentation(classes=("wall", "floor")), None)


# --- errors ----------------------------------------------------------------------------------------


def test_missing_folders(one: Nyud, tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"nowhere: no such folder; unpack NYUD_MT\.tgz"):
        decode(Nyud, {"root": str(tmp_path / "nowhere")}).records("train")
    shutil.rmtree(one.root / "edge")
    with pytest.raises(DatasetNotFoundError, match=r"lacks edge; unpack"):
        one.records("train")


def test_layout_that_cannot_be_told(one: Nyud) -> None:
    shutil.rmtree(one.root / "normals")
    (one.root / "normals").mkdir()
    with pytest.raises(DatasetNotFoundError, match=r"normals: neither \.npy nor \.png"):
        one.records("train")


def test_lists(one: Nyud) -> None:
    (one.root / "images" / "0003.jpg").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"train\.txt: 1 of 2 listed photos .* first 0003"):
        one.open("train", TaskSet(one.TASKS), train=True)
    (one.root / "gt_sets" / "val.txt").write_text("")
    with pytest.raises(DatasetNotFoundError, match=r"val\.txt: split lists no samples"):
        one.records("val")
    (one.root / "gt_sets" / "val.txt").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"val\.txt: split cannot be read"):
        one.records("val")


@pytest.mark.parametrize("name", ["image", "semseg", "depth", "normals", "edge"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "nonsense"])
def test_damaged_file_is_named(written: Written, name: str, damage: str) -> None:
    spec, _ = written
    record = spec.records("val")[0]
    path = record.files[name]
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"no such format" * 20)
    with pytest.raises(DataError, match=f"{path.parent.name}/{path.name}"):
        spec.read(record, name)


def test_verify_lists_every_bad_file(one: Nyud) -> None:
    def path(name: str, index: int = 0) -> Path:
        return one.records("val")[index].files[name]

    depth = np.load(path("depth"))
    depth[3, 4] = np.nan
    np.save(path("depth"), depth)
    np.save(path("normals"), np.zeros((30, 40)))
    np.save(path("edge"), np.full((30, 40), 7))
    Image.new("I;16", (40, 30)).save(path("image").with_suffix(".png"))
    path("image").with_suffix(".png").rename(path("image"))
    Image.new("L", (40, 30), 41).save(path("semseg", 1))
    Image.new("I;16", (40, 30), 3).save(path("semseg", 2))
    np.save(path("depth", 1), np.ones((3, 3)))
    np.save(path("normals", 1), np.full((30, 40, 3), np.inf))
    np.save(path("edge", 1), np.full((30, 40), 7))
    found = verify(one, ["val"]).problems
    for words in (
        "0001.jpg: image has an unexpected mode", "0002.png: label map with an unknown class id",
        "0005.png: image has an unexpected mode", "depth/0002.npy: the depth map has another size",
        "normals/0002.npy: map with 3600 values that are not finite", "edge/0002.npy: binary label map",
    ):  # fmt: skip
        assert sum(words in problem for problem in found) == 1, words
    assert len(found) == 6 + 3
    Image.new("RGB", (40, 30)).save(path("image"))
    found = verify(one, ["val"]).problems
    assert any("depth/0001.npy: map with 1 values that are not finite" in problem for problem in found)
    assert any("normals/0001.npy: array of an unexpected kind" in problem for problem in found)
    assert len(found) == 5 + 3


def test_edge_png_of_other_values(tmp_path: Path) -> None:
    write_nyud(tmp_path / "nyud", "NYUDv2")
    spec = decode(Nyud, {"root": str(tmp_path / "nyud")})
    path = spec.records("val")[0].files["edge"]
    Image.new("L", (40, 30), 128).save(path)
    with pytest.raises(DataError, match=r"edge/0001\.png: binary label map .* got 128"):
        spec.open("val", TaskSet(spec.TASKS), train=False)[0]
