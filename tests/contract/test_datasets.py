"""What every registered dataset must do, each on a small copy of itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polytask.config import decode, encode, registered
from polytask.data import datasets  # noqa: F401 - registers
from polytask.data.base import DatasetSpec, Samples, eval_loader, train_loader
from polytask.data.packed import pack
from polytask.data.verification import verify
from polytask.errors import ConfigError, PolytaskError
from polytask.tasks.base import Task, TaskSet
from tests.data import cityscapes, mtan, nyud
from tests.data.celeba import write_celeba
from tests.data.folder import write_folder
from tests.data.pascal_mt import write_pascal_mt
from tests.data.pets import write_pets


def small_rooms(folder: Path) -> dict[str, Any]:
    return {"preset": "nano", "pretrain_size": 4, "cache": str(folder)}


def small_pascal(folder: Path) -> dict[str, Any]:
    write_pascal_mt(folder / "PASCAL_MT")
    return {"root": str(folder / "PASCAL_MT"), "image_size": [24, 40]}


def small_celeba(folder: Path) -> dict[str, Any]:
    write_celeba(folder / "CelebA")
    return {"root": str(folder / "CelebA"), "image_size": [24, 16]}


def small_pets(folder: Path) -> dict[str, Any]:
    write_pets(folder / "pets")
    return {"root": str(folder / "pets"), "image_size": [24, 40]}


def small_packed(folder: Path) -> dict[str, Any]:
    rooms = decode(registered("data")["rooms"], small_rooms(folder))
    pack(rooms, folder / "packed", ("train", "val"), per_shard=20)  # type: ignore[arg-type]
    return {"root": f"file://{folder}/packed", "image_size": [32, 48], "window": 2}


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "rooms": small_rooms,
    "pascal_context": small_pascal,
    "nyud": nyud.small,
    "nyuv2": mtan.small_nyuv2,
    "cityscapes": cityscapes.small,
    "cityscapes_small": mtan.small_cityscapes,
    "celeba": small_celeba,
    "pets": small_pets,
    "packed": small_packed,
    "folder": lambda folder: write_folder(folder / "own"),
}


@pytest.fixture(scope="module", params=sorted(registered("data")))
def spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DatasetSpec:
    assert request.param in CASES, f"add a small copy of {request.param} to CASES"
    fields = CASES[request.param](tmp_path_factory.mktemp(request.param))
    built = decode(registered("data")[request.param], fields)
    assert isinstance(built, DatasetSpec)
    return built


def scored(spec: DatasetSpec) -> str:
    """The split to evaluate on."""
    return spec.split_names()[1]


def open_split(spec: DatasetSpec, split: str = "train", train: bool = True) -> Samples:
    return spec.open(split, TaskSet(spec.labels()), train=train, seed=3)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] == b[k] for k in a
    )


def test_round_trip(spec: DatasetSpec) -> None:
    assert decode(type(spec), encode(spec)) == spec


def test_record_ids_are_unique_and_splits_disjoint(spec: DatasetSpec) -> None:
    names = [name for name in spec.split_names() if name != "trainval"]  # the union of two
    ids = [record.id for split in names for record in spec.records(split)]
    assert ids
    assert len(ids) == len(set(ids))
    assert spec.records("train") == spec.records("train")


def test_samples_have_the_declared_entries(spec: DatasetSpec) -> None:
    height, width = spec.image_size
    for split in spec.split_names():
        sample = open_split(spec, split, train=split == "train")[0]
        assert set(sample) == {"image", "id", *spec.labels()}
        assert sample["image"].dtype == torch.float32
        assert sample["image"].shape == (3, height, width)
        for name, task in spec.labels().items():
            check_target(sample[name], task, (height, width))


def check_target(target: Tensor, task: Task, size: tuple[int, int]) -> None:
    assert type(target) is Tensor
    if not task.dense:
        several = task.type == "attributes"
        assert target.dtype == torch.int64
        assert target.shape == ((task.channels,) if several else ())
        assert target.min() >= -1
        if task.type != "embedding":  # identities may have any number
            assert target.max() < (2 if several else task.channels)
    elif target.dtype == torch.int64:
        assert target.shape == (1, *size)
        assert set(target.unique().tolist()) <= {*range(max(task.channels, 2)), 255}
    elif task.of_image:
        assert target.shape == (3, *size)
        assert target.min() >= 0 and target.max() <= 1
    elif task.channels == 3:
        assert target.shape == (3, *size)
        length = target.norm(dim=0)
        assert torch.all((length - 1).abs().minimum(length) < 1e-4)
    else:
        assert target.dtype == torch.float32
        assert target.shape == (1, *size)
        assert target.min() >= 0


def test_raw_fields_are_as_large_as_the_image(spec: DatasetSpec) -> None:
    for record in spec.records(scored(spec))[:3]:
        image = spec.read(record, "image")
        assert image.dtype == torch.uint8 or (image.dtype == torch.float32 and 1 < image.max() <= 255)
        assert image.shape[0] == 3
        for name, task in spec.labels().items():
            raw = image.movedim(0, -1) if task.of_image else spec.read(record, name)
            assert raw.shape[:2] == image.shape[1:] if task.dense else raw.ndim < 2


def test_samples_are_deterministic(spec: DatasetSpec) -> None:
    a, b = open_split(spec), open_split(spec)
    assert same(a[(1, 0)], b[(1, 0)])
    images = [a[(epoch, 0)]["image"] for epoch in range(8)]
    assert any(not torch.equal(images[0], image) for image in images[1:])


def test_loader_does_not_depend_on_workers_start_or_processes(spec: DatasetSpec) -> None:
    samples, size = open_split(spec), min(8, len(open_split(spec)))

    def load(**fields: int) -> list[dict[str, Any]]:
        batches = train_loader(samples, **{"batch_size": size, "epoch": 1, "seed": 5, **fields})
        return [batch for batch, _ in zip(batches, range(2), strict=False)]

    whole = load()
    assert all(same(a, b) for a, b in zip(whole, load(workers=2), strict=True))
    if len(whole) > 1:
        assert same(whole[1], load(start=1)[0])
    if size % 2 == 0:
        for one, first, second in zip(whole, load(world=2, rank=0), load(world=2, rank=1), strict=True):
            assert all(
                torch.equal(one[k], torch.cat((first[k], second[k]))) for k in ("image", *spec.labels())
            )


def test_evaluation_covers_the_split_once(spec: DatasetSpec) -> None:
    samples = open_split(spec, scored(spec), train=False)
    ids = [
        name
        for rank in range(2)
        for b in eval_loader(samples, batch_size=4, rank=rank, world=2)
        for name in b["id"]
    ]
    assert ids == [record.id for record in samples.records]


def test_verify_is_content(spec: DatasetSpec) -> None:
    report = verify(spec, [scored(spec)])
    assert report.problems == []
    assert report.counts == {scored(spec): len(spec.records(scored(spec)))}
    assert {*report.histograms, *report.ranges} == {n for n, t in spec.labels().items() if not t.of_image}


def test_unknown_split(spec: DatasetSpec) -> None:
    with pytest.raises(ConfigError, match="unknown split"):
        open_split(spec, "trial")
    with pytest.raises(PolytaskError):
        spec.records("trial")
