"""Packed datasets: nothing is lost, and the order holds for any number of processes, workers and restarts."""

from __future__ import annotations

import itertools
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from polytask.catalog import dataset
from polytask.data import packed
from polytask.data.base import DatasetSpec, Samples, train_loader
from polytask.data.packed import Packed, pack
from polytask.data.verification import verify
from polytask.engine import checkpoint
from polytask.errors import ConfigError, DataError, DatasetNotFoundError, MissingDependencyError
from polytask.tasks.base import TaskSet
from tests.conftest import train_quietly
from tests.data.pascal_mt import write_pascal_mt

PER_SHARD = 8
TASKS = ("semseg", "depth", "scene")


@pytest.fixture(scope="module")
def source(rooms: Path) -> DatasetSpec:
    return dataset("rooms", None, ["preset=nano"])


@pytest.fixture(scope="module")
def folder(source: DatasetSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 rooms to train on in 8 shards, and 32 to validate; tests must not change it."""
    out = tmp_path_factory.mktemp("packed") / "rooms"
    assert pack(source, out, ("train", "val"), per_shard=PER_SHARD) == {"train": 64, "val": 32}
    return out


@pytest.fixture
def stored(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same in a store, with an empty cache."""
    monkeypatch.setenv("POLYTASK_CACHE", str(tmp_path / "cache"))
    memory, root = fsspec.filesystem("memory"), f"memory://{tmp_path.name}"
    memory.put(str(folder), f"/{tmp_path.name}", recursive=True)
    yield root
    memory.rm(f"/{tmp_path.name}", recursive=True)


def open_packed(root: Any, *settings: str) -> Packed:
    packed._open.cache_clear()
    spec = dataset("packed", root, ["image_size=[32,48]", *settings])
    assert isinstance(spec, Packed)
    return spec


def samples(spec: DatasetSpec, split: str = "train") -> Samples:
    return spec.open(split, TaskSet({k: spec.labels()[k] for k in TASKS}), train=True, seed=7)


def batches(spec: DatasetSpec, **place: int) -> list[dict[str, Any]]:
    return list(train_loader(samples(spec), **{"batch_size": 8, "epoch": 2, "seed": 5, **place}))


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


def fetched(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "packed").rglob("*.tar"))


# --- what is kept ----------------------------------------------------------------------------------


def test_every_field_comes_back_as_it_was(source: DatasetSpec, folder: Path) -> None:
    spec = open_packed(folder)
    assert spec.split_names() == ("train", "val")
    assert {k: type(v) for k, v in spec.labels().items()} == {k: type(v) for k, v in source.labels().items()}
    for ours, theirs in zip(spec.records("val"), source.records("val"), strict=True):
        assert ours.id == theirs.id
        for name in ("image", *source.labels()):
            a, b = spec.read(ours, name), source.read(theirs, name)
            assert a.dtype == b.dtype
            assert torch.equal(a, b), name
    report = verify(spec, ["val"])
    assert report.problems == []
    assert report.histograms == verify(source, ["val"]).histograms


def test_photos_and_slow_annotations(tmp_path: Path) -> None:
    write_pascal_mt(tmp_path / "PASCAL_MT")
    gray = next((tmp_path / "PASCAL_MT" / "JPEGImages").iterdir())
    with Image.open(gray) as picture:
        picture.convert("L").save(gray)
    source = dataset("pascal_context", tmp_path / "PASCAL_MT", ["image_size=24"])
    pack(source, tmp_path / "out")
    spec = open_packed(tmp_path / "out", "image_size=24", "pipeline=astmt")
    assert verify(spec).problems == []
    assert spec.labels()["human_parts"].empty_is_ignored  # as the dataset has it
    a, b = (s.open("val", TaskSet(s.labels()), train=False) for s in (source, spec))
    assert all(same(x[k], y[k]) for x, y in zip(a, b, strict=False) for k in x)
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        names = tar.getnames()
        assert "train-000000-000001.semseg.png" in names
        content = tar.extractfile("train-000000-000000.image.jpg").read()  # type: ignore[union-attr]
    assert content == source.records("train")[0].files["image"].read_bytes()


def test_clips_and_real_valued_images(tmp_path: Path) -> None:
    from polytask.data.export import export

    export("NYUD_MT-clips", tmp_path / "nyud", ["preset=nano"], split="train", count=1)
    source = dataset("nyud", tmp_path / "nyud", ["clip=2"])
    pack(source, tmp_path / "clips", ["train"])
    spec = open_packed(tmp_path / "clips")
    assert samples_of(spec)["clip"].shape == (5, 3, 32, 48)
    assert torch.equal(
        spec.read(spec.records("train")[0], "clip"), source.read(source.records("train")[0], "clip")
    )
    export("nyuv2", tmp_path / "nyuv2", ["preset=nano"], count=1)
    source = dataset("nyuv2", tmp_path / "nyuv2")
    pack(source, tmp_path / "arrays", ["train"])
    spec = open_packed(tmp_path / "arrays")
    assert torch.equal(*(s.read(s.records("train")[0], "image") for s in (spec, source)))


def samples_of(spec: DatasetSpec) -> dict[str, Any]:
    return spec.open("train", TaskSet(spec.labels()), train=True)[0]


@pytest.mark.filterwarnings("ignore")  # webdataset leaves its files open
def test_shards_follow_the_naming_of_webdataset(folder: Path) -> None:
    with tarfile.open(folder / "val-000003.tar") as tar:
        keys = [name.partition(".")[0] for name in tar.getnames()]
    assert len(set(keys)) == PER_SHARD
    assert keys == sorted(keys)  # all members of a sample in a row
    reader = pytest.importorskip("webdataset")
    for sample in reader.WebDataset(str(folder / "val-000003.tar"), shardshuffle=False).decode("rgb8"):
        assert sample["image.png"].shape == (32, 48, 3)
        assert sample["depth.npy"].dtype == np.float32


# --- order -----------------------------------------------------------------------------------------


def test_a_folder_trains_as_its_source_does(source: DatasetSpec, folder: Path) -> None:
    for ours, theirs in zip(batches(open_packed(folder)), batches(source), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(same(ours[k], theirs[k]) for k in theirs)


def test_shards_are_mixed_in_windows(stored: str, tmp_path: Path) -> None:
    spec = open_packed(stored, "window=2")
    seen = [[name for batch in batches(spec, epoch=e) for name in batch["id"]] for e in (0, 0, 1)]
    assert seen[0] == seen[1] != seen[2]
    place = {record.id: i for i, record in enumerate(spec.records("train"))}
    for order in seen:
        assert sorted(order) == sorted(place)
        shards = [place[name] // PER_SHARD for name in order]
        windows = [set(shards[i : i + 2 * PER_SHARD]) for i in range(0, 64, 2 * PER_SHARD)]
        assert all(len(window) == 2 for window in windows)
        assert sorted(shard for window in windows for shard in window) == list(range(8))
        assert shards[: 2 * PER_SHARD] != sorted(shards[: 2 * PER_SHARD])  # samples are mixed, too


@pytest.mark.parametrize("kind", ["folder", "url"])
def test_order_does_not_depend_on_processes_workers_or_restarts(kind: str, folder: Path, stored: str) -> None:
    root = folder if kind == "folder" else stored
    spec = open_packed(root, *(["window=3", "keep=4"] if kind == "url" else []))
    whole = batches(spec)
    assert len(whole) == 8
    for workers in (0, 2):
        halves = [batches(spec, rank=rank, world=2, workers=workers) for rank in (0, 1)]
        for batch, first, second in zip(whole, *halves, strict=True):
            assert batch["id"] == first["id"] + second["id"]
            assert all(torch.equal(batch[k], torch.cat((first[k], second[k]))) for k in ("image", *TASKS))
        later = batches(spec, start=5, workers=workers)
        assert len(later) == 3
        assert all(same(a[k], b[k]) for a, b in zip(later, whole[5:], strict=True) for k in b)


def ids_of_rank(root: str, rank: int, start: int) -> list[list[str]]:
    loader = train_loader(
        samples(open_packed(root, "window=2", "keep=2")),
        batch_size=8, epoch=1, seed=0, start=start, rank=rank, world=2, workers=2,
    )  # fmt: skip
    return [batch["id"] for batch in loader]


def test_processes_share_a_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with two workers each, as real processes that fetch and remove the same shards."""
    monkeypatch.setenv("POLYTASK_CACHE", str(tmp_path / "cache"))
    root = f"file://{folder}"
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        first, second = pool.map(ids_of_rank, [root] * 2, (0, 1), (0, 0))
        rest = pool.submit(ids_of_rank, root, 0, 6).result()
    merged = [name for a, b in zip(first, second, strict=True) for name in (*a, *b)]
    assert sorted(merged) == [record.id for record in open_packed(folder).records("train")]
    assert rest == first[6:]
    assert len(fetched(tmp_path)) == 2
    assert not list((tmp_path / "cache").rglob("*.draft"))


def test_a_resumed_run_ends_as_a_whole_one(
    stored: str, small: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = f"data={{type: packed, root: '{stored}', image_size: [32, 48], batch_size: 8, window: 2}}"
    recipe = small(data, "phases=[{steps: 11}]", "tasks=[depth]", "run.checkpoint_every=2")
    train_quietly(recipe, tmp_path / "whole")
    reads, real = itertools.count(), Packed.read

    def interrupted(self: Packed, record: Any, name: str) -> Tensor:
        if next(reads) == 150:  # in the second epoch
            raise KeyboardInterrupt
        return real(self, record, name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Packed, "read", interrupted)
        train_quietly(recipe, tmp_path / "run")
    train_quietly(recipe, tmp_path / "run", resume=True)
    ends = [checkpoint.read(tmp_path / name, "last").weights for name in ("whole", "run")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


# --- stores ----------------------------------------------------------------------------------------


def test_a_shard_is_fetched_when_needed_and_once(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    real = packed._of_store
    monkeypatch.setattr(
        packed, "_of_store", lambda root, name, use: names.append(name) or real(root, name, use)
    )
    spec = open_packed(stored)
    records = spec.records("train")
    assert (names, fetched(tmp_path)) == (["index.json"], [])
    for record in (*records[8:16], *records[8:16]):
        spec.read(record, "depth")
    assert names[1:] == fetched(tmp_path) == ["train-000001.tar"]
    spec.read(spec.records("val")[0], "image")
    assert fetched(tmp_path) == ["train-000001.tar", "val-000000.tar"]


def test_old_shards_are_removed(stored: str, tmp_path: Path) -> None:
    spec = open_packed(stored, "keep=3")
    for record in spec.records("train")[::PER_SHARD]:
        spec.read(record, "image")
    assert fetched(tmp_path) == [f"train-00000{i}.tar" for i in (5, 6, 7)]
    spec.read(spec.records("train")[0], "image")
    assert fetched(tmp_path) == [f"train-00000{i}.tar" for i in (0, 6, 7)]


def test_altered_in_the_store(stored: str, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    spec = open_packed(stored)
    path = f"/{tmp_path.name}/val-000000.tar"
    memory.pipe(path, memory.cat(path)[:-1] + b"x")
    with pytest.raises(DataError, match=r"val-000000\.tar: shard was altered"):
        spec.read(spec.records("val")[0], "image")
    assert fetched(tmp_path) == []
    memory.rm(path)
    assert len(verify(spec, ["val"]).problems) == 1
    with pytest.raises(DatasetNotFoundError, match=r"index\.json: no such file"):
        open_packed(f"{stored}x").labels()
    with pytest.raises(MissingDependencyError, match="s3"):
        open_packed("s3://bucket/rooms").labels()
    with pytest.raises(DataError, match="nonsense"):
        open_packed("nonsense://bucket/rooms").labels()


# --- bad input -------------------------------------------------------------------------------------


def test_damaged_folders(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(folder, root)
    shard = root / "val-000001.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    (root / "val-000002.tar").unlink()
    problems = verify(open_packed(root), ["val"]).problems
    assert problems[0] == f"{shard}: content was altered; {packed._HINT}"
    assert sum("val-000002.tar: no such shard" in problem for problem in problems) == 1
    assert any("cannot be decoded" in problem for problem in problems)
    index = json.loads((root / "index.json").read_text())
    for content, message in (
        (json.dumps({**index, "format": "other"}), "format"),
        (json.dumps({**index, "tasks": {"semseg": {"type": "segmentatoin"}}}), "did you mean 'segmentation'"),
        ("{", "damaged index"),
    ):
        (root / "index.json").write_text(content)
        with pytest.raises(DataError, match=message):
            open_packed(root).records("val")


def test_nothing_is_overwritten_and_nothing_is_half(
    source: DatasetSpec, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        pack(source, folder)
    with pytest.raises(ConfigError, match="unknown split"):
        pack(source, tmp_path / "out", ("trian",))
    assert list(tmp_path.iterdir()) == []


def test_a_bad_label_is_refused_when_packing(tmp_path: Path) -> None:
    write_pascal_mt(tmp_path / "PASCAL_MT")
    source = dataset("pascal_context", tmp_path / "PASCAL_MT")
    label = source.records("val")[0].files["semseg"]
    good = label.read_bytes()
    for picture, words in (
        (Image.new("L", (48, 36), 21), "unknown class id, expected 0 to 20, or 255 where unlabeled, got 21"),
        (
            Image.new("L", (47, 36), 0),
            "the semseg map has another size .*002.jpg, expected 36x48",
        ),
    ):
        picture.save(label)
        with pytest.raises(DataError, match=rf"VOC12/2008_000002\.png: .*{words}"):
            pack(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["PASCAL_MT"]
    pack(source, tmp_path / "saliency", tasks={"saliency": source.labels()["saliency"]})
    spec = open_packed(tmp_path / "saliency", "image_size=24")
    assert list(spec.labels()) == ["saliency"]
    assert verify(spec).problems == []
    label.write_bytes(good)
    source.records("val")[1].files["image"].unlink()
    with pytest.raises(DatasetNotFoundError, match=r"val\.txt: 1 of 3 listed photos"):
        pack(source, tmp_path / "out")


def test_a_bad_label_of_a_shard_is_named_by_tar_and_sample(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(folder, root)
    index = json.loads((root / "index.json").read_text())
    samples = index["splits"]["val"][1]["samples"]
    (first, places), (second, cut) = samples[:2]
    cut["depth.npy"][1] = 90
    index["tasks"]["edge"] = {"type": "segmentation", "classes": ["none", "line"]}
    places["edge.png"] = places["human_parts.png"]
    (root / "index.json").write_text(json.dumps(index))
    problems = verify(open_packed(root), ["val"]).problems
    tar = root / "val-000001.tar"
    assert any(p.startswith(f"{tar} (depth of {second}): depth.npy cannot be decoded") for p in problems)
    assert any(p.startswith(f"{tar} (edge of {first}): label map with an unknown class id") for p in problems)
    assert len(problems) == 2
