"""The readers of the arrays of MTAN against fabricated folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from polytask.config import decode
from polytask.data.mtan import CityscapesSmall, Nyuv2
from polytask.data.verification import verify
from polytask.errors import DataError, DatasetNotFoundError
from polytask.tasks.base import TaskSet
from tests.data.mtan import Arrays, write_cityscapes, write_nyuv2


@pytest.fixture
def rooms(tmp_path: Path) -> tuple[Nyuv2, Arrays]:
    arrays = write_nyuv2(tmp_path / "nyuv2")
    return decode(Nyuv2, {"root": str(tmp_path / "nyuv2"), "image_size": [12, 16]}), arrays


@pytest.fixture
def streets(tmp_path: Path) -> tuple[CityscapesSmall, Arrays]:
    arrays = write_cityscapes(tmp_path / "cityscapes2")
    return decode(CityscapesSmall, {"root": str(tmp_path / "cityscapes2"), "image_size": [8, 16]}), arrays


def test_nyuv2_is_what_was_written(rooms: tuple[Nyuv2, Arrays]) -> None:
    spec, arrays = rooms
    for split, count in (("train", 11), ("val", 3)):
        records = spec.records(split)
        assert [record.id for record in records] == [f"{split}-{n}" for n in range(count)]
        for n, record in enumerate(records):
            image = spec.read(record, "image")
            assert image.dtype == torch.float32
            assert np.allclose(image.permute(1, 2, 0), 255 * arrays[split, "image", n], rtol=2e-7, atol=0)
            label = arrays[split, "label", n]
            assert np.array_equal(spec.read(record, "semseg"), np.where(label == -1, 255, label))
            assert np.array_equal(spec.read(record, "depth"), arrays[split, "depth", n][..., 0])
            assert np.array_equal(spec.read(record, "normals"), arrays[split, "normal", n])


def test_samples_are_the_stored_fractions_without_any_change(rooms: tuple[Nyuv2, Arrays]) -> None:
    """No mean, no deviation, no rounding to 256 levels: one float32 rounding is all."""
    spec, arrays = rooms
    assert (spec.pipeline.mean, spec.pipeline.std) == ((0, 0, 0), (1, 1, 1))
    bare = {"type": "mtan", "flip": 0.0, "scales": []}
    spec = decode(Nyuv2, {"root": str(spec.root), "image_size": [12, 16], "pipeline": bare})
    sample = spec.open("val", TaskSet(spec.TASKS), train=True)[1]
    stored = torch.from_numpy(arrays["val", "image", 1]).permute(2, 0, 1)
    assert float((sample["image"] / stored - 1).abs().max()) < 2.5e-7
    assert torch.equal(sample["depth"][0], torch.from_numpy(arrays["val", "depth", 1][..., 0]))
    assert (sample["normals"][:, -2:] == 0).all()
    assert (sample["semseg"] == 255).sum() == (arrays["val", "label", 1] == -1).sum()


def test_trainval_is_both_folders_and_read_once_by_verify(rooms: tuple[Nyuv2, Arrays]) -> None:
    spec, _ = rooms
    assert spec.records("trainval") == spec.records("train") + spec.records("val")
    report = verify(spec)
    assert report.problems == []
    assert report.counts == {"train": 11, "val": 3, "trainval": 14}
    assert report.histograms["semseg"].total() == 14 * 12 * 16


@pytest.mark.parametrize(("classes", "folder"), [(7, "label_7"), (19, "label_19")])
def test_cityscapes_is_what_was_written(
    streets: tuple[CityscapesSmall, Arrays], classes: int, folder: str
) -> None:
    spec, arrays = streets
    spec = decode(CityscapesSmall, {"root": str(spec.root), "classes": classes})
    for n, record in enumerate(spec.records("val")):
        label = arrays["val", folder, n]
        assert np.array_equal(spec.read(record, "semseg"), np.where(label == -1, 255, label))
        assert np.array_equal(spec.read(record, "depth"), arrays["val", "depth", n][..., 0])
    assert spec.labels()["semseg"].channels == classes
    assert verify(spec).problems == []


def test_without_a_numbered_folder_label_is_read(streets: tuple[CityscapesSmall, Arrays]) -> None:
    spec, arrays = streets
    for split in ("train", "val"):
        shutil.rmtree(spec.root / split / "label_7")
    record = spec.records("train")[10]
    assert record.files["semseg"] == spec.root / "train" / "label" / "10.npy"
    label = arrays["train", "label", 10]
    assert np.array_equal(spec.read(record, "semseg"), np.where(label == -1, 255, label))
    shutil.rmtree(spec.root / "val" / "label")
    with pytest.raises(DatasetNotFoundError, match=r"val: the folder lacks label_7 or label; "):
        spec.records("trainval")


# --- errors ----------------------------------------------------------------------------------------


def test_missing_folders_and_empty_splits(rooms: tuple[Nyuv2, Arrays], tmp_path: Path) -> None:
    spec, _ = rooms
    with pytest.raises(DatasetNotFoundError, match=r"nowhere: no such folder; download it"):
        decode(Nyuv2, {"root": str(tmp_path / "nowhere")}).records("train")
    for path in (spec.root / "val" / "image").iterdir():
        path.unlink()
    with pytest.raises(DatasetNotFoundError, match=r"val/image: no files 0\.npy, 1\.npy"):
        spec.records("val")
    shutil.rmtree(spec.root / "val" / "normal")
    with pytest.raises(DatasetNotFoundError, match=r"val: the folder lacks normal; "):
        spec.records("val")
    shutil.rmtree(spec.root / "val")
    with pytest.raises(DatasetNotFoundError, match=r"nyuv2: the folder lacks val; "):
        spec.records("val")


@pytest.mark.parametrize("folder", ["image", "label", "depth", "normal"])
def test_missing_and_truncated_files_are_named(rooms: tuple[Nyuv2, Arrays], folder: str) -> None:
    spec, _ = rooms
    for n, damage in enumerate((lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:200]))):
        damage(spec.root / "val" / folder / f"{n}.npy") if folder != "image" or n else None
    problems = verify(spec, ["val"]).problems
    reasons = ("no such file", "array cannot be read")
    expected = [f"val/{folder}/{n}.npy: {reasons[n]}" for n in range(folder == "image", 2)]
    assert len(problems) == len(expected)
    assert all(words in problem for words, problem in zip(expected, problems, strict=True))


@pytest.mark.parametrize(
    ("folder", "array", "sentence"),
    [
        ("image", np.full((12, 16, 3), 200.0), r"image/0\.npy: unexpected image, .* from 0 to 200"),
        ("image", np.zeros((12, 16, 3), np.uint8), r"unexpected image, expected .* fractions .*uint8"),
        ("image", np.zeros((12, 16, 4)), r"unexpected image, .*\(12, 16, 4\)"),
        ("image", np.full((12, 16, 3), np.nan), "unexpected image, .* nan"),
        ("label", np.full((12, 16), 13.0), r"label/0\.npy: label map with an unknown class id.* got 13"),
        ("label", np.full((12, 16), -2.0), "unknown class id.* got -2"),
        ("label", np.full((12, 16), 0.5), r"no integer, got 0\.5"),
        ("label", np.full((12, 16), np.nan), "no integer, got nan"),
        ("label", np.zeros((12, 16, 1)), "array of an unexpected kind, expected numbers on 2 axes"),
        ("label", np.zeros((12, 15)), "the semseg map has another size .* 12x16 .*, got '12x15'"),
        ("depth", np.full((12, 16, 1), np.nan), r"depth/0\.npy: map with 192 values that are not finite"),
        (
            "depth",
            np.ones((12, 16, 2)),
            r"unexpected shape, expected height x width, got \[12, 16, 2\]",
        ),
        ("normal", np.ones((12, 16, 2)), "unexpected shape, expected height x width x 3"),
        ("normal", np.full((12, 16, 3), np.inf), r"normal/0\.npy: map with 576 values that are not finite"),
    ],
)
def test_unexpected_content_is_named(
    rooms: tuple[Nyuv2, Arrays], folder: str, array: np.ndarray, sentence: str
) -> None:
    spec, _ = rooms
    np.save(spec.root / "val" / folder / "0.npy", array)
    with pytest.raises(DataError, match=sentence):
        spec.open("val", TaskSet(spec.TASKS), train=False)[0]
