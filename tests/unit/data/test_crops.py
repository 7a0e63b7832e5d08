"""Pipelines that show a part of the photo in a frame, MTAN's, transforms of one's own, and their parts."""

from __future__ import annotations

import colorsys

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.tv_tensors import Image

from polytask.config import decode, encode
from polytask.data.colors import distort, shift
from polytask.data.composed import Composed
from polytask.data.crops import Atrc, Mtan, Multimae
from polytask.data.maps import ClassMap, ValueMap, VectorMap, plain, unit
from polytask.data.pipelines import Astmt, Pipeline, Plain
from polytask.data.windows import Span, Window
from polytask.errors import ConfigError, ConfigErrors
from polytask.tasks import Depth
from polytask.types import Sample

MAPS = ("semseg", "depth", "normals")
BARE = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def sample(height: int = 24, width: int = 32, seed: int = 0) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": Image(torch.randint(0, 256, (3, height, width), generator=generator).to(torch.uint8)),
        "semseg": ClassMap(torch.randint(1, 5, (height, width), generator=generator)),
        "depth": ValueMap(torch.full((height, width), 6.0)),
        "normals": VectorMap(unit(torch.randn(3, height, width, generator=generator))),
        "scene": torch.tensor(3),
        "id": "x",
    }


def whole(size: tuple[int, int], **fields) -> Window:
    """All of a photo at its own size."""
    return Window(*(Span(0, n, n, 0, n) for n in size), **fields)


# --- windows ---------------------------------------------------------------------------------------


def test_a_window_on_everything_changes_nothing() -> None:
    before = sample()
    for name in MAPS:
        after = whole((24, 32)).map(before[name])
        assert type(after) is type(before[name])
        assert torch.allclose(plain(after).float(), plain(before[name]).float(), atol=1e-6)


def test_a_window_crops_first_and_lays_into_the_frame() -> None:
    before = sample()
    window = Window(Span(2, 12, 20, 3, 30), Span(8, 20, 24, 0, 24), zoom=2.0, mirrored=True)
    box = plain(before["semseg"])[:, 2:12, 8:20]
    expected = box.repeat_interleave(2, 1).repeat_interleave(2, 2).flip(-1)
    after = plain(window.map(before["semseg"]))
    assert torch.equal(after[:, 3:23], expected)
    assert after[:, :3].eq(255).all()
    assert after[:, 23:].eq(255).all()
    assert plain(window.map(before["depth"]))[:, 3:23].eq(3.0).all()
    vectors = plain(before["normals"])[:, 2:12, 8:20].repeat_interleave(2, 1).repeat_interleave(2, 2).flip(-1)
    assert torch.allclose(
        plain(window.map(before["normals"]))[:, 3:23], vectors * torch.tensor([-1, 1, 1])[:, None, None]
    )
    seen = plain(before["image"])[None, :, 2:12, 8:20].float()
    resized = functional.interpolate(seen, (20, 24), mode="bilinear")[0].flip(-1)
    assert (window.image(plain(before["image"])) - resized).abs().max() < 1.01
    assert torch.equal(window.image(plain(before["image"]).float()), resized)


def test_aligned_corners() -> None:
    """What `interpolate` of torch gives: bilinear with aligned corners, and nearest by corners."""
    before = sample()
    window = Window(Span(4, 20, 24, 0, 24), Span(8, 29, 32, 0, 32), zoom=1.5, aligned=True)
    seen = {name: plain(before[name])[None, :, 4:20, 8:29].float() for name in ("image", *MAPS)}
    nearest = functional.interpolate(seen["semseg"], (24, 32), mode="nearest")[0]
    assert torch.equal(plain(window.map(before["semseg"])), nearest.to(torch.uint8))
    bilinear = {
        name: functional.interpolate(seen[name], (24, 32), mode="bilinear", align_corners=True)[0]
        for name in ("image", "normals")
    }
    assert torch.equal(window.image(plain(before["image"]).float()), bilinear["image"])
    assert torch.allclose(plain(window.map(before["normals"])), unit(bilinear["normals"]), atol=1e-5)


# --- ATRC ------------------------------------------------------------------------------------------


def test_atrc_evaluates_at_native_size_with_ignored_padding() -> None:
    before, pipeline = sample(21, 30), Atrc()
    after = pipeline.evaluate(before, (32, 32))
    inside = (slice(None), slice(5, 26), slice(1, 31))  # the odd row is below
    assert torch.equal(pipeline.denormalize(after["image"])[inside], plain(before["image"]))
    assert torch.equal(plain(after["semseg"])[inside], plain(before["semseg"]))
    outside = torch.ones(32, 32, dtype=torch.bool)
    outside[inside[1:]] = False
    assert after["image"][:, outside].abs().max() < 1e-6
    assert plain(after["semseg"])[:, outside].eq(255).all()
    assert not plain(after["depth"])[:, outside].any()
    assert not plain(after["normals"])[:, outside].any()
    assert (after["scene"], after["id"]) == (3, "x")


def test_a_photo_larger_than_the_frame_is_shrunk_to_fit() -> None:
    after = Atrc().evaluate(sample(48, 64), (32, 32))
    assert after["depth"].eq(6.0).sum() == 24 * 32  # not zoomed: meters stay
    assert after["semseg"][0, 4:28].ne(255).all()
    assert after["semseg"][0, :4].eq(255).all()


@pytest.mark.parametrize(("pipeline", "box"), [(Atrc(), (5, 1, 21, 30)), (Multimae(), (0, 0, 22, 32))])
def test_predictions_are_cut_back_to_the_photo(pipeline: Atrc, box: tuple[int, int, int, int]) -> None:
    y, x, h, w = box
    frame = torch.zeros(1, 1, 32, 32)
    frame[..., y : y + h, x : x + w] = 7.0
    assert torch.allclose(pipeline.restore(frame, (21, 30)), torch.full((1, 1, 21, 30), 7.0))
    assert Plain().restore(frame, (21, 30)).shape == (1, 1, 21, 30)


def test_atrc_divides_depth_by_the_zoom_and_pads_what_is_small() -> None:
    for zoom in (0.5, 1.0, 2.0):
        after = Atrc(scale=(zoom, zoom), flip=0.0).train(sample(), (32, 32))
        assert set(after["depth"].unique().tolist()) <= {0.0, 6.0 / zoom}
        seen = min(int(24 * zoom), 32) * min(int(32 * zoom), 32)
        assert after["depth"].ne(0).sum() == after["semseg"].ne(255).sum() == seen
        assert after["image"].shape == (3, 32, 32)


def test_crops_are_drawn_until_varied() -> None:
    """Two classes side by side: a crop over the border is found, and without semseg none is looked for."""
    before = sample(64, 400)
    before["semseg"] = ClassMap((torch.arange(400) >= 200).long().expand(64, 400))
    pipeline, found, some = Atrc(scale=(1.0, 1.0)), [], []
    for seed in range(60):
        torch.manual_seed(seed)
        share = pipeline.train(before, (64, 64))["semseg"].float().mean()
        found.append(0.25 < share < 0.75)
        torch.manual_seed(seed)
        start = pipeline.choose({k: v for k, v in before.items() if k != "semseg"}, (64, 64)).columns.start
        some.append(152 < start < 184)
    assert sum(found) > 3 * max(sum(some), 1)
    ignored = {**before, "semseg": ClassMap(torch.full((64, 400), 255))}
    assert pipeline.train(ignored, (64, 64))["semseg"].eq(255).all()


# --- colors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saturation", "turn"), [(1.0, 0.0), (1.4, 0.0), (0.5, 0.6), (1.5, -0.6), (1.0, 1.0)]
)
def test_shift_is_that_of_hsv(saturation: float, turn: float) -> None:
    colors = torch.cartesian_prod(*[torch.tensor([0.0, 30.0, 128.0, 200.0, 255.0])] * 3).T[..., None]
    shifted = shift(colors, saturation, turn)[..., 0].T / 255
    for color, got in zip((colors[..., 0].T / 255).tolist(), shifted.tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*color)
        expected = colorsys.hsv_to_rgb((h + turn / 6) % 1.0, min(s * saturation, 1.0), v)
        assert got == pytest.approx(expected, abs=2e-6)


def test_distortion_stays_in_range_and_leaves_its_input_alone() -> None:
    image, untouched = plain(sample()["image"]), plain(sample()["image"])
    seen = []
    for seed in range(40):
        torch.manual_seed(seed)
        after = distort(image)
        assert 0 <= after.min() <= after.max() <= 255
        seen.append(torch.equal(after, image.float()))
    assert torch.equal(image, untouched)
    assert 0 < sum(seen) < 10  # all four steps left out once in sixteen times


# --- MultiMAE and MTAN -----------------------------------------------------------------------------


def test_multimae_pads_with_gray_at_the_bottom_and_right() -> None:
    pipeline = Multimae(flip=0.0, photometric=False, **BARE)
    after = pipeline.evaluate(sample(16, 32), (24, 24))
    assert after["semseg"][0, :12].ne(255).all()
    assert after["semseg"][0, 12:].eq(255).all()
    assert torch.allclose(after["image"][:, 12:], torch.tensor(128 / 255))
    assert after["depth"][0, :12].eq(6.0).all()
    enlarged = pipeline.evaluate(sample(10, 12), (24, 24))["semseg"][0]
    assert enlarged[:20].ne(255).all()
    small = Multimae(scale=(0.25, 0.25)).train(sample(16, 32), (24, 24))
    assert small["semseg"][0, :6, :12].ne(255).all()
    assert small["semseg"].ne(255).sum() == 6 * 12
    full = Multimae(scale=(1.0, 1.0)).train(sample(16, 32), (24, 24))
    assert full["semseg"].ne(255).all()  # the smaller side fills the frame


def test_zoom_follows_the_kind_of_depth() -> None:
    """Meters times inverse meters is one before and after, unless the released code is followed."""
    meters = torch.rand(24, 32, generator=torch.Generator().manual_seed(0)) + 0.5
    before = sample() | {"depth": Depth().encode(meters), "inverse": Depth(inverse=True).encode(1 / meters)}
    for pipeline in (Mtan(scales=(1.5,)), Atrc(scale=(2.0, 2.0)), Multimae(scale=(1.5, 1.5)), Astmt()):
        torch.manual_seed(1)
        after = pipeline.train(before, (24, 32))
        product = after["depth"] * after["inverse"]
        assert torch.allclose(product, (product > 0).float(), atol=1e-5) and product.any()
    after = Mtan(scales=(1.5,), inverse_depth="divide").train(before, (24, 32))
    assert torch.allclose(after["depth"] * after["inverse"], torch.tensor(1.5**-2))


def test_mtan_zooms_in_and_neither_normalizes_nor_resizes() -> None:
    before, zooms = sample(), set()
    assert torch.allclose(Mtan().evaluate(before, (24, 32))["image"], plain(before["image"]) / 255)
    for seed in range(20):
        torch.manual_seed(seed)
        after = Mtan().train(before, (24, 32))
        zooms |= {round(float(v), 3) for v in after["depth"].unique()}
        assert {after[name].shape[-2:] for name in ("image", *MAPS)} == {(24, 32)}
    assert zooms == {6.0, 5.0, 4.0}
    kept = Mtan(scales=(), flip=0.0).train(before, (24, 32))
    assert torch.equal(kept["semseg"], plain(before["semseg"]))
    with pytest.raises(ConfigErrors, match="scales"):
        decode(Mtan, {"scales": [0.5]})


# --- transforms of one's own -----------------------------------------------------------------------


def test_own_transforms_compose() -> None:
    steps = [
        {"name": "RandomHorizontalFlip", "options": {"p": 1.0}},
        {
            "name": "RandomApply",
            "options": {"transforms": [{"name": "RandomInvert", "options": {"p": 1}}], "p": 1},
        },
        {
            "name": "torchvision.transforms.v2.RandomCrop",
            "options": {"size": [20, 20], "pad_if_needed": True},
        },
    ]
    pipeline = decode(Composed, {"transforms": steps, **BARE})
    assert decode(Composed, encode(pipeline)) == pipeline
    before = {
        **sample(20, 20),
        "normals": VectorMap(torch.tensor([0.6, 0.0, 0.8])[:, None, None].expand(3, 20, 20)),
    }
    after = pipeline.train(before, (20, 20))
    assert torch.equal(after["semseg"], plain(before["semseg"]).flip(-1))
    assert torch.allclose(after["image"], 1 - plain(before["image"]).flip(-1) / 255)
    assert after["normals"][0].max() < 0
    assert pipeline.train(before, (10, 12))["semseg"].shape == (1, 10, 12)
    assert torch.equal(pipeline.evaluate(before, (20, 20))["semseg"], plain(before["semseg"]))


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        ({"name": "RandomCropp"}, r"transforms\.0: RandomCropp: .*no attribute"),
        ({"name": "no.such.Thing"}, "no.such.Thing: No module"),
        ({"name": "RandomCrop", "options": {"sise": 3}}, "RandomCrop: .*sise"),
        ({"name": "RandomCrop", "option": 3}, "unknown key"),
    ],
)
def test_own_transforms_are_checked_at_once(step: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigErrors, match=sentence):
        decode(Composed, {"transforms": [step]})


def test_own_transforms_that_fail_are_named() -> None:
    pipeline = decode(Composed, {"transforms": [{"name": "RandomCrop", "options": {"size": 99}}]})
    with pytest.raises(ConfigError, match=r"data\.pipeline\.transforms: transform RandomCrop fails \(.*99"):
        pipeline.train(sample(), (20, 20))


def test_inputs_are_not_changed() -> None:
    for pipeline in (Atrc(), Multimae(), Mtan()):
        before, untouched = sample(), sample()
        for seed in range(5):
            torch.manual_seed(seed)
            pipeline.train(before, (40, 20))
            pipeline.evaluate(before, (40, 20))
        for name in ("image", *MAPS):
            assert torch.equal(plain(before[name]), plain(untouched[name])), (pipeline.type, name)


def test_round_trips() -> None:
    for pipeline in (Atrc(max_share=1.0), Multimae(), Mtan(scales=())):
        assert decode(type(pipeline), encode(pipeline)) == pipeline
    with pytest.raises(ConfigErrors, match="scale: the lower factor comes first"):
        decode(Atrc, {"scale": [2.0, 0.5]})


def test_vectors_stay_of_unit_length() -> None:
    def length(value: Tensor) -> Tensor:
        return plain(value).norm(dim=0)

    before = sample()
    before["normals"] = VectorMap(plain(before["normals"]) * 0.9)  # as stored in bytes, say
    for pipeline in (Atrc(), Multimae(), Mtan()):
        found = length(pipeline.train(before, (40, 48))["normals"])
        assert torch.all((found - 1).abs().minimum(found) < 1e-5)


@pytest.mark.parametrize(
    "pipeline",
    [
        Atrc(), Multimae(), Mtan(),
        Composed(transforms=[{"name": "ColorJitter", "options": {"brightness": 0.2}}]),  # type: ignore[list-item]
    ],
    ids=lambda pipeline: pipeline.type,
)  # fmt: skip
def test_float_images_look_like_those_of_bytes(pipeline: Pipeline) -> None:
    pixels = torch.randint(90, 160, (3, 24, 32), dtype=torch.uint8)
    for seed in range(6):
        shown = []
        for image in (Image(pixels), Image(pixels.float())):
            torch.manual_seed(seed)
            shown.append(pipeline.train({"image": image}, (24, 32))["image"])
        assert (shown[0] - shown[1]).abs().mean() < 0.05, seed  # bytes are cut off after each step
