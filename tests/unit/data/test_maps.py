"""The map types, alone and inside torchvision's v2 transforms."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as kernels
from torchvision.tv_tensors import Image

from polytask.data.maps import ClassMap, DenseMap, ValueMap, VectorMap, plain, spin, stretch, unit
from polytask.data.windows import turn


def radial(height: int = 33, width: int = 33) -> VectorMap:
    """Vectors that point away from the center: turning or mirroring the whole scene changes nothing."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x, y = x - (width - 1) / 2, (height - 1) / 2 - y
    return VectorMap(unit(torch.stack((x, y, torch.full_like(x, 4.0)))))


def maps(height: int = 20, width: int = 30) -> dict[str, DenseMap]:
    classes = torch.arange(height * width).reshape(height, width) % 5 + 1
    return {
        "classes": ClassMap(classes),
        "values": ValueMap(torch.full((height, width), 6.0)),
        "vectors": radial(height, width),
    }


def disc(size: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return (x - (size - 1) / 2) ** 2 + (y - (size - 1) / 2) ** 2 < (size / 2 - 2) ** 2


def worst_angle(a: torch.Tensor, b: torch.Tensor, where: torch.Tensor) -> float:
    cosine = (plain(a) * plain(b)).sum(0)[where].clamp(-1, 1)
    return float(torch.rad2deg(torch.arccos(cosine)).max())


def test_constructors_set_dtype_and_leading_axis() -> None:
    assert ClassMap(torch.zeros(4, 5, dtype=torch.int64)).dtype == torch.uint8
    assert ClassMap(torch.zeros(1, 4, 5)).shape == (1, 4, 5)
    assert ValueMap(torch.zeros(4, 5, dtype=torch.float16)).dtype == torch.float32
    assert VectorMap(torch.zeros(3, 4, 5)).shape == (3, 4, 5)


@pytest.mark.parametrize(("kind", "shape"), [(ClassMap, (2, 4, 5)), (ValueMap, (5,)), (VectorMap, (4, 5, 3))])
def test_constructors_refuse_other_shapes(kind: type[DenseMap], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__} takes"):
        kind(torch.zeros(shape))


def test_flips_negate_one_component() -> None:
    vectors = radial()
    assert torch.allclose(plain(kernels.horizontal_flip(vectors)), plain(vectors), atol=1e-6)
    assert torch.allclose(plain(kernels.vertical_flip(vectors)), plain(vectors), atol=1e-6)
    flat = VectorMap(torch.tensor([0.6, 0.0, 0.8])[:, None, None].expand(3, 2, 2))
    assert kernels.horizontal_flip(flat)[0, 0, 0] == pytest.approx(-0.6)


@pytest.mark.parametrize("degrees", [-30.0, 10.0, 90.0])
def test_turning_is_counter_clockwise_for_pixels_and_vectors(degrees: float) -> None:
    vectors, inner = radial(), disc(33)
    turned = turn(vectors, degrees, 1.0)
    assert worst_angle(spin(plain(turned), degrees), vectors, inner) < 2.5
    rotated = kernels.rotate(vectors, degrees, interpolation=v2.InterpolationMode.NEAREST)
    assert worst_angle(rotated, vectors, inner) < 12.0  # nearest pixel, near the center
    clockwise = kernels.affine(vectors, -degrees, [0, 0], 1.0, [0.0, 0.0])
    assert torch.equal(plain(clockwise)[:, inner], plain(rotated)[:, inner])
    dot = torch.zeros(21, 21, dtype=torch.int64)
    dot[10, 18] = 1
    assert plain(turn(ClassMap(dot), 90.0, 1.0))[0, 2, 10] == 1


def test_zooming_divides_values_once() -> None:
    values = ValueMap(torch.full((9, 9), 6.0))
    fixed = ValueMap(torch.full((9, 9), 6.0), zoom_power=0)
    inverse = ValueMap(torch.full((9, 9), 6.0), zoom_power=1)
    assert plain(turn(values, 0.0, 2.0)).eq(3.0).all()
    assert plain(turn(fixed, 0.0, 2.0)).eq(6.0).all()
    assert plain(turn(inverse, 0.0, 2.0)).eq(12.0).all()
    assert plain(kernels.affine(inverse, 0, [0, 0], 2.0, [0.0, 0.0])).eq(12.0).all()
    assert plain(kernels.resized_crop(inverse, 0, 0, 3, 3, [9, 9])).eq(18.0).all()
    assert plain(kernels.affine(values, 0, [0, 0], 2.0, [0.0, 0.0])).eq(3.0).all()
    assert plain(kernels.resized_crop(values, 0, 0, 3, 3, [9, 9])).eq(2.0).all()
    assert plain(kernels.resize(values, [18, 18])).eq(6.0).all()


def test_outside_is_invalid_whatever_fill_is_asked_for() -> None:
    pad = v2.Pad(3, fill=7)(maps())
    rotated = v2.RandomRotation((45, 45), fill=7)(maps())
    affine = v2.RandomAffine(0, translate=(0.5, 0.5), fill=9)(maps())
    for out in (pad, rotated):
        assert out["classes"][0, 0, 0] == 255
        assert out["values"][0, 0, 0] == 0
        assert not out["vectors"][:, 0, 0].any()
    assert 7 not in affine["classes"]
    outside = kernels.crop(maps()["classes"], -2, -1, 50, 60)
    assert outside.shape == (1, 50, 60)
    assert plain(outside)[0, :2].eq(255).all()
    assert plain(kernels.center_crop(maps()["classes"], [24, 10]))[0, 0].eq(255).all()


def test_v2_transforms_compose() -> None:
    torch.manual_seed(0)
    compose = v2.Compose(
        [
            v2.RandomHorizontalFlip(1.0),
            v2.RandomVerticalFlip(1.0),
            v2.RandomResizedCrop((24, 24), antialias=True),
            v2.RandomPerspective(p=1.0),
            v2.ElasticTransform(),
            v2.ColorJitter(0.5, 0.5, 0.5, 0.2),
            v2.RandomCrop((20, 22), pad_if_needed=True),
            v2.Resize(15),
        ]
    )
    out = compose({"image": Image(torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)), **maps()})
    assert type(out["classes"]) is ClassMap
    assert type(out["values"]) is ValueMap
    assert type(out["vectors"]) is VectorMap
    assert {out[name].shape[-2:] for name in out} == {(15, 16)}
    assert set(plain(out["classes"]).unique().tolist()) <= {1, 2, 3, 4, 5, 255}
    length = plain(out["vectors"]).norm(dim=0)
    assert torch.all((length - 1).abs().minimum(length) < 1e-5)


def test_photometric_transforms_leave_maps_alone() -> None:
    before = maps()
    photometric = v2.Compose([v2.ColorJitter(0.9), v2.GaussianBlur(5), v2.RandomInvert(1.0)])
    after = photometric({"image": Image(torch.zeros(3, 20, 30)), **before})
    assert all(torch.equal(plain(after[name]), plain(before[name])) for name in before)


def test_marks_survive_geometry() -> None:
    marked = ClassMap(torch.zeros(8, 8), empty_is_ignored=True)
    values = ValueMap(torch.ones(8, 8), zoom_power=1)
    for move in (v2.RandomHorizontalFlip(1.0), v2.Resize((5, 5)), v2.Pad(1), v2.RandomRotation((10, 10))):
        assert move(marked).empty_is_ignored
        assert move(values).zoom_power == 1
    assert turn(stretch(marked, (4, 4)), 5, 1.1).empty_is_ignored
    assert not ClassMap(torch.zeros(8, 8)).empty_is_ignored


def test_stretching_is_cubic_for_images_and_never_leaves_their_range() -> None:
    image = Image(
        (torch.rand(3, 12, 16, generator=torch.Generator().manual_seed(0)) > 0.5).to(torch.uint8) * 255
    )
    big = stretch(image, (24, 40))
    expected = torch.nn.functional.interpolate(image[None].float(), (24, 40), mode="bicubic")[0]
    assert expected.min() < 0
    assert torch.equal(plain(big), expected.clamp(0, 255))
    assert torch.equal(plain(stretch(image, (12, 16))), plain(image))
    assert stretch(image, (1, 2), smooth=True).float().std() < 40


def test_nearest_by_centers_or_by_corners() -> None:
    row = ClassMap(torch.arange(4)[None])
    assert plain(stretch(row, (1, 2))).flatten().tolist() == [1, 3]
    assert plain(stretch(row, (1, 2), corner=True)).flatten().tolist() == [0, 2]
    for corner, mode in ((False, "nearest-exact"), (True, "nearest")):
        grid = torch.arange(35 * 27).reshape(35, 27)
        expected = torch.nn.functional.interpolate(grid[None, None].float(), (64, 19), mode=mode)[0]
        assert torch.equal(plain(stretch(ValueMap(grid), (64, 19), corner=corner)), expected)


def test_invalid_vectors_do_not_bleed() -> None:
    """Beside a hole the official arithmetic yields flipped vectors: the cubic weights are negative there."""
    vectors = torch.zeros(3, 8, 16)
    vectors[2, :, 8:] = 1.0
    big = plain(stretch(VectorMap(vectors), (16, 32)))
    assert not big[:, :, :16].any()
    assert torch.allclose(big[2, :, 16:], torch.ones(16, 16))
    turned = plain(turn(VectorMap(vectors), 0.0, 1.5))
    assert torch.all((turned[2] == 0) | (turned[2] - 1 < 1e-6))
    assert turned.min() >= 0


@pytest.mark.parametrize(("degrees", "zoom"), [(0.0, 1.3), (13.0, 0.8), (-20.0, 1.0)])
def test_turning_and_stretching_in_one_step(degrees: float, zoom: float) -> None:
    """Labels by corners are those of two steps exactly; the rest differs by what one step blurs less."""
    classes, size = (
        ClassMap(torch.randint(0, 9, (33, 47), generator=torch.Generator().manual_seed(0))),
        (50, 40),
    )
    two_steps = stretch(turn(classes, degrees, zoom), size, corner=True)
    assert torch.equal(plain(turn(classes, degrees, zoom, size, corner=True)), plain(two_steps))
    smooth, inner = radial(48, 48), torch.zeros(50, 40, dtype=torch.bool)
    inner[10:40, 8:32] = True
    assert (
        worst_angle(turn(smooth, degrees, zoom, size), stretch(turn(smooth, degrees, zoom), size), inner)
        < 2.5
    )


def test_partial_sizes_follow_torchvision() -> None:
    expected = kernels.resize(Image(torch.zeros(3, 20, 30)), [10], max_size=14).shape[-2:]
    assert kernels.resize(maps()["values"], [10], max_size=14).shape[-2:] == expected
