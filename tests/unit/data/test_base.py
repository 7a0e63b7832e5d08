"""Samples, order and loaders of any dataset, on a toy one that lives in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import pytest
import torch
from pydantic import Field, ValidationError
from torch import Tensor
from torchvision.transforms import v2

from polytask.config import Slot, decode, encode
from polytask.data.base import (
    BatchOrder,
    DatasetSpec,
    ImageSize,
    Record,
    Samples,
    derive,
    eval_loader,
    train_loader,
)
from polytask.data.maps import ClassMap
from polytask.data.pipelines import Pipeline, Plain
from polytask.data.verification import verify
from polytask.errors import ConfigError, ConfigErrors, DataError, DatasetNotFoundError
from polytask.tasks.base import Task, TaskSet
from polytask.tasks.classification import Classification
from polytask.tasks.depth import Depth
from polytask.tasks.segmentation import Segmentation
from polytask.types import Sample


class Jitter(Pipeline):
    """A user's own v2 transforms, whose randomness is torch's global generator."""

    type: Literal["jitter"] = "jitter"

    def train(self, sample: Sample, size: tuple[int, int]) -> Sample:
        transforms = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.ColorJitter(0.5, 0.5)])
        return self.finish(transforms(sample))

    def evaluate(self, sample: Sample, size: tuple[int, int]) -> Sample:
        return Plain().evaluate(sample, size)


class Toy(DatasetSpec):
    """``length`` noise images, made when they are read."""

    type: Literal["toy"] = "toy"
    image_size: ImageSize = Field(default=(6, 8))
    pipeline: Annotated[Pipeline, Slot("pipeline")] = Plain()
    length: int = 11
    label_size: tuple[int, int] = (6, 8)
    broken: int = -1

    SPLITS: ClassVar[tuple[str, ...]] = ("train", "val", "gone")
    TASKS: ClassVar[Mapping[str, Task]] = {
        "semseg": Segmentation(classes=("a", "b", "c")),
        "depth": Depth(),
        "kind": Classification(classes=("x", "y")),
    }
    EMPTY_IS_IGNORED: ClassVar[frozenset[str]] = frozenset({"semseg"})

    def records(self, split: str) -> list[Record]:
        if split == "gone":
            raise DatasetNotFoundError("no such folder", where="gone")
        return [Record(f"{split}{i}", index=i) for i in range(self.length)]

    def read(self, record: Record, name: str) -> Tensor:
        if record.index == self.broken:
            raise DataError("file is damaged", where=record.where(name))
        generator = torch.Generator().manual_seed(record.index)
        if name == "image":
            return torch.randint(0, 256, (3, 6, 8), generator=generator).to(torch.uint8)
        if name == "kind":
            return torch.tensor(record.index % 2)
        if name == "semseg":
            return torch.randint(0, 3, self.label_size, generator=generator) * (record.index != 0)
        return torch.rand(self.label_size, generator=generator) + 1


TASKS = TaskSet(Toy.TASKS)


def open_toy(train: bool = True, seed: int = 0, **fields) -> Samples:
    spec = Toy(**{k: v for k, v in fields.items() if k != "pipeline"})
    spec = spec.model_copy(update={k: v for k, v in fields.items() if k == "pipeline"})  # not registered
    return spec.open("train", TASKS, train=train, seed=seed)


def same(a: Sample, b: Sample) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] == b[k] for k in a
    )


# --- samples ---------------------------------------------------------------------------------------


def test_sample_is_plain_tensors() -> None:
    sample = open_toy()[3]
    assert list(sample) == ["image", "semseg", "depth", "kind", "id"]
    assert all(type(v) is Tensor for k, v in sample.items() if k != "id")
    assert (sample["image"].dtype, sample["image"].shape) == (torch.float32, (3, 6, 8))
    assert (sample["semseg"].dtype, sample["semseg"].shape) == (torch.int64, (1, 6, 8))
    assert (sample["depth"].dtype, sample["depth"].shape) == (torch.float32, (1, 6, 8))
    assert (sample["kind"].dtype, sample["kind"].shape) == (torch.int64, ())
    assert sample["id"] == "train3"


def test_only_the_asked_for_tasks_are_read() -> None:
    samples = Toy().open("val", TASKS.subset(["depth"]), train=False)
    assert list(samples[0]) == ["image", "depth", "id"]


def test_augmentation_depends_on_seed_epoch_and_index_only() -> None:
    samples = open_toy(pipeline=Jitter())
    torch.manual_seed(1)
    first = samples[(2, 5)]
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    again = samples[(2, 5)]
    assert same(first, again)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not same(first, samples[(3, 5)])
    assert not same(first, open_toy(seed=1, pipeline=Jitter())[(2, 5)])
    assert same(samples[4], samples[(0, 4)])


def test_evaluation_is_not_augmented() -> None:
    samples = open_toy(train=False, pipeline=Jitter())
    assert same(samples[(1, 5)], samples[(2, 5)])


def test_derived_seeds_differ() -> None:
    seeds = {derive(a, b, c) for a in range(5) for b in range(5) for c in range(5)}
    assert len(seeds) == 125
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive(1, 23) != derive(12, 3)


def test_empty_label_maps_are_ignored_where_declared() -> None:
    assert open_toy()[0]["semseg"].eq(255).all()
    assert not open_toy()[1]["semseg"].eq(255).any()


def test_map_of_another_size_is_an_error() -> None:
    with pytest.raises(DataError, match=r"train1: the semseg map has another size.*expected 6x8.*got '5x8'"):
        open_toy(label_size=(5, 8))[1]


def test_unknown_split_and_task() -> None:
    with pytest.raises(ConfigError, match="unknown split, got 'trian'; did you mean 'train'"):
        Toy().open("trian", TASKS, train=True)
    tasks = TaskSet({"depht": Depth()})
    with pytest.raises(ConfigError, match="toy has no labels for task 'depht'; did you mean 'depth'"):
        Toy().open("train", tasks, train=True)


def test_image_size_may_be_one_number() -> None:
    assert decode(Toy, {"image_size": 7}).image_size == (7, 7)
    assert decode(Toy, {"image_size": [7, 9]}).image_size == (7, 9)
    for wrong in (0, [3, 4, 5], "big", [4, -1]):
        with pytest.raises(ConfigErrors, match="image_size"):
            decode(Toy, {"image_size": wrong})
    spec = decode(Toy, {"image_size": 7, "pipeline": "astmt"})
    assert decode(Toy, encode(spec)) == spec


def test_specs_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Toy().batch_size = 3


# --- order -----------------------------------------------------------------------------------------


def order(**fields) -> list[list[tuple[int, int]]]:
    return list(BatchOrder(**{"length": 23, "batch_size": 6, "seed": 0, "epoch": 0, **fields}))


def test_an_epoch_is_a_permutation_without_the_short_batch() -> None:
    batches = order()
    assert [len(batch) for batch in batches] == [6, 6, 6]
    assert len({index for batch in batches for _, index in batch}) == 18
    assert {epoch for batch in order(epoch=4) for epoch, _ in batch} == {4}
    assert order() == order()
    assert order() != order(seed=1)
    assert [i for b in order() for _, i in b] != [i for b in order(epoch=1) for _, i in b]


def test_a_lonely_short_batch_is_kept() -> None:
    assert [len(batch) for batch in order(length=4)] == [4]
    parts = [order(length=5, world=2, rank=rank)[0] for rank in (0, 1)]
    assert sorted(i for part in parts for _, i in part) == [0, 1, 2, 3, 4]


def test_starting_late_skips_and_nothing_else() -> None:
    assert order(start=2) == order()[2:]
    assert order(start=3) == order(start=9) == []
    whole = BatchOrder(length=23, batch_size=6, seed=0, epoch=0, start=2)
    assert (len(whole), whole.steps) == (1, 3)


def test_processes_share_each_batch_in_contiguous_slices() -> None:
    halves = [order(world=2, rank=rank) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == order()


def test_batch_must_divide_among_processes() -> None:
    with pytest.raises(ConfigError, match=r"data\.batch_size.*multiple of 4.*got 6"):
        order(world=4)
    with pytest.raises(ConfigError, match="fewer samples than processes"):
        order(length=1, world=2)


# --- loaders ---------------------------------------------------------------------------------------


def load(samples: Samples, **fields) -> list[Sample]:
    return list(train_loader(samples, **{"batch_size": 4, "epoch": 1, "seed": 0, **fields}))


def test_batches_do_not_depend_on_workers_or_start() -> None:
    samples = open_toy(pipeline=Jitter())
    whole = load(samples)
    assert len(whole) == 2
    assert whole[0]["image"].shape == (4, 3, 6, 8)
    assert whole[0]["kind"].shape == (4,)
    assert isinstance(whole[0]["id"], list)
    for other in (load(samples, workers=2), load(samples), load(samples, start=0)):
        assert all(same(a, b) for a, b in zip(whole, other, strict=True))
    assert same(load(samples, start=1, workers=1)[0], whole[1])


def test_two_processes_together_see_the_same_batches() -> None:
    samples = open_toy(pipeline=Jitter())
    halves = [load(samples, rank=rank, world=2) for rank in (0, 1)]
    for whole, first, second in zip(load(samples), *halves, strict=True):
        assert torch.equal(whole["image"], torch.cat((first["image"], second["image"])))
        assert whole["id"] == first["id"] + second["id"]


def test_loading_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    load(open_toy(pipeline=Jitter()))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("world", [1, 2, 3, 13])
def test_evaluation_sees_every_sample_once(world: int) -> None:
    samples = open_toy(train=False)
    seen = [
        name
        for rank in range(world)
        for batch in eval_loader(samples, batch_size=4, rank=rank, world=world)
        for name in batch["id"]
    ]
    assert seen == [f"train{i}" for i in range(11)]


# --- verification ----------------------------------------------------------------------------------


def test_verify_counts_values() -> None:
    report = verify(Toy(), ["train", "val"])
    assert report.problems == []
    assert report.counts == {"train": 11, "val": 11}
    assert sum(report.histograms["semseg"].values()) == 2 * 11 * 48
    assert report.histograms["kind"] == {0: 12, 1: 10}
    depth = report.ranges["depth"]
    assert 1 <= depth["min"] < depth["max"] <= 2
    assert (depth["valid"], depth["invalid"]) == (2 * 11 * 48, 0)


def test_verify_collects_problems() -> None:
    report = verify(Toy(broken=3, label_size=(6, 9)))
    assert report.counts == {"train": 11, "val": 11}
    assert "gone: no such folder" in report.problems
    assert "val3: file is damaged" in report.problems
    assert sum("another size" in problem for problem in report.problems) == 2 * 2 * 10


class Odd(Toy):
    """Repeated ids and values that are not finite."""

    def records(self, split: str) -> list[Record]:
        return [Record("twice", index=1)] * 2

    def read(self, record: Record, name: str) -> Tensor:
        value = super().read(record, name)
        return value / 0 if name == "depth" else value


def test_verify_finds_repeated_ids_and_infinite_values() -> None:
    problems = verify(Odd(), ["train"]).problems
    assert "train: id 'twice' occurs more than once" in problems
    assert problems.count("twice: map with 48 values that are not finite") == 1  # once for both


def test_map_types_of_encoded_labels_reach_the_pipeline() -> None:
    sample = Toy().load(Record("x", index=2), Toy.TASKS)
    assert isinstance(sample["semseg"], ClassMap)
    assert sample["semseg"].empty_is_ignored
