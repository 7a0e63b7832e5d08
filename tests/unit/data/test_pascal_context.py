"""The PASCAL_MT reader against a fabricated folder, and what it says when the folder is not right."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from polytask.config import decode
from polytask.data import files
from polytask.data.pascal_context import PART_NAMES, WITH_NORMALS, PascalContext, boundaries
from polytask.data.thinning import contours, thin
from polytask.data.verification import verify
from polytask.errors import ConfigError, DataError, DatasetNotFoundError, MissingDependencyError
from polytask.tasks.base import TaskSet
from tests.data.pascal_mt import OUTDOORS, Photo, write_pascal_mt

Written = tuple[PascalContext, dict[str, Photo]]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    photos = write_pascal_mt(tmp_path / "PASCAL_MT")
    return decode(PascalContext, {"root": str(tmp_path / "PASCAL_MT"), "image_size": 32}), photos


def record_of(spec: PascalContext, name: str, split: str = "val"):
    return next(record for record in spec.records(split) if record.id == name)


def test_fields_are_what_was_written(written: Written) -> None:
    spec, photos = written
    for split, count in (("train", 2), ("val", 3)):
        records = spec.records(split)
        assert [r.id for r in records] == [n for n, p in photos.items() if p.split == split]
        assert len(records) == count
        for record in records:
            photo = photos[record.id]
            with Image.open(record.files["image"]) as picture:
                image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
            assert torch.equal(spec.read(record, "image"), image)
            assert np.array_equal(spec.read(record, "semseg"), photo.semseg)
            assert np.array_equal(spec.read(record, "human_parts"), photo.parts)
            assert np.array_equal(spec.read(record, "saliency"), photo.saliency / 255 > 0.5)
            decoded = np.where(photo.trusted[..., None], 2 * (photo.normals / np.float32(255)) - 1, 0)
            assert np.allclose(spec.read(record, "normals"), decoded, atol=1e-6)
            assert np.array_equal(spec.read(record, "edge"), boundaries(photo.context))


def test_edges_of_the_published_score(written: Written) -> None:
    spec, photos = written
    found = spec.model_copy(update={"edges": "contours"}).read(record_of(spec, "2008_000002"), "edge").numpy()
    assert np.array_equal(found, thin(contours(photos["2008_000002"].context)))
    assert not np.array_equal(found, spec.read(record_of(spec, "2008_000002"), "edge"))


def test_a_list_of_the_published_test_photos_is_a_split(written: Written) -> None:
    spec, _ = written
    assert spec.split_names() == ("train", "val")
    with pytest.raises(ConfigError, match=r"unknown split, got 'test_new'; known: train, val"):
        spec.check_split("test_new")
    (spec.root / "ImageSets" / "Context" / "test_new.txt").write_text("2008_000003\n")
    assert spec.split_names() == ("train", "val", "test_new")
    assert [record.id for record in spec.records("test_new")] == ["2008_000003"]
    assert verify(spec).problems == []


def test_labels_come_from_both_folders_and_voc_wins(written: Written) -> None:
    spec, photos = written
    record = record_of(spec, "2008_000003")
    assert record.files["semseg"].parent.name == "pascal-context"
    shutil.copy(record.files["semseg"], spec.root / "semseg" / "VOC12")
    assert record_of(spec, "2008_000003").files["semseg"].parent.name == "VOC12"
    assert {15, 255} <= set(np.unique(photos["2008_000002"].semseg))


def test_normals_outdoors_are_invalid_and_stay_so(written: Written) -> None:
    spec, photos = written
    assert OUTDOORS not in WITH_NORMALS
    assert len(WITH_NORMALS) == 170
    sample = spec.open("val", TaskSet(spec.TASKS), train=False)[0]
    length = sample["normals"].norm(dim=0)
    outdoors = torch.from_numpy(~photos["2008_000002"].trusted)
    assert 0 < outdoors.float().mean() < 0.5
    assert torch.all((length - 1).abs().minimum(length) < 1e-5)
    assert float((length == 0).float().mean()) == pytest.approx(float(outdoors.float().mean()), abs=0.05)


def test_photo_without_persons_has_its_parts_ignored(written: Written) -> None:
    spec, _ = written
    samples = spec.open("val", TaskSet(spec.TASKS), train=False)
    assert torch.all(samples[1]["human_parts"] == 255)
    assert set(samples[0]["human_parts"].unique().tolist()) <= set(range(7))


def test_requiring_parts_keeps_the_photos_of_persons(written: Written) -> None:
    spec, _ = written
    alone = decode(PascalContext, {"root": str(spec.root), "require_parts": True})
    assert [record.id for record in alone.records("val")] == ["2008_000002"]


def test_part_names_are_the_24_of_the_annotations() -> None:
    assert len({name for names in PART_NAMES for name in names}) == 24


def test_weights_are_those_of_the_recipe() -> None:
    weights = {name: task.weight for name, task in PascalContext.TASKS.items()}
    assert weights == {"semseg": 1, "human_parts": 2, "saliency": 5, "normals": 10, "edge": 50}


def test_nothing_is_written_into_the_folder(written: Written) -> None:
    spec, _ = written
    before = sorted((path, path.stat().st_mtime_ns) for path in spec.root.rglob("*"))
    assert verify(spec).problems == []
    assert before == sorted((path, path.stat().st_mtime_ns) for path in spec.root.rglob("*"))


def test_normals_of_another_size_than_the_photo_are_resized(written: Written) -> None:
    spec, photos = written
    record = record_of(spec, "2008_000002")
    Image.new("RGB", (70, 60)).save(record.files["image"])
    normals = spec.read(record, "normals")
    assert normals.shape == (60, 70, 3)
    savemat(record.files["context"], {"LabelMap": photos["2008_000003"].context})
    with pytest.raises(DataError, match="normals and LabelMap differ in size"):
        spec.read(record, "normals")


# --- thinning --------------------------------------------------------------------------------------


def test_thinning_equals_the_reference() -> None:
    """Boundaries of one label map before and after the thinning of the official boundary tool."""
    with np.load(Path(__file__).parent / "thinning.npz") as stored:
        mask, thinned = (np.unpackbits(stored[k])[: 192 * 256].reshape(192, 256) for k in ("mask", "thin"))
    assert np.array_equal(thin(mask), thinned)


def test_masks_of_bits_are_thinned_alike() -> None:
    masks = np.random.default_rng(0).random((30, 41, 70)) < np.linspace(0.1, 0.9, 70)
    bits = np.packbits(np.pad(masks, ((0, 0), (0, 0), (0, 58))), axis=-1, bitorder="little").view("<u8")
    found = np.unpackbits(thin(bits).view(np.uint8), axis=-1, count=70, bitorder="little")
    assert all(np.array_equal(found[..., k], thin(masks[..., k])) for k in range(0, 70, 5))


def test_thinning_a_bar_leaves_its_middle_line() -> None:
    bar = np.zeros((7, 20), bool)
    bar[2:5, 2:18] = True
    thinned = thin(bar)
    rows, columns = np.nonzero(thinned)
    assert set(rows) == {3}
    assert len(columns) >= 12
    assert np.array_equal(thin(thinned), thinned)


def test_thinning_keeps_lines_rings_and_dots() -> None:
    ring = np.zeros((9, 9), bool)
    ring[2:7, 2:7] = True
    ring[3:6, 3:6] = False
    ring[0, 0] = True
    thinned = thin(ring)
    assert thinned[0, 0]
    assert not thinned[3:6, 3:6].any()
    assert thinned[2:7, 2:7].sum() == 12  # only the four corners go


def test_boundaries_follow_the_regions() -> None:
    ids = np.zeros((12, 16), np.uint16)
    ids[:, 8:] = 459
    lines = boundaries(ids)
    assert np.array_equal(lines[1:-1].sum(1), np.ones(10))
    assert not lines[:, :7].any()
    assert not lines[:, 9:].any()
    assert not boundaries(np.full((5, 5), 3, np.uint16)).any()


# --- errors ----------------------------------------------------------------------------------------


def test_missing_root_says_where_it_looked_and_what_to_unpack(tmp_path: Path) -> None:
    spec = decode(PascalContext, {"root": str(tmp_path / "nowhere")})
    with pytest.raises(DatasetNotFoundError, match=r"nowhere.*PASCAL_MT\.tgz"):
        spec.records("train")


def test_half_unpacked_folder_names_what_is_missing(written: Written) -> None:
    spec, _ = written
    shutil.rmtree(spec.root / "sal_distill")
    shutil.rmtree(spec.root / "semseg")
    with pytest.raises(
        DatasetNotFoundError, match=r"sal_distill, semseg/VOC12 or semseg/pascal-context.*tgz"
    ):
        spec.records("train")


def test_list_that_names_an_absent_photo(written: Written) -> None:
    spec, _ = written
    (spec.root / "JPEGImages" / "2008_000003.jpg").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"val\.txt.*1 of 3 listed photos.*2008_000003"):
        spec.open("val", TaskSet(spec.TASKS), train=False)


@pytest.mark.parametrize("content", [None, "", b"\xff\xfe\xff"])
def test_unreadable_or_empty_list(written: Written, content: str | bytes | None) -> None:
    spec, _ = written
    path = spec.root / "ImageSets" / "Context" / "val.txt"
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DatasetNotFoundError, match=r"val\.txt: split"):
        spec.records("val")


@pytest.mark.parametrize("name", ["image", "semseg", "human_parts", "saliency", "normals", "edge"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "nonsense"])
def test_damaged_file_is_named(written: Written, name: str, damage: str) -> None:
    spec, _ = written
    record = record_of(spec, "2008_000002")
    path = record.files[name]
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"no such format" * 20)
    with pytest.raises(DataError, match=path.name):
        spec.read(record, name)


def test_label_of_another_size_names_file_and_both_sizes(written: Written) -> None:
    spec, _ = written
    record = record_of(spec, "2008_000002")
    Image.new("L", (11, 13)).save(record.files["saliency"])
    samples = spec.open("val", TaskSet(spec.TASKS), train=False)
    with pytest.raises(DataError, match=r"sal_distill/2008_000002\.png.*36x48.*13x11"):
        samples[0]
    assert any("13x11" in problem for problem in verify(spec, ["val"]).problems)


def test_part_masks_of_different_sizes(written: Written) -> None:
    spec, _ = written
    parts = np.empty((1, 2), [("part_name", object), ("mask", object)])
    parts[0, 0] = ("head", np.ones((4, 4), np.uint8))
    parts[0, 1] = ("torso", np.ones((5, 4), np.uint8))
    thing = np.empty((1, 1), [("class_ind", object), ("parts", object)])
    thing[0, 0] = (15, parts)
    record = record_of(spec, "2008_000002")
    savemat(record.files["human_parts"], {"anno": {"objects": thing}})
    with pytest.raises(DataError, match="masks differ in size"):
        spec.read(record, "human_parts")
    parts[0, 1] = ("tail", np.ones((4, 4), np.uint8))
    savemat(record.files["human_parts"], {"anno": {"objects": thing}})
    with pytest.raises(DataError, match=r"unexpected annotation.*tail"):
        spec.read(record, "human_parts")


def test_labels_saved_as_colors_are_refused(written: Written) -> None:
    spec, _ = written
    record = record_of(spec, "2008_000002")
    Image.new("RGB", (48, 36)).save(record.files["semseg"])
    with pytest.raises(DataError, match="got 'RGB'; labels are stored as numbers"):
        spec.read(record, "semseg")


def test_grey_photo_becomes_rgb(written: Written) -> None:
    spec, _ = written
    record = record_of(spec, "2008_000002")
    Image.new("L", (48, 36), 7).save(record.files["image"])
    assert torch.all(spec.read(record, "image") == 7)


def test_unknown_class_id_names_the_file(written: Written) -> None:
    spec, _ = written
    record = record_of(spec, "2008_000002")
    Image.new("L", (48, 36), 77).save(record.files["semseg"])
    with pytest.raises(DataError, match=r"VOC12/2008_000002\.png.*got 77"):
        spec.open("val", TaskSet(spec.TASKS), train=False)[0]


def test_wrong_mat_entries(written: Written) -> None:
    spec, _ = written
    record = record_of(spec, "2008_000002")
    savemat(record.files["context"], {"Other": np.zeros((3, 3))})
    with pytest.raises(DataError, match="no entry LabelMap"):
        spec.read(record, "edge")
    savemat(record.files["context"], {"LabelMap": "words"})
    with pytest.raises(DataError, match="no map of ids"):
        spec.read(record, "edge")


def test_without_scipy_it_says_what_to_install(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, _ = written
    real = importlib.import_module

    def refuse(name: str):
        if name == "scipy.io":
            raise ModuleNotFoundError(name)
        return real(name)

    monkeypatch.setattr(files.importlib, "import_module", refuse)
    with pytest.raises(MissingDependencyError, match=r"pip install 'polytask\[data\]'"):
        spec.read(record_of(spec, "2008_000002"), "edge")
