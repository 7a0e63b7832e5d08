"""Rooms, faces, pets and clips in the layouts of public archives, read back by the readers of those."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from polytask.catalog import dataset
from polytask.data import celeba, cityscapes, standins, video
from polytask.data.base import DatasetSpec
from polytask.data.export import CONTEXT, LAYOUTS, SKY, VOC, export
from polytask.data.pascal_context import WITH_NORMALS, boundaries
from polytask.data.rooms import FIRST_SEED
from polytask.data.scenes import compose_scene, trace
from polytask.data.verification import verify
from polytask.errors import ConfigError

COUNT = 5
READERS = {
    "PASCAL_MT": "pascal_context", "NYUD_MT": "nyud", "NYUD_MT-clips": "nyud", "NYUDv2": "nyud",
    "nyuv2": "nyuv2", "cityscapes": "cityscapes", "cityscapes2": "cityscapes_small", "CelebA": "celeba",
    "oxford-iiit-pet": "pets",
}  # fmt: skip
Written = dict[str, Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Every layout; tests must not change them."""
    root = tmp_path_factory.mktemp("exported")
    for layout in LAYOUTS:
        fixed = layout in ("CelebA", "oxford-iiit-pet")
        counts = export(layout, root / layout, () if fixed else ["preset=nano"], count=24 if fixed else COUNT)
        assert set(counts.values()) == {24 if fixed else COUNT}
    return {layout: root / layout for layout in LAYOUTS}


def read(written: Written, layout: str, *settings: str) -> DatasetSpec:
    return dataset(READERS[layout], written[layout], settings)


def drawn(index: int, split: str = "val") -> dict[str, Any]:
    return dict(trace(compose_scene(FIRST_SEED[split] + index), 32, 48))


def fields(spec: DatasetSpec, split: str = "val") -> list[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Pairs of what was drawn and what is read."""
    names = ("image", *spec.labels())
    return [
        (drawn(i, split), {name: spec.read(record, name).numpy() for name in names})
        for i, record in enumerate(spec.records(split))
    ]


def degrees(a: np.ndarray, b: np.ndarray) -> float:
    """Largest angle between two maps of vectors."""
    unit = [v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (a, b)]
    return float(np.degrees(np.arccos(np.clip((unit[0] * unit[1]).sum(-1), -1, 1))).max())


def close(image: np.ndarray, drawn_image: np.ndarray) -> bool:
    """Equal up to JPEG, which keeps brightness best."""
    return bool(
        np.abs((np.moveaxis(image, 0, -1).astype(float) - drawn_image) @ (0.3, 0.59, 0.11)).mean() < 3
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_readers_find_nothing_wrong(written: Written, layout: str) -> None:
    report = verify(read(written, layout, *(["clip=2"] if layout == "NYUD_MT-clips" else [])))
    assert report.problems == []
    assert set(report.counts.values()) <= {COUNT, 2 * COUNT, 24}


def test_pascal(written: Written) -> None:
    for room, seen in fields(read(written, "PASCAL_MT")):
        assert close(seen["image"], room["image"])
        assert np.array_equal(seen["semseg"], VOC[room["semseg"]])
        assert np.array_equal(
            seen["human_parts"], np.where(room["human_parts"] == 255, 0, room["human_parts"])
        )
        assert np.array_equal(seen["saliency"], room["saliency"])
        sky = room["depth"] == 0
        assert (seen["normals"][sky] == 0).all()
        assert degrees(seen["normals"][~sky], room["normals"][~sky]) < 0.5
        assert np.array_equal(seen["edge"], boundaries(np.where(sky, SKY, CONTEXT[room["semseg"]])))
    names = {12: "tvmonitor", 10: "person", 9: "pottedplant", 6: "chair", 5: "diningtable", 3: "bottle"}
    spec = read(written, "PASCAL_MT")
    assert {k: spec.labels()["semseg"].classes[VOC[k]] for k in names} == names
    assert set(CONTEXT.tolist()) <= WITH_NORMALS
    assert SKY not in WITH_NORMALS
    assert len(set(VOC)) == len(set(CONTEXT)) == 13


def test_nyud(written: Written) -> None:
    for layout in ("NYUD_MT", "NYUDv2"):
        for room, seen in fields(read(written, layout)):
            sky = room["depth"] == 0
            assert np.array_equal(seen["semseg"], np.where(sky, 255, room["semseg"]))
            assert np.array_equal(seen["depth"], room["depth"])
            assert np.array_equal(seen["edge"], room["edge"])
            if layout == "NYUD_MT":
                assert close(seen["image"], room["image"])
                assert np.array_equal(seen["normals"], room["normals"])
            else:
                assert np.array_equal(np.moveaxis(seen["image"], 0, -1), room["image"])
                assert degrees(seen["normals"][~sky], room["normals"][~sky]) < 0.5


def test_clips(written: Written) -> None:
    spec = read(written, "NYUD_MT-clips", "clip=2")
    for record, (seed, frame) in zip(
        spec.records("val"), [*((4_500_000, f) for f in (4, 12, 20, 28)), (4_500_001, 4)], strict=True
    ):
        clip = spec.read(record, "clip").numpy()
        for offset, image in zip(range(-2, 3), clip, strict=True):
            scene = video.compose_frame(seed, frame + offset)
            assert close(image, trace(scene, 32, 48)["image"])  # type: ignore[arg-type]
        assert np.array_equal(
            spec.read(record, "depth"), trace(video.compose_frame(seed, frame), 32, 48)["depth"]
        )


def test_nyuv2(written: Written) -> None:
    for room, seen in fields(read(written, "nyuv2"), "train"):
        assert np.allclose(np.moveaxis(seen["image"], 0, -1), room["image"], atol=1e-3)
        assert np.array_equal(seen["semseg"], room["semseg"])
        assert np.array_equal(seen["depth"], room["depth"])
        assert np.array_equal(seen["normals"], room["normals"])


def test_cityscapes(written: Written) -> None:
    for room, seen in fields(read(written, "cityscapes", "max_depth=100")):
        assert np.array_equal(np.moveaxis(seen["image"], 0, -1), room["image"])
        assert np.array_equal(seen["semseg"], room["semseg"] + 1)
        assert np.array_equal(seen["depth"] > 0, room["depth"] > 0)
        disparity = 0.8 * 0.22 * 48 / np.maximum(room["depth"], 1e-9)  # pixels, at the shortest focus
        error = np.abs(seen["depth"] - room["depth"]) / np.maximum(room["depth"], 1e-9)
        assert (error <= 1.1 / 512 / disparity).all()
    names = [cityscapes.CLASSES[k] for k in (11, 12)]
    assert names == ["person", "rider"]  # person and robot of the rooms
    coarse = read(written, "cityscapes", "annotation=coarse")
    for (_, fine), (_, rough) in zip(fields(read(written, "cityscapes")), fields(coarse), strict=True):
        left = rough["semseg"] != 255
        assert 0.4 < left.mean() < 1
        assert np.array_equal(rough["semseg"][left], fine["semseg"][left])
    path = next((written["cityscapes"] / "gtFine" / "val" / "rooms").glob("*_instanceIds.png"))
    with Image.open(path) as picture:
        ids = np.array(picture)
    room = drawn(int(path.name.split("_")[1]) - FIRST_SEED["val"])
    counted = ids >= 1000
    assert np.array_equal(counted, np.isin(room["semseg"], (10, 11, 12)))
    assert np.array_equal(ids[counted] % 1000, room["instance"][counted])
    assert np.array_equal(
        np.where(counted, ids // 1000, ids), np.array(cityscapes.CLASS_IDS)[room["semseg"] + 1]
    )


def test_cityscapes_small(written: Written) -> None:
    same, small = (
        read(written, "cityscapes", "depth_kind=disparity"),
        read(written, "cityscapes2", "classes=19"),
    )
    for (_, big), (room, seen) in zip(fields(same), fields(small), strict=True):
        assert np.array_equal(seen["semseg"], room["semseg"] + 1)
        far = big["depth"] == 0  # beyond 80 m, or sky
        assert np.allclose(seen["depth"][~far] * 48, big["depth"][~far], atol=1 / 256)
    categories = [cityscapes.CATEGORIES.index(name) for name in ("human", "vehicle")]
    for room, seen in fields(read(written, "cityscapes2")):
        assert np.array_equal(seen["semseg"] == categories[0], np.isin(room["semseg"], (10, 11)))
        assert np.array_equal(seen["semseg"] == categories[1], room["semseg"] == 12)


def test_faces(written: Written) -> None:
    spec = read(written, "CelebA")
    varying = np.zeros(40, bool)
    for split, people in (("train", (0, 1)), ("val", (192, 193)), ("test", (224, 225))):
        for i, record in enumerate(spec.records(split)):
            person, view = people[i // standins.VIEWS], i % standins.VIEWS
            picture, holds = standins.portrait(person, view)
            assert close(spec.read(record, "image").numpy(), picture)
            flags = spec.read(record, "attributes").numpy()
            assert {celeba.ATTRIBUTES[k] for k in np.flatnonzero(flags)} == holds
            assert int(spec.read(record, "identity")) == person + 1
            varying |= flags > 0
    assert 9 <= varying.sum() <= 12


def test_pets(written: Written) -> None:
    spec = read(written, "oxford-iiit-pet")
    for split, first in (("train", 0), ("test", 40)):
        for i, record in enumerate(spec.records(split)):
            picture, trimap = standins.pet(i % 12, first + i // 12)
            assert close(spec.read(record, "image").numpy(), picture)
            assert np.array_equal(spec.read(record, "trimap"), trimap - 1)
            assert int(spec.read(record, "species")) == (i % 12 >= 4)
            assert record.id[0].isupper() == (i % 12 < 4)  # as in the archive: cats in capitals
    assert len({int(spec.read(record, "breed")) for record in spec.records("train")}) == 12


def test_verify_lists_every_broken_file(written: Written, tmp_path: Path) -> None:
    root = tmp_path / "PASCAL_MT"
    shutil.copytree(written["PASCAL_MT"], root)
    photo, label, shape, ids, text = (
        root / "JPEGImages" / "2009_000000.jpg",
        root / "sal_distill" / "2009_000000.png",
        root / "normals_distill" / "2009_000001.png",
        root / "semseg" / "VOC12" / "2009_000002.png",
        root / "human_parts" / "2009_000003.mat",
    )
    photo.write_bytes(photo.read_bytes()[:600])
    Image.fromarray(np.zeros((32, 48), np.uint16)).save(label)
    Image.fromarray(np.zeros((30, 48, 3), np.uint8)).save(shape)
    Image.fromarray(np.full((32, 48), 21, np.uint8)).save(ids)
    text.write_text("no matrix")
    (root / "ImageSets" / "Context" / "train.txt").unlink()
    report = verify(dataset("pascal_context", root))
    assert report.counts == {"val": COUNT}
    broken = [photo, label, shape, ids, text, root / "ImageSets" / "Context" / "train.txt"]
    assert len(report.problems) == len(broken)
    assert all(sum(problem.startswith(f"{path}: ") for problem in report.problems) == 1 for path in broken)
    gone = verify(dataset("pascal_context", tmp_path / "nowhere"))
    assert len(gone.problems) == 1  # once, not once per split


def test_only_whole_folders_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export("NYUD_MT", tmp_path / "a", ["preset=nano", "difficulty=hard"], split="val", count=1)
    assert {p.name for p in (tmp_path / "a" / "gt_sets").iterdir()} == {"val.txt"}
    for words, message in (
        (("NYUD_MT", tmp_path / "a"), "nothing is overwritten"),
        (("NYUDv3", tmp_path / "b"), "did you mean 'NYUDv2'"),
        (("CelebA", tmp_path / "b", ["preset=nano"]), "takes no settings"),
        (("PASCAL_MT", tmp_path / "b", ["preset=tiney"]), "did you mean 'tiny'"),
    ):
        with pytest.raises(ConfigError, match=message):
            export(*words)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="known: train, val"):
        export("PASCAL_MT", tmp_path / "b", split="test")
    monkeypatch.setattr("polytask.data.export.trace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export("NYUD_MT", tmp_path / "b", ["preset=nano"])
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_same_pixels_for_the_same_seed(written: Written, tmp_path: Path) -> None:
    export("NYUDv2", tmp_path / "again", ["preset=nano"], split="val", count=COUNT)
    for path in (tmp_path / "again").rglob("*.png"):
        assert path.read_bytes() == (written["NYUDv2"] / path.relative_to(tmp_path / "again")).read_bytes()
