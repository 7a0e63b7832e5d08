"""What must hold for any image, label, angle and zoom."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as kernels
from torchvision.tv_tensors import Image

from polytask.data.maps import ClassMap, ValueMap, VectorMap, plain, turn, unit
from polytask.data.pipelines import Astmt
from polytask.types import Sample

sizes = st.tuples(st.integers(8, 40), st.integers(8, 40))
seeds = st.integers(0, 2**31)
degrees = st.floats(-45, 45)
zooms = st.floats(0.5, 2.0)
quick = settings(deadline=None, max_examples=40, derandomize=True)


def sample(size: tuple[int, int], seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    holes = torch.rand(1, *size, generator=generator) < 0.2
    return {
        "image": Image(torch.randint(0, 256, (3, *size), generator=generator).to(torch.uint8)),
        "semseg": ClassMap(torch.randint(0, 6, size, generator=generator).masked_fill(holes[0], 255)),
        "depth": ValueMap((torch.rand(size, generator=generator) + 1).masked_fill(holes[0], 0)),
        "normals": VectorMap(unit(torch.randn(3, *size, generator=generator)) * ~holes),
    }


def run(pipeline: Astmt, before: Sample, size: tuple[int, int], seed: int) -> Sample:
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


@quick
@given(
    st.tuples(st.integers(4, 50), st.integers(4, 50)),
    st.floats(0, 25),
    st.floats(0.8, 1.3),
    seeds,
)
def test_a_landmark_stays_aligned(place: tuple[int, int], angle: float, zoom: float, seed: int) -> None:
    """A square painted in image, label, depth and normals is found at one place in all of them."""
    y, x = place
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[y : y + 10, x : x + 10] = True
    before: Sample = {
        "image": Image((mask * 255).to(torch.uint8).expand(3, 64, 64)),
        "semseg": ClassMap(mask.long()),
        "depth": ValueMap(mask * 2.0),
        "normals": VectorMap(torch.stack((mask * 0.0, mask * 0.0, mask * 1.0))),
    }
    pipeline = Astmt(rotate=angle, scale=(zoom, zoom), mean=(0, 0, 0), border="zero")
    after = run(pipeline, before, (96, 80), seed)
    label = plain(after["semseg"])[0].float()
    if label.sum() < 100:  # turned out of the frame
        return
    expected = center(label)
    for found in (after["image"][0], after["depth"][0], after["normals"][2]):
        assert (center(plain(found)) - expected).abs().max() < 1.0  # pixels of 0.67 by 0.8


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
@given(degrees)
def test_turning_back_restores_the_middle(angle: float) -> None:
    label = torch.zeros(41, 41, dtype=torch.int64)
    label[10:31, 10:31] = 3
    there = turn(ClassMap(label), angle, 1.0, border=0)
    back = plain(turn(there, -angle, 1.0, border=0))[0]
    assert back[13:28, 13:28].eq(3).all()
    assert not back[:7].any()
