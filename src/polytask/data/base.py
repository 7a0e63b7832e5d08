"""What a dataset is, how samples are drawn and in which order: a pure function of (seed, epoch, index)."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, final

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.tv_tensors import Image

from polytask.config import Slot, Spec
from polytask.data.cache import read_cached
from polytask.data.maps import ClassMap, DenseMap, plain
from polytask.data.order import BatchOrder as BatchOrder
from polytask.data.pipelines import Pipeline
from polytask.errors import ConfigError, DataError, did_you_mean
from polytask.seeding import derive
from polytask.tasks.base import Task, TaskSet
from polytask.types import Sample

Key = int | tuple[int, int]
"""Index of a sample, or (epoch, index)."""


@dataclass(frozen=True)
class Record:
    """One sample before anything is read.

    Attributes:
        id: unique within the split.
        files: where its fields are, by name.
        index: position inside the files, for datasets that pack many samples in one.
        values: image-level labels as a list of many images has them, by name.
    """

    id: str
    files: Mapping[str, Path] = field(default_factory=dict)
    index: int = -1
    values: Mapping[str, Any] = field(default_factory=dict)

    def where(self, field_name: str) -> str:
        """What to name in a message about a field: its file if known, else the id; of a shared file, both."""
        file = self.files.get(field_name)
        if file is None:
            return self.id
        shared = self.index >= 0 or field_name in self.values
        return f"{file} ({field_name} of {self.id})" if shared else str(file)


def _square(size: object) -> object:
    return (size, size) if isinstance(size, int) else size


ImageSize = Annotated[
    tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]],
    BeforeValidator(_square, json_schema_input_type=int | tuple[int, int]),
]
"""Height and width; one number is short for a square."""


class DatasetSpec(Spec):
    """Base of the datasets: constants, where the records are, and how one field is read."""

    type: str
    image_size: ImageSize = Field(description="height and width the model sees; one number for a square")
    pipeline: Annotated[Pipeline, Slot("pipeline")]
    batch_size: int = Field(default=16, ge=1, description="training samples per step, over all processes")
    eval_batch_size: int = Field(default=16, ge=1, description="samples per evaluation pass, in all")
    workers: int = Field(default=0, ge=0, description="loader processes per training process")
    label_cache: Literal["auto", "never"] | Path = Field(
        default="auto", description="folder to keep decoded label maps in; auto: what `data prepare` made"
    )

    TASKS: ClassVar[Mapping[str, Task]]
    """What the dataset has labels for, with its class counts and usual weights."""
    SPLITS: ClassVar[tuple[str, ...]]
    """Names of the splits, the one to train on first."""
    EMPTY_IS_IGNORED: ClassVar[frozenset[str]] = frozenset()
    """Label maps that say nothing when they hold no class but 0, and are then ignored as a whole."""
    SLOW: ClassVar[frozenset[str]] = frozenset()
    """Label maps that take long to read: `data prepare` decodes them once. Records name all their files."""
    FIRST_IDS: ClassVar[Mapping[str, int]] = {}
    """What class 0 of a task is stored as, where that is not 0; errors tell ids as they are stored."""

    def labels(self) -> Mapping[str, Task]:
        """What there are labels for under these settings; ``TASKS`` unless a dataset overrides it."""
        return self.TASKS

    def split_names(self) -> tuple[str, ...]:
        """The splits under these settings; ``SPLITS`` unless a dataset overrides it."""
        return self.SPLITS

    @abstractmethod
    def records(self, split: str) -> list[Record]:
        """The samples of a split, in a fixed order.

        Raises:
            DatasetNotFoundError: folder or part of it missing; says where it looked and what to do.
        """

    @abstractmethod
    def read(self, record: Record, name: str) -> Tensor:
        """One field: ``image`` ``[3, H, W]``, uint8 or float32 in 0..255, or the raw label of a task.

        Label maps are integers ``[H, W]`` with 255 = ignore, depth is float ``[H, W]`` in meters,
        normals are float ``[H, W, 3]``, image-level classes are integer scalars.

        Raises:
            DataError: file missing, damaged or of unexpected content; names the file.
        """

    def shuffle(self, records: Sequence[Record], generator: torch.Generator) -> list[int]:
        """The order of one epoch of training, as indices of the records: any is as likely as any other.

        A dataset may keep together what lies together; what it returns may depend on nothing else.
        """
        return torch.randperm(len(records), generator=generator).tolist()

    def check_records(self, split: str, records: Sequence[Record], tasks: Collection[str]) -> None:
        """Refuse at once what else would only show while training, such as photos that are not there.

        ``open`` calls it. ``verify`` does not: it reads all fields, and names each that cannot be read.

        Raises:
            DatasetNotFoundError: something that the records need is missing.
            DataError: the samples do not serve one of the tasks.
        """

    def audit(self, split: str, tasks: Collection[str]) -> list[str]:  # noqa: ARG002 - for overriding
        """Problems of a split beyond single fields, one sentence each; for ``verify``."""
        return []

    @final
    def open(self, split: str, tasks: TaskSet, *, train: bool, seed: int = 0) -> Samples:
        """The samples of a split with the labels of the given tasks; ``train`` augments them by ``seed``.

        Raises:
            ConfigError: unknown split or task; see ``records`` too.
        """
        self.check_split(split)
        for name in tasks:
            if name not in self.labels():
                hint = did_you_mean(name, self.labels())
                raise ConfigError(f"{self.type} has no labels for task {name!r}", where="tasks", hint=hint)
        records = self.records(split)
        self.check_records(split, records, tasks)
        return Samples(self, records, tasks, train=train, seed=seed)

    @final
    def check_split(self, split: str) -> None:
        """Raise ConfigError if there is no such split."""
        if split not in self.split_names():
            hint = did_you_mean(split, self.split_names())
            raise ConfigError("unknown split", where=f"data.{self.type}", got=split, hint=hint)

    @final
    def load(self, record: Record, tasks: Mapping[str, Task]) -> dict[str, Any]:
        """One sample as tv_tensors at its own size, before any transform; raises as ``label`` does."""
        image = Image(self.read(record, "image"))
        labels = {name: self.label(record, name, task, image) for name, task in tasks.items()}
        return {"image": image, **labels}

    @final
    def label(self, record: Record, name: str, task: Task, image: Tensor | None) -> Tensor:
        """The target of one task: a map as large as the image, if that can be read, or a scalar.

        Raises:
            DataError: unreadable file, unknown class, or a map of another size than the image.
        """
        read = read_cached if task.dense else type(self).read
        raw = image if image is not None and task.of_image else read(self, record, name)
        return self.encode(record, name, task, raw, image)

    @final
    def encode(self, record: Record, name: str, task: Task, raw: Tensor, image: Tensor | None) -> Tensor:
        """``label`` of what was read."""
        where = record.where(name)
        try:
            value = task.encode(raw)
        except DataError as error:  # which does not know the file
            first, got, expected = self.FIRST_IDS.get(name, 0), error.got, error.expected
            if first and isinstance(got, int):
                got, expected = first + got, f"{first} to {first + task.channels - 1}"
            raise DataError(error.what, where=where, got=got, expected=expected) from None
        size, expected = value.shape[-2:], value.shape[-2:] if image is None else image.shape[-2:]
        if isinstance(value, DenseMap) and size != expected:
            what = f"the {name} map has another size than the image {record.where('image')}"
            got, wanted = (f"{h}x{w}" for h, w in (size, expected))
            raise DataError(what, where=where, got=got, expected=f"{wanted} (height x width)")
        if isinstance(value, ClassMap) and name in self.EMPTY_IS_IGNORED:
            value = ClassMap(value, empty_is_ignored=True)
        return value


class Samples(Dataset[Sample]):
    """A split as a torch dataset of plain tensors.

    ``samples[index]`` is ``{"image": float32 [3, H, W], "<task>": target, "id": str}``. A key
    ``(epoch, index)`` chooses the augmentation too: it depends on (seed, epoch, index) and nothing else.
    Datasets of video add ``clip``, float32 ``[T, 3, H, W]``: the frames around, augmented as the image is.
    """

    def __init__(
        self, spec: DatasetSpec, records: list[Record], tasks: TaskSet, *, train: bool, seed: int = 0
    ) -> None:
        self.spec, self.records, self.tasks, self.train, self.seed = spec, records, tasks, train, seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: Key) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        record = self.records[index]
        loaded: Sample = {**self.spec.load(record, self.tasks), "id": record.id}
        sample = self._transformed(loaded, epoch, index)
        if "clip" in record.files:  # every frame with the labels, so that the same is drawn for it
            frames = [{**loaded, "image": Image(frame)} for frame in self.spec.read(record, "clip")]
            sample["clip"] = torch.stack([self._transformed(f, epoch, index)["image"] for f in frames])
        widened = {k: v.long() if isinstance(v, ClassMap) else v for k, v in sample.items()}
        return {k: plain(v) if isinstance(v, Tensor) else v for k, v in widened.items()}

    def shuffle(self, generator: torch.Generator) -> list[int]:
        """The order of one epoch."""
        return self.spec.shuffle(self.records, generator)

    def _transformed(self, sample: Sample, epoch: int, index: int) -> Sample:
        if not self.train:
            return self.spec.pipeline.evaluate(sample, self.spec.image_size)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive(self.seed, epoch, index))
            return self.spec.pipeline.train(sample, self.spec.image_size)


# --- loaders ---------------------------------------------------------------------------------------


def train_loader(
    samples: Samples,
    *,
    batch_size: int,
    epoch: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> DataLoader[Sample]:
    """Batches of one epoch for one process (see ``BatchOrder``), the same for any number of workers.

    Raises:
        ConfigError: ``batch_size`` (over all processes) is no multiple of ``world``.
    """
    place = {"start": start, "rank": rank, "world": world}
    size, shuffle = {"length": len(samples), "batch_size": batch_size}, samples.shuffle
    order = BatchOrder(**size, seed=seed, epoch=epoch, **place, shuffle=shuffle)
    return _loader(samples, order, workers)


def eval_loader(
    samples: Samples, *, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
) -> DataLoader[Sample]:
    """Every sample once: each process takes its contiguous share, without padding or duplicates.

    All processes get the same number of batches, as sharded models need, if there are enough samples.
    """
    count = len(samples)
    low, high = (count * r // world for r in (rank, rank + 1))
    size = max(batch_size // world, 1)
    most = -(-count // world)
    steps = max(min(-(-most // size), count // world), 1)
    edges = [low + (high - low) * i // steps for i in range(steps + 1)]
    batches = [list(range(a, b)) for a, b in itertools.pairwise(edges) if a < b]
    return _loader(samples, batches, workers)


def _loader(samples: Samples, batches: Any, workers: int) -> DataLoader[Sample]:
    """The loader gets a generator of its own: it must not draw from the global one."""
    return DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(0),
    )
