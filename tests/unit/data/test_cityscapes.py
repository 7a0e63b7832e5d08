"""The Cityscapes reader against a fabricated folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polytask.config import decode
from polytask.data.cityscapes import CATEGORIES, CLASSES, Cityscapes
from polytask.data.mtan import CityscapesSmall
from polytask.data.verification import verify
from polytask.errors import ConfigError, DataError, DatasetNotFoundError
from polytask.tasks import Depth
from tests.data.cityscapes import BASELINE, FOCUS, NAMES, ONLY_IN_CATEGORIES, Street, write_cityscapes


@pytest.fixture
def streets(tmp_path: Path) -> dict[str, Street]:
    return write_cityscapes(tmp_path / "cs")


@pytest.fixture
def root(streets: dict[str, Street], tmp_path: Path) -> Path:
    return tmp_path / "cs"


def open_spec(root: Path, **fields) -> Cityscapes:
    return decode(Cityscapes, {"root": str(root), "image_size": [16, 24], **fields})


def test_splits(root: Path) -> None:
    fine, coarse = open_spec(root), open_spec(root, annotation="coarse")
    assert [record.id for record in fine.records("train")] == [
        f"{city}_000000_{frame}" for city in ("aachen", "bochum") for frame in ("000019", "000294")
    ]
    assert fine.split_names() == ("train", "val")
    assert coarse.split_names() == ("train", "val", "train_extra")
    assert [record.id[:8] for record in coarse.records("train_extra")] == ["augsburg"] * 2
    with pytest.raises(ConfigError, match="train_extra"):
        fine.records("train_extra")


@pytest.mark.parametrize("annotation", ["fine", "coarse"])
@pytest.mark.parametrize("classes", [19, 7])
def test_ids_become_classes_and_categories(
    root: Path, streets: dict[str, Street], annotation: str, classes: int
) -> None:
    spec = open_spec(root, annotation=annotation, classes=classes)
    expected = np.full(34, 255)
    for name, (number, category) in NAMES.items():
        expected[number] = CLASSES.index(name) if classes == 19 else CATEGORIES.index(category)
    for category, numbers in ONLY_IN_CATEGORIES.items() if classes == 7 else ():
        expected[list(numbers)] = CATEGORIES.index(category)
    for record in spec.records("val"):
        ids = streets[record.id].ids["gtFine" if annotation == "fine" else "gtCoarse"]
        assert np.array_equal(spec.read(record, "semseg"), expected[ids])
        assert np.array_equal(spec.read(record, "image").permute(1, 2, 0), streets[record.id].image)
    assert spec.labels()["semseg"].channels == classes
    assert verify(spec).problems == []


def test_depth_in_its_three_units(root: Path, streets: dict[str, Street]) -> None:
    spec = open_spec(root)
    record = spec.records("val")[0]
    stored = streets[record.id].disparity.astype(np.float64)
    disparity = np.where(stored > 0, (stored - 1) / 256, 0)
    with np.errstate(divide="ignore"):
        meters = BASELINE * FOCUS / disparity
    valid = meters <= 80
    depth = spec.read(record, "depth").numpy()
    assert depth.dtype == np.float32
    assert depth[0, :4].tolist() == [0, 0, 0, 0]  # unknown, at infinity, 3226 m, 80.6 m
    assert np.allclose(depth, np.where(valid, meters, 0), rtol=1e-6)
    inverse, pixels = (
        open_spec(root, depth_kind=kind).read(record, "depth") for kind in ("inverse", "disparity")
    )
    assert np.allclose(inverse, np.where(valid, 1 / meters, 0), rtol=1e-6)
    assert np.allclose(pixels, np.where(valid, disparity, 0), rtol=1e-6)
    far = open_spec(root, max_depth=4000).read(record, "depth")
    assert far[0, :4].tolist() == pytest.approx([0, 0, BASELINE * FOCUS * 256, BASELINE * FOCUS * 6.4])


def test_kind_of_depth_says_what_a_zoom_does(root: Path) -> None:
    for kind, inverse in (("meters", False), ("inverse", True), ("disparity", True)):
        depth = open_spec(root, depth_kind=kind, pipeline={"type": "mtan"}).labels()["depth"]
        assert isinstance(depth, Depth) and depth.inverse == inverse
    small = CityscapesSmall.TASKS["depth"]
    assert isinstance(small, Depth) and small.inverse


# --- errors ----------------------------------------------------------------------------------------


def test_missing_folders(root: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"nowhere: no such folder; unpack the zip files"):
        open_spec(root / "nowhere").records("train")
    shutil.rmtree(root / "gtFine" / "val")
    with pytest.raises(DatasetNotFoundError, match=r"lacks gtFine/val; "):
        open_spec(root).records("val")
    shutil.rmtree(root / "leftImg8bit" / "val" / "frankfurt")
    with pytest.raises(DatasetNotFoundError, match=r"leftImg8bit/val: no images; "):
        open_spec(root, annotation="coarse").records("val")


def test_only_depth_needs_disparity_and_cameras(root: Path) -> None:
    shutil.rmtree(root / "disparity")
    spec = open_spec(root)
    record = spec.records("val")[0]
    assert spec.read(record, "semseg").shape == (16, 32)
    with pytest.raises(DataError, match=r"disparity\.png: no such file; unpack disparity_trainvaltest\.zip"):
        spec.read(record, "depth")


@pytest.mark.parametrize(
    ("camera", "sentence"),
    [
        (None, "no such file; unpack .* camera_trainvaltest"),
        ("{", "no extrinsic.baseline and intrinsic.fx can be read"),
        ("[]", "no extrinsic.baseline"),
        (json.dumps({"extrinsic": {"baseline": 0.2}, "intrinsic": {}}), "no extrinsic.baseline.*fx"),
        (json.dumps({"extrinsic": {"baseline": None}, "intrinsic": {"fx": 9}}), "no extrinsic.baseline"),
        (json.dumps({"extrinsic": {"baseline": 0}, "intrinsic": {"fx": 9}}), r".*is not positive, got 0\.0"),
    ],
)
def test_bad_cameras(root: Path, camera: str | None, sentence: str) -> None:
    spec = open_spec(root)
    record = spec.records("val")[0]
    path = record.files["camera"]
    path.unlink()
    if camera is not None:
        path.write_text(camera)
    with pytest.raises(DataError, match=rf"_camera\.json: {sentence}"):
        spec.read(record, "depth")


def test_verify_lists_every_bad_file(root: Path) -> None:
    spec = open_spec(root)
    first, second = (record.files for record in spec.records("val"))
    Image.new("L", (32, 16), 34).save(first["semseg"])
    Image.new("L", (32, 16), 3).save(first["depth"])
    Image.new("I;16", (32, 16)).save(second["semseg"])
    second["depth"].write_bytes(second["depth"].read_bytes()[:70])
    problems = verify(spec, ["val"]).problems
    expected = (
        "000019_gtFine_labelIds.png: unknown label id, expected 0 to 33, got 34",
        "000019_disparity.png: image has an unexpected mode",
        "000294_gtFine_labelIds.png: image has an unexpected mode",
        "000294_disparity.png: image cannot be read",
    )
    assert len(problems) == len(expected)
    assert all(words in problem for words, problem in zip(expected, problems, strict=True))
