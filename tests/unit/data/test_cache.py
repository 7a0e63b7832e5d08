"""Decoded labels that are kept: what is returned, when entries count, and what happens to damaged ones."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polytask.data import cache
from polytask.data.cache import label_folder, prepare, read_cached
from polytask.data.pascal_context import PascalContext
from polytask.data.rooms import Rooms
from polytask.data.verification import verify
from polytask.errors import ConfigError, DataError, PolytaskWarning
from polytask.tasks.base import TaskSet
from tests.data.pascal_mt import write_pascal_mt


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PascalContext:
    write_pascal_mt(tmp_path / "PASCAL_MT")
    monkeypatch.setenv("POLYTASK_CACHE", str(tmp_path / "cache"))
    return PascalContext(root=tmp_path / "PASCAL_MT", image_size=(24, 40))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the labels that were read from the files."""
    seen: list[str] = []
    original = PascalContext.read
    monkeypatch.setattr(
        PascalContext, "read", lambda self, r, name: (seen.append(name), original(self, r, name))[1]
    )
    return seen


def entries(spec: PascalContext, name: str = "*") -> list[Path]:
    folder = label_folder(spec)
    assert folder is not None
    return sorted(path for path in folder.glob(f"{name}/*") if path.is_file())


def test_nothing_is_kept_until_prepared(spec: PascalContext, reads: list[str]) -> None:
    record = spec.records("val")[0]
    for _ in range(2):
        read_cached(spec, record, "edge")
    assert reads == ["edge", "edge"]
    assert not (spec.root.parent / "cache").exists()


def test_prepared_labels_are_those_of_the_files(spec: PascalContext, reads: list[str]) -> None:
    report = prepare(spec)
    assert report["counts"] == {"train": 2, "val": 3}
    assert (report["labels"], report["problems"]) == ([*spec.TASKS], [])
    assert len(entries(spec)) == 5 * 5
    del reads[:]
    for record in spec.records("train") + spec.records("val"):
        for name in spec.TASKS:
            kept = read_cached(spec, record, name)
            assert not reads
            fresh = spec.read(record, name)
            assert kept.dtype == fresh.dtype
            assert torch.equal(kept, fresh)
            del reads[:]
    tasks = TaskSet(spec.TASKS)
    never = spec.model_copy(update={"label_cache": "never"})
    pairs = zip(
        spec.open("train", tasks, train=True)[0].items(),
        never.open("train", tasks, train=True)[0].items(),
        strict=True,
    )
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for (_, a), (_, b) in pairs)
    assert not any(path.name.startswith(".") for path in label_folder(spec).rglob("*"))


def test_settings_that_bear_on_reading_have_folders_of_their_own(spec: PascalContext) -> None:
    other = spec.model_copy(update={"batch_size": 2, "image_size": (9, 9), "workers": 3})
    assert label_folder(other) == label_folder(spec)
    assert label_folder(spec.model_copy(update={"require_parts": True})) != label_folder(spec)
    assert label_folder(spec.model_copy(update={"label_cache": "never"})) is None


def test_a_folder_of_ones_own_fills_itself(spec: PascalContext, tmp_path: Path, reads: list[str]) -> None:
    own = spec.model_copy(update={"label_cache": tmp_path / "own"})
    record = own.records("val")[0]
    for _ in range(2):
        assert torch.equal(read_cached(own, record, "semseg"), spec.read(record, "semseg"))
    assert reads.count("semseg") == 1 + 2
    assert (tmp_path / "own").is_dir()
    rooms = Rooms(preset="nano", pretrain_size=4, label_cache=tmp_path / "own")
    room = rooms.records("val")[0]
    assert torch.equal(read_cached(rooms, room, "normals"), rooms.read(room, "normals"))
    assert "scene" not in prepare(rooms, ["val"])["labels"]


def touch(path: Path) -> None:
    """Another time of modification."""
    facts = path.stat()
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))


def swap(path: Path) -> None:
    """Another content (a map of zeros) with the size and the time of modification that there were."""
    facts = path.stat()
    with Image.open(path) as picture:
        Image.new("L", picture.size).save(path)
    content = path.read_bytes()
    path.write_bytes(content + b"\0" * (facts.st_size - len(content)))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (facts.st_size, facts.st_mtime_ns)


def test_changed_content_and_changed_code_are_noticed(
    spec: PascalContext, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(spec)
    record, other = spec.records("val")[:2]
    before = read_cached(spec, record, "saliency")
    swap(record.files["saliency"])
    del reads[:]
    for _ in range(2):
        assert before.any() and not read_cached(spec, record, "saliency").any()
        read_cached(spec, other, "saliency")
    assert reads == ["saliency"]
    monkeypatch.setattr(cache, "_code", lambda _: "edited")
    read_cached(spec, other, "semseg")
    assert reads == ["saliency", "semseg"]


def test_files_that_were_only_touched_count(
    spec: PascalContext, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(spec)
    record, hashed = spec.records("val")[0], list[str]()
    original = cache._hash
    monkeypatch.setattr(cache, "_hash", lambda path, state: (hashed.append(path), original(path, state))[1])
    del reads[:]
    read_cached(spec, record, "semseg")
    assert not hashed
    for path in record.files.values():
        touch(path)
    for _ in range(2):
        kept = read_cached(spec, record, "semseg")
    assert set(hashed) == set(map(str, record.files.values())) and len(hashed) == len(set(hashed))
    assert not reads and torch.equal(kept, spec.read(record, "semseg"))


def test_preparing_looks_at_the_content_itself(
    spec: PascalContext, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system whose times do not tell that a file has changed."""
    monkeypatch.setattr(cache, "_state", lambda path: (os.stat(path).st_size, os.stat(path).st_mtime_ns))
    prepare(spec)
    record = spec.records("val")[0]
    del reads[:]
    prepare(spec)
    assert not reads
    swap(record.files["saliency"])
    assert read_cached(spec, record, "saliency").any()
    prepare(spec)
    assert sorted(reads) == sorted(spec.TASKS)  # all labels of one sample: one may depend on another's file
    assert not read_cached(spec, record, "saliency").any()


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "foreign"])
def test_damaged_entries_are_made_again(spec: PascalContext, damage: str) -> None:
    prepare(spec)
    (entry,) = (path for path in entries(spec, "normals") if "2008_000002" in path.name)
    content = bytearray(entry.read_bytes())
    content[-1 - 4 * 200] ^= 1
    entry.write_bytes(
        {"empty": b"", "cut": content[:300], "flipped": content, "foreign": b"x" * 5000}[damage]
    )
    record = spec.records("val")[0]
    with pytest.warns(PolytaskWarning, match="2008_000002.*kept label is damaged .* made again"):
        found = read_cached(spec, record, "normals")
    assert torch.equal(found, spec.read(record, "normals"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(read_cached(spec, record, "normals"), found)


def test_a_full_or_locked_disk_is_said_once(spec: PascalContext, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(PolytaskWarning, match=r"cannot be kept \(No space left") as caught:
        prepare(spec)
    assert len(caught) == 1
    assert torch.equal(
        read_cached(spec, spec.records("val")[0], "edge"), spec.read(spec.records("val")[0], "edge")
    )


def test_problems_are_collected_and_verify_reads_the_files(spec: PascalContext) -> None:
    prepare(spec)
    broken = spec.records("val")[0].files["human_parts"]
    broken.write_bytes(b"no matlab")
    report = prepare(spec)
    assert len(report["problems"]) == 1
    assert str(broken) in report["problems"][0]
    other = spec.records("val")[1].files["saliency"]
    other.write_bytes(b"\0" * other.stat().st_size)
    assert any(str(other) in problem for problem in verify(spec, ["val"]).problems)
    other.unlink()
    with pytest.raises(DataError, match="sal_distill"):
        read_cached(spec, spec.records("val")[1], "saliency")
    with pytest.raises(ConfigError, match="label_cache: no labels are kept"):
        prepare(spec.model_copy(update={"label_cache": "never"}))


def test_several_processes_fill_one_folder(spec: PascalContext) -> None:
    assert prepare(spec, ["val"], workers=2)["counts"] == {"val": 3}
    assert len(entries(spec)) == 3 * 5


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.array([[0, 7, 255]], np.int64), np.uint8),
        (np.array([[True, False]]), np.uint8),
        (np.array([[-1, 300]], np.int32), np.int32),
        (np.linspace(0, 1, 300, dtype=np.float32).reshape(20, 15), np.uint16),
        (np.random.default_rng(0).random((300, 300)), np.float64),
        (np.zeros((0, 3), np.float32), np.uint8),
    ],
)
def test_values_are_kept_without_loss(tmp_path: Path, value: np.ndarray, kind: type) -> None:
    codes, _ = cache._exact(value)
    assert codes.dtype == kind
    cache._keep(tmp_path / "x" / "y", {"code": "c", "states": "s"}, value)
    kept = cache._load(tmp_path / "x" / "y", "c")
    assert kept is not None
    assert kept[1]["states"] == "s"
    assert np.array_equal(kept[0].numpy(), value)
    assert cache._load(tmp_path / "x" / "y", "other") is None
