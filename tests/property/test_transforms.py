"""What must hold for any image, label, angle and zoom."""

from __future__ import annotations

from typing import Annotated, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as kernels
from torchvision.tv_tensors import Image

from polytask.config import Slot
from polytask.data.base import DatasetSpec, Record, train_loader
from polytask.data.composed import Composed
from polytask.data.crops import Atrc, Mtan, Multimae
from polytask.data.maps import ClassMap, ValueMap, VectorMap, plain, unit
from polytask.data.pipelines import Astmt, Pipeline, Plain
from polytask.data.windows import Span, Window, turn
from polytask.tasks.base import TaskSet
from polytask.tasks.depth import Depth
from polytask.tasks.normals import Normals
from polytask.tasks.segmentation import Segmentation
from polytask.types import Sample

sizes = st.tuples(st.integers(8, 40), st.integers(8, 40))
seeds = st.integers(0, 2**31)
degrees = st.floats(-45, 45)
zooms = st.floats(0.5, 2.0)
quick = settings(deadline=None, max_examples=40, derandomize=True)
OWN = {"name": "RandomHorizontalFlip"}, {"name": "RandomResizedCrop", "options": {"size": [96, 80]}}
PIPELINES = [Plain(), Astmt(), Atrc(), Multimae(), Mtan(), Composed(transforms=OWN)]
pipelines = st.sampled_from(PIPELINES)


def sample(size: tuple[int, int], seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    holes = torch.rand(1, *size, generator=generator) < 0.2
    return {
        "image": Image(torch.randint(0, 256, (3, *size), generator=generator).to(torch.uint8)),
        "semseg": ClassMap(torch.randint(0, 6, size, generator=generator).masked_fill(holes[0], 255)),
        "depth": ValueMap((torch.rand(size, generator=generator) + 1).masked_fill(holes[0], 0)),
        "normals": VectorMap(unit(torch.randn(3, *size, generator=generator)) * ~holes),
    }


def run(pipeline: Pipeline, before: Sample, size: tuple[int, int], seed: int) -> Sample:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return pipeline.train(before, size)


@quick
@given(sizes, seeds)
def test_flipping_twice_is_identity(size: tuple[int, int], seed: int) -> None:
    for value in sample(size, seed).values():
        twice = kernels.horizontal_flip(kernels.horizontal_flip(value))
        assert type(twice) is type(value)
        assert torch.equal(plain(twice), plain(value))


@quick
@given(sizes, seeds)
def test_a_mirrored_window_twice_is_identity(size: tuple[int, int], seed: int) -> None:
    rows, columns = (Span(0, n, n, 0, n) for n in size)
    window, before = Window(rows, columns, mirrored=True), sample(size, seed)
    assert torch.equal(window.image(window.image(plain(before["image"]))), plain(before["image"]))
    for name in ("semseg", "depth", "normals"):
        once = window.map(before[name])
        assert torch.allclose(plain(once), plain(kernels.horizontal_flip(before[name])), atol=1e-6)
        assert torch.allclose(plain(window.map(once)), plain(before[name]), atol=1e-6)


@quick
@given(pipelines, sizes, sizes, seeds)
def test_no_pipeline_makes_up_labels(
    pipeline: Pipeline, size: tuple[int, int], target: tuple[int, int], seed: int
) -> None:
    before = sample(size, seed)
    for after in (run(pipeline, before, target, seed), pipeline.evaluate(before, target)):
        known = {255, *plain(before["semseg"]).unique().tolist()}
        assert set(plain(after["semseg"]).unique().tolist()) <= known
        length = plain(after["normals"]).norm(dim=0)
        assert torch.all((length - 1).abs().minimum(length) < 1e-5)
        assert plain(after["depth"]).min() >= 0
        assert after["image"].isfinite().all()
        assert all(value.shape[-2:] == target for value in after.values())


@quick
@given(st.sampled_from([Atrc(), Multimae(), Astmt()]), sizes, seeds)
def test_what_is_around_the_photo_is_ignored(pipeline: Pipeline, size: tuple[int, int], seed: int) -> None:
    """A photo without holes gets the same ones in all maps: where nothing of it is."""
    before = sample(size, seed)
    before |= {"semseg": ClassMap(torch.ones(size)), "depth": ValueMap(torch.ones(size))}
    before["normals"] = VectorMap(torch.tensor([0.0, 0.0, 1.0])[:, None, None].expand(3, *size))
    for after in (run(pipeline, before, (32, 32), seed), pipeline.evaluate(before, (32, 32))):
        holes = plain(after["semseg"])[0] == 255
        assert torch.equal(holes, plain(after["depth"])[0] == 0)
        assert torch.equal(holes, plain(after["normals"]).norm(dim=0) == 0)


@quick
@given(st.sampled_from([Atrc, Multimae]), sizes, seeds)
def test_colors_leave_labels_alone(kind: type[Atrc], size: tuple[int, int], seed: int) -> None:
    with_colors, without = (
        run(kind(photometric=on), sample(size, seed), (24, 28), seed) for on in (True, False)
    )
    for name in ("semseg", "depth", "normals"):
        assert torch.equal(plain(with_colors[name]), plain(without[name]))


@quick
@given(sizes, sizes, seeds, degrees, zooms)
def test_geometry_makes_up_no_labels(
    size: tuple[int, int], target: tuple[int, int], seed: int, angle: float, zoom: float
) -> None:
    before = sample(size, seed)
    pipeline = Astmt(rotate=abs(angle), scale=(zoom, zoom), normal_rotation="geometric")
    after = run(pipeline, before, target, seed)
    assert set(plain(after["semseg"]).unique().tolist()) <= set(plain(before["semseg"]).unique().tolist()) | {
        255
    }
    expected = {0.0, *(plain(before["depth"]) / zoom).flatten().tolist()}
    assert set(plain(after["depth"]).flatten().tolist()) <= expected
    length = plain(after["normals"]).norm(dim=0)
    assert torch.all((length - 1).abs().minimum(length) < 1e-5)
    assert after["image"].isfinite().all()
    assert all(value.shape[-2:] == target for value in after.values())


@quick
@given(sizes, seeds, degrees, zooms)
def test_invalid_vectors_and_depths_stay_together(
    size: tuple[int, int], seed: int, angle: float, zoom: float
) -> None:
    """Both maps had the same holes; where one is invalid afterwards, so is the other."""
    after = run(Astmt(rotate=abs(angle), scale=(zoom, zoom)), sample(size, seed), (20, 30), seed)
    valid = plain(after["normals"]).norm(dim=0) > 0
    assert not (valid & (plain(after["depth"])[0] == 0)).any()
    assert (valid != (plain(after["depth"])[0] > 0)).float().mean() < 0.02  # opposite neighbors cancel


def painted(place: tuple[int, int], side: int = 10) -> Sample:
    """A square that differs in the image and in every map."""
    y, x = place
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[y : y + side, x : x + side] = True
    return {
        "image": Image((mask * 255).to(torch.uint8).expand(3, 64, 64)),
        "semseg": ClassMap(mask.long()),
        "depth": ValueMap(mask * 2.0),
        "normals": VectorMap(torch.stack((mask * 0.0, mask * 0.0, mask * 1.0))),
    }


LANDMARKS = [
    Plain(mean=(0, 0, 0)),
    Astmt(mean=(0, 0, 0), border="zero", rotate=25.0),
    Astmt(mean=(0, 0, 0), border="zero", rotate=25.0, nearest="corner"),
    Atrc(mean=(0, 0, 0), photometric=False),
    Mtan(),
    Composed(mean=(0, 0, 0), transforms=OWN),
]


@settings(quick, max_examples=60)
@given(st.sampled_from(LANDMARKS), st.tuples(st.integers(4, 50), st.integers(4, 50)), seeds)
def test_a_landmark_stays_aligned(pipeline: Pipeline, place: tuple[int, int], seed: int) -> None:
    """A square painted in image, label, depth and normals is found at one place in all of them."""
    after = run(pipeline, painted(place), (96, 80), seed)
    label = (plain(after["semseg"])[0] == 1).float()
    edges = torch.cat(
        (label[:3].flatten(), label[-3:].flatten(), label[:, :3].flatten(), label[:, -3:].flatten())
    )
    if label.sum() < 20 or edges.any():  # out of the frame, at least in part
        return
    by_corners = isinstance(pipeline, Astmt) and pipeline.nearest == "corner"  # half a pixel of the photo off
    expected, tolerance = center(label), 1.6 if by_corners else 1.0
    for found in (after["image"][0], after["depth"][0], after["normals"][2]):
        assert (center(plain(found)) - expected).abs().max() < tolerance


def center(weights: torch.Tensor) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(weights.shape[0]), torch.arange(weights.shape[1]), indexing="ij")
    return torch.stack(((weights * y).sum(), (weights * x).sum())) / weights.sum()


@quick
@given(zooms)
def test_an_object_keeps_its_real_size(zoom: float) -> None:
    """Width in pixels times depth is what a camera cannot change by zooming."""
    mask = torch.zeros(1, 200, dtype=torch.float32)
    mask[:, 60:140] = 3.0
    after = plain(turn(ValueMap(mask), 0.0, zoom))
    width, depth = int((after > 0).sum()), float(after.max())
    if width < 200:
        assert abs(width * depth - 80 * 3.0) <= 2 * depth


@quick
@given(st.sampled_from([Atrc, Multimae]), st.sampled_from([0.5, 1.0, 1.6, 2.0]), seeds)
def test_an_object_keeps_its_real_size_in_crops(kind: type[Atrc], zoom: float, seed: int) -> None:
    before = painted((20, 20), 16)
    depth = plain(run(kind(scale=(zoom, zoom)), before, (64, 64), seed)["depth"])[0]
    width, meters = int((depth > 0).any(0).sum()), float(depth.max())
    if 0 < width < 16 * zoom - 1:  # cut off
        return
    assert width == 0 or abs(width * meters - 16 * 2.0) <= 2 * meters


@quick
@given(degrees)
def test_turning_back_restores_the_middle(angle: float) -> None:
    label = torch.zeros(41, 41, dtype=torch.int64)
    label[10:31, 10:31] = 3
    there = turn(ClassMap(label), angle, 1.0, border=0)
    back = plain(turn(there, -angle, 1.0, border=0))[0]
    assert back[13:28, 13:28].eq(3).all()
    assert not back[:7].any()


class Toy(DatasetSpec):
    """Random photos with three maps."""

    type: str = "toy"
    image_size: tuple[int, int] = (20, 24)
    pipeline: Annotated[Pipeline, Slot("pipeline")] = Plain()

    SPLITS: ClassVar = ("train",)
    TASKS: ClassVar = {
        "semseg": Segmentation(classes=tuple("abcdef")), "depth": Depth(), "normals": Normals()
    }  # fmt: skip

    def records(self, split: str) -> list[Record]:
        return [Record(str(i), index=i) for i in range(6)]

    def read(self, record: Record, name: str) -> Tensor:
        value = plain(sample((18, 30), record.index)[name])
        return value if name == "image" else value.permute(1, 2, 0) if name == "normals" else value[0]


@pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda pipeline: pipeline.type)
def test_a_sample_depends_on_seed_epoch_and_index_not_on_workers(pipeline: Pipeline) -> None:
    samples = Toy().model_copy(update={"pipeline": pipeline}).open("train", TaskSet(Toy.TASKS), train=True)

    def load(workers: int, epoch: int = 1) -> dict[str, Tensor]:
        (batch,) = train_loader(samples, batch_size=6, epoch=epoch, seed=0, workers=workers)
        order = sorted(range(6), key=lambda i: batch["id"][i])
        return {k: v[order] for k, v in batch.items() if isinstance(v, Tensor)}

    alone, shared, later = load(0), load(2), load(0, epoch=2)
    assert all(torch.equal(alone[name], shared[name]) for name in alone)
    assert not torch.equal(alone["image"], later["image"])
    assert alone["semseg"].dtype == torch.int64
