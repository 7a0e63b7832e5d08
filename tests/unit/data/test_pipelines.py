"""The transform recipes: what each step does to images, labels, depth and normals."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.tv_tensors import Image

from polytask.config import decode, encode
from polytask.data.maps import ClassMap, ValueMap, VectorMap, plain, unit
from polytask.data.pipelines import Astmt, Plain, chance, uniform
from polytask.errors import ConfigErrors
from polytask.types import Sample

SIZE = (24, 32)


def sample(height: int = 24, width: int = 32) -> Sample:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(3, height, width, generator=generator)
    return {
        "image": Image(torch.randint(0, 256, (3, height, width), generator=generator).to(torch.uint8)),
        "semseg": ClassMap(torch.randint(1, 5, (height, width), generator=generator)),
        "depth": ValueMap(torch.full((height, width), 6.0)),
        "normals": VectorMap(unit(vectors)),
        "scene": torch.tensor(3),
        "id": "x",
    }


def still(**fields) -> Astmt:
    """Neither flip nor rotation nor zoom unless asked for."""
    return Astmt(**{"flip": 0.0, "rotate": 0.0, "scale": (1.0, 1.0), **fields})


def test_evaluation_of_a_sample_of_the_right_size_only_normalizes() -> None:
    for pipeline in (Plain(), Astmt()):
        before, after = sample(), pipeline.evaluate(sample(), SIZE)
        assert torch.equal(pipeline.denormalize(after["image"]), plain(before["image"]))
        assert all(torch.equal(plain(before[k]), plain(after[k])) for k in ("semseg", "depth"))
        assert torch.allclose(plain(before["normals"]), plain(after["normals"]), atol=1e-6)
        assert after["scene"] == 3
        assert after["id"] == "x"


def test_normalization_is_that_of_imagenet() -> None:
    image = Image(torch.full((3, 2, 2), 255, dtype=torch.uint8))
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(Plain().normalize(image)[:, 0, 0], expected)
    other = Plain(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    assert other.normalize(image).eq(1.0).all()


def test_the_input_is_not_changed() -> None:
    before, untouched = sample(), sample()
    torch.manual_seed(0)
    for pipeline in (Plain(flip=1.0), Astmt(flip=1.0)):
        pipeline.train(before, (40, 20))
    assert all(torch.equal(plain(before[k]), plain(untouched[k])) for k in ("image", "semseg", "normals"))


def test_stretching_keeps_every_kind() -> None:
    for pipeline in (Plain(), Astmt()):
        out = pipeline.evaluate(sample(), (50, 20))
        assert {out[k].shape[-2:] for k in ("image", "semseg", "depth", "normals")} == {(50, 20)}
        assert out["depth"].eq(6.0).all()
        assert out["image"].dtype == torch.float32
        assert torch.allclose(plain(out["normals"]).norm(dim=0), torch.ones(50, 20), atol=1e-5)


def test_plain_flips_everything_or_nothing() -> None:
    before = sample()
    flipped = Plain(flip=1.0).train(sample(), SIZE)
    assert torch.equal(flipped["semseg"], plain(before["semseg"]).flip(-1))
    assert torch.equal(flipped["normals"][0], -plain(before["normals"])[0].flip(-1))
    assert torch.equal(flipped["image"], Plain().evaluate(before, SIZE)["image"].flip(-1))
    assert torch.equal(Plain(flip=0.0).train(sample(), SIZE)["semseg"], plain(before["semseg"]))


@pytest.mark.parametrize(("border", "label"), [("ignore", 255), ("zero", 0)])
def test_outside_of_the_photo(border: str, label: int) -> None:
    out = still(scale=(0.5, 0.5), border=border).train(sample(), SIZE)
    for corner in ((0, 0), (-1, -1), (0, -1)):
        assert out["semseg"][0][corner] == label
        assert out["depth"][0][corner] == 0
        assert not out["normals"][(slice(None), *corner)].any()
    assert Astmt().denormalize(out["image"])[:, 0, 0].eq(0).all()
    inside = plain(out["semseg"])[0, 7:17, 9:23]
    assert inside.min() >= 1
    assert inside.max() <= 4
    assert (plain(out["semseg"]) == label).float().mean() == pytest.approx(0.75, abs=0.03)


def test_depth_is_divided_by_the_zoom() -> None:
    assert still(scale=(1.25, 1.25)).train(sample(), SIZE)["depth"].eq(4.8).all()


def test_zoom_may_be_one_of_several_choices() -> None:
    pipeline, seen = still(scales=(1.0, 1.2, 1.5)), set()
    for seed in range(20):
        torch.manual_seed(seed)
        seen |= {round(float(v), 3) for v in pipeline.train(sample(), SIZE)["depth"].unique()}
    assert seen == {6.0, 5.0, 4.0}


@pytest.mark.parametrize(("mode", "sign"), [("geometric", 1), ("compat", -1), ("off", 0)])
def test_rotation_of_normals(mode: str, sign: int) -> None:
    """Official arithmetic: phi = atan2(nx, ny), then sin and cos of phi plus the angle."""
    torch.manual_seed(7)
    chance(0.0)  # the flip comes first
    degrees = uniform(-40.0, 40.0)
    x, y, z = 0.6, 0.3, math.sqrt(1 - 0.45)
    here = sample()
    here["normals"] = VectorMap(torch.tensor([x, y, z])[:, None, None].expand(3, *SIZE))
    torch.manual_seed(7)
    turned = still(rotate=40.0, normal_rotation=mode).train(here, SIZE)["normals"][:, 12, 16]
    phi, radius = math.atan2(x, y), math.hypot(x, y)
    angle = phi - sign * math.radians(degrees)
    expected = torch.tensor([radius * math.sin(angle), radius * math.cos(angle), z])
    assert torch.allclose(turned, expected, atol=1e-5)


def test_normals_turn_with_the_picture() -> None:
    """A picture that gets brighter where a vector points to still does after any rotation."""
    nx, ny = 0.6, 0.3
    y, x = torch.meshgrid(-torch.arange(24.0), torch.arange(32.0), indexing="ij")  # y up
    ramp = 3 * (nx * x + ny * y)
    vector = torch.tensor([nx, ny, math.sqrt(1 - nx**2 - ny**2)])
    here = {
        "image": Image((ramp - ramp.min()).expand(3, 24, 32)),
        "normals": VectorMap(vector[:, None, None].expand(3, 24, 32)),
    }
    for seed in range(5):
        torch.manual_seed(seed)
        out = Astmt(rotate=90.0, scale=(1.0, 1.0)).train(here, SIZE)
        down, right = (float(g[8:16, 12:20].mean()) for g in torch.gradient(plain(out["image"])[0]))
        across, up, _ = out["normals"][:, 12, 16]
        assert math.atan2(-down, right) == pytest.approx(math.atan2(up, across), abs=0.02)


def test_image_is_clipped_after_each_cubic_step() -> None:
    here = sample()
    here["image"] = Image((plain(here["image"]) > 127).to(torch.uint8) * 255)
    pipeline = Astmt(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    torch.manual_seed(3)
    for out in (pipeline.train(here, (60, 50)), pipeline.evaluate(here, (60, 50))):
        assert 0 <= out["image"].min() < out["image"].max() <= 1


def test_map_emptied_by_the_geometry_is_ignored() -> None:
    here = sample()
    label = torch.zeros(24, 32, dtype=torch.int64)
    label[0, 0] = 4
    here["parts"], here["other"] = ClassMap(label, empty_is_ignored=True), ClassMap(label)
    out = still(scale=(2.0, 2.0)).train(here, SIZE)
    assert out["parts"].eq(255).all()
    assert out["other"].eq(0).all()
    assert 4 in Astmt().evaluate(here, SIZE)["parts"]


def test_nearest_by_corners_is_what_opencv_does() -> None:
    here = sample()
    rows, columns = torch.arange(48) * 24 // 48, torch.arange(20) * 32 // 20
    expected = plain(here["semseg"])[:, rows][:, :, columns]
    assert torch.equal(Astmt(nearest="corner").evaluate(here, (48, 20))["semseg"], expected)


def test_decoding() -> None:
    pipeline = decode(Astmt, {"scales": [1.0, 1.2], "border": "zero"})
    assert decode(Astmt, encode(pipeline)) == pipeline
    for wrong in ({"scale": [1.2, 0.8]}, {"scale": [0.0, 1.0]}, {"scales": [-1.0]}):
        with pytest.raises(ConfigErrors, match=r"scale.*(lower factor comes first|greater than 0)"):
            decode(Astmt, wrong)
    with pytest.raises(ConfigErrors, match=r"border.*did you mean 'zero'"):
        decode(Astmt, {"border": "zeros"})
    with pytest.raises(ConfigErrors, match="std"):
        decode(Plain, {"std": [1.0, 0.0, 1.0]})
