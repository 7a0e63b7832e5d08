"""The rooms dataset: its cache, and what it says when the cache is not right."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import torch

from polytask.config import decode, encode
from polytask.data import rooms
from polytask.data.rooms import PRESETS, Rooms
from polytask.data.scenes import VERSION, render
from polytask.data.verification import verify
from polytask.errors import ConfigError, ConfigErrors, DataError, PolytaskWarning
from polytask.tasks.base import TaskSet


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that has the val split of ``nano``."""
    cache = tmp_path_factory.mktemp("rendered")
    nano(cache).records("val")
    return cache


@pytest.fixture
def cache(rendered: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(rendered, tmp_path / "cache")
    return tmp_path / "cache"


def nano(cache: Path, **fields) -> Rooms:
    return decode(Rooms, {"preset": "nano", "cache": str(cache), **fields})


# --- settings --------------------------------------------------------------------------------------


def test_image_size_is_that_of_the_preset() -> None:
    for name, preset in PRESETS.items():
        assert decode(Rooms, {"preset": name}).image_size == (preset.height, preset.width)
    assert decode(Rooms, {"preset": "nano", "image_size": 64}).image_size == (64, 64)
    assert decode(Rooms, {}).image_size == (64, 96)
    spec = decode(Rooms, {"preset": "small"})
    assert decode(Rooms, encode(spec)) == spec


def test_presets_and_seeds() -> None:
    assert PRESETS["tiny"] == (64, 96, 1536, 256, 256)
    spec = decode(Rooms, {"preset": "small", "pretrain_size": 7})
    jobs = {split: spec.job(split) for split in spec.SPLITS}
    assert {s: (j.first_seed, j.images) for s, j in jobs.items()} == {
        "train": (0, 3072),
        "val": (1_000_000, 512),
        "test": (2_000_000, 512),
        "pretrain": (5_000_000, 7),
    }
    assert decode(Rooms, {"preset": "small"}).job("pretrain").images == 3072


def test_unknown_preset_and_wrong_cache(tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors, match=r"preset.*did you mean 'nano'"):
        decode(Rooms, {"preset": "nanoo"})
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigErrors, match="cache must be a folder"):
        nano(tmp_path / "file")


def test_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POLYTASK_CACHE", str(tmp_path / "env"))
    assert Rooms().folder("val").is_relative_to(tmp_path / "env")
    assert nano(tmp_path / "own").folder("val").is_relative_to(tmp_path / "own")
    monkeypatch.setenv("POLYTASK_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Rooms().folder("val").is_relative_to(tmp_path / ".cache" / "polytask")


def test_every_setting_that_changes_pixels_has_a_folder_of_its_own(tmp_path: Path) -> None:
    specs = [nano(tmp_path), nano(tmp_path, difficulty="hard"), decode(Rooms, {"cache": str(tmp_path)})]
    sized = nano(tmp_path, pretrain_size=3)
    folders = {spec.folder(split) for spec in specs for split in spec.SPLITS} | {sized.folder("pretrain")}
    assert len(folders) == 13
    assert all(f"v{VERSION}" in str(folder) for folder in folders)
    assert nano(tmp_path, image_size=99, batch_size=3).folder("val") == specs[0].folder("val")


# --- content ---------------------------------------------------------------------------------------


def test_fields_are_what_the_renderer_gives(rendered: Path) -> None:
    spec = nano(rendered)
    records = spec.records("val")
    assert [record.id for record in records[:2]] == ["1000000", "1000001"]
    scene = render(1_000_005, 32, 48)
    read = {name: spec.read(records[5], name) for name in ("image", "attributes", *spec.TASKS)}
    assert torch.equal(read["image"], torch.from_numpy(scene["image"]).permute(2, 0, 1))
    for name in ("semseg", "human_parts", "saliency", "edge", "attributes"):
        assert np.array_equal(read[name], scene[name])
    assert np.allclose(read["depth"], scene["depth"], rtol=1e-3)
    assert np.allclose(read["normals"], scene["normals"], atol=2e-3)
    assert int(read["scene"]) == scene["scene"]
    length = read["normals"].norm(dim=-1)
    assert torch.all((length - 1).abs().minimum(length) < 1e-6)


def test_reading_does_not_alias_the_cache(rendered: Path) -> None:
    spec = nano(rendered)
    record = spec.records("val")[0]
    spec.read(record, "semseg").fill_(99)
    assert not spec.read(record, "semseg").eq(99).any()


def test_verify_finds_nothing_wrong(rendered: Path) -> None:
    report = verify(nano(rendered), ["val"])
    assert report.problems == []
    assert set(report.histograms["human_parts"]) <= {*range(7), 255}
    assert report.ranges["depth"]["min"] > 0
    assert report.ranges["normals"]["invalid"] == report.ranges["depth"]["invalid"] > 0  # the sky


# --- damage ----------------------------------------------------------------------------------------


def test_truncated_file_is_noticed_at_once(cache: Path) -> None:
    spec = nano(cache)
    path = spec.folder("val") / "depth.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"depth\.npy: file of the cache is truncated.*delete .*val-32"):
        spec.records("val")
    path.unlink()
    with pytest.raises(DataError, match=r"depth\.npy: file of the cache is missing"):
        spec.records("val")


def test_altered_file_is_noticed_by_verify(cache: Path) -> None:
    spec = nano(cache)
    path = spec.folder("val") / "edge.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    spec.records("val")
    problems = verify(spec, ["val"]).problems
    assert len(problems) == 1
    assert "edge.npy: content was altered; delete" in problems[0]


@pytest.mark.parametrize("content", [None, "{", "[1"])
def test_damaged_facts(cache: Path, content: str | None) -> None:
    spec = nano(cache)
    path = spec.folder("val") / "meta.json"
    path.unlink()
    if content:
        path.write_text(content)
    with pytest.raises(DataError, match=r"meta\.json: cache is damaged.*delete"):
        spec.records("val")


def test_cache_deleted_while_in_use(cache: Path) -> None:
    spec = nano(cache)
    record = spec.records("val")[0]
    shutil.rmtree(spec.folder("val"))
    with pytest.raises(DataError, match=r"image\.npy: cache cannot be read"):
        spec.read(record, "image")


# --- rendering -------------------------------------------------------------------------------------


def test_facts_say_what_was_rendered(rendered: Path) -> None:
    folder = nano(rendered).folder("val")
    facts = json.loads((folder / "meta.json").read_text())
    assert facts["first_seed"] == 1_000_000
    assert facts["images"] == 32
    assert set(facts["files"]) == {path.name for path in folder.glob("*.npy")}
    assert not list(folder.parent.glob(".*.partial*"))
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, f".{folder.name}.lock"}


def test_concurrent_processes_render_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = rooms._render
    monkeypatch.setattr(rooms, "_render", lambda *args: (calls.append(1), real(*args)))
    spec = nano(tmp_path, pretrain_size=8)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(spec.records, ["pretrain"] * 3))
    assert len(calls) == 1
    assert found[0] == found[1] == found[2]


def test_a_faster_process_wins(tmp_path: Path) -> None:
    """Where locks do not work, two may finish the same folder; the second one gives way."""
    draft, folder = tmp_path / "draft", tmp_path / "folder"
    for path in (draft, folder):
        path.mkdir()
        (path / "file").write_text(path.name)
    rooms._publish(draft, folder)
    assert (folder / "file").read_text() == "folder"
    with pytest.raises(FileNotFoundError):
        rooms._publish(tmp_path / "nothing", tmp_path / "nowhere")


def test_interrupted_rendering_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rooms, "_render_slice", fail)
    spec = nano(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        spec.records("val")
    assert [path.suffix for path in spec.folder("val").parent.iterdir()] == [".lock"]


@pytest.mark.slow
def test_parallel_rendering_equals_serial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "_cores", lambda: 2)
    serial = nano(tmp_path / "serial", pretrain_size=20)
    serial.records("pretrain")
    monkeypatch.setattr(rooms, "_SERIAL_PIXELS", 0)
    parallel = nano(tmp_path / "parallel", pretrain_size=20)
    parallel.records("pretrain")
    assert "POLYTASK_RENDERING" not in os.environ
    facts = [(spec.folder("pretrain") / "meta.json").read_text() for spec in (serial, parallel)]
    assert facts[0] == facts[1]


def test_without_workers_it_renders_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(draft: Path, job: rooms.Job, starts: range, workers: int) -> Iterator[int]:
        yield rooms._render_slice(draft, job, 0)
        raise BrokenProcessPool

    monkeypatch.setattr(rooms, "_in_parallel", broken)
    monkeypatch.setattr(rooms, "_cores", lambda: 2)
    monkeypatch.setattr(rooms, "_SERIAL_PIXELS", 0)
    spec = nano(tmp_path, pretrain_size=20)
    with pytest.warns(PolytaskWarning, match="rendering in this process"):
        records = spec.records("pretrain")
    assert np.array_equal(spec.read(records[19], "semseg"), render(5_000_019, 32, 48)["semseg"])


def test_script_without_a_main_guard_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYTASK_RENDERING", "1")
    with pytest.raises(ConfigError, match="__main__"):
        nano(tmp_path).records("val")


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms.shutil, "disk_usage", lambda _: Full())
    with pytest.raises(DataError, match=r"disk is too full.*POLYTASK_CACHE"):
        nano(tmp_path).records("val")


class Full:
    """A disk without room."""

    free = 1000


def test_samples_of_all_tasks(rendered: Path) -> None:
    spec = nano(rendered, pipeline="astmt")
    sample = spec.open("val", TaskSet(spec.TASKS), train=True, seed=1)[0]
    assert set(sample) == {"image", "id", *spec.TASKS}
    assert sample["image"].shape == (3, 32, 48)
