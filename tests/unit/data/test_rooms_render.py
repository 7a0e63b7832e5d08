"""The renderer of the embedded data set: exact, reproducible labels of readable scenes."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from polytask.data import figures, raycast, scenes
from polytask.data.scenes import CLASSES, PARTS, SCENES, Level, Sample, compose_scene, render, trace

PERSON = CLASSES.index("person")
DENSE = ("semseg", "human_parts", "instance", "edge", "saliency", "depth", "normals")
DIGESTS: dict[Level, str] = {
    "easy": "03890bcb3577fc01a7a53a49952a4624845b41c6df709d0f93d609ed9d6d9330",
    "standard": "5a805002ce30357c89e796cd3ab429022a5a83c712b697c203ccdc4a86409011",
    "hard": "9d7192142dcd8d9e91553dfc780bb83958d4b7118c436ed02e743775f2952949",
}


def array(sample: Sample, key: str) -> NDArray[Any]:
    value = sample[key]
    assert isinstance(value, np.ndarray)
    return value


@cache
def small(seed: int) -> Sample:
    return render(seed, 64, 96)


def digest(level: Level) -> str:
    total = hashlib.sha256()
    for seed in (0, 1, 2, 3, 1_000_000, 2_000_007, 3_000_001, 4_000_002):
        sample = render(seed, 48, 64, level)
        total.update(bytes([int(sample["scene"])]))
        for key in (*DENSE, "attributes", "identities"):
            value = array(sample, key)
            value = value.astype("<f2") if key in ("depth", "normals") else value
            total.update(value.astype(value.dtype.newbyteorder("<")).tobytes())
    return total.hexdigest()


def recomputed_edges(sample: Sample) -> NDArray[np.bool_]:
    edge = np.zeros(array(sample, "edge").shape, dtype=bool)
    for key in ("semseg", "instance"):
        ids = array(sample, key).astype(int)
        edge[:, :-1] |= np.diff(ids, axis=1) != 0
        edge[:-1] |= np.diff(ids, axis=0) != 0
    return edge


@pytest.mark.parametrize("level", DIGESTS)
def test_labels_are_the_same_on_every_machine(level: Level) -> None:
    assert digest(level) == DIGESTS[level], "labels changed: bump scenes.VERSION and update the digest"


def test_raw_stream_is_the_documented_one() -> None:
    draws = figures.Draws(7)
    raw = np.random.PCG64(7).random_raw(300)
    assert [draws.uniform() for _ in range(300)] == [(int(value) >> 11) * 2.0**-53 for value in raw]


def test_sine_and_cosine_match_the_math_library() -> None:
    for angle in np.linspace(-np.pi, np.pi, 101):
        assert figures.sine_cosine(float(angle)) == pytest.approx((np.sin(angle), np.cos(angle)), abs=1e-11)


@pytest.mark.parametrize("level", scenes.LEVELS)
def test_same_seed_is_bit_identical(level: Level) -> None:
    first, second = render(5, 40, 56, level), render(5, 40, 56, level)
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (33, 47), (64, 96)])
def test_shapes_and_types(height: int, width: int) -> None:
    sample = render(3, height, width)
    expected = {
        "image": (np.uint8, (height, width, 3)), "semseg": (np.uint8, (height, width)),
        "human_parts": (np.uint8, (height, width)), "instance": (np.uint16, (height, width)),
        "depth": (np.float32, (height, width)), "normals": (np.float32, (height, width, 3)),
        "edge": (np.uint8, (height, width)), "saliency": (np.uint8, (height, width)),
        "attributes": (np.uint8, (len(scenes.ATTRIBUTES),)),
    }  # fmt: skip
    for key, (dtype, shape) in expected.items():
        assert array(sample, key).dtype == dtype, key
        assert array(sample, key).shape == shape, key
    assert isinstance(sample["scene"], int)
    assert set(sample) == {*expected, "scene", "identities"}


@pytest.mark.parametrize("seed", range(24))
def test_values_are_in_range(seed: int) -> None:
    sample = small(seed)
    depth, normals = array(sample, "depth"), array(sample, "normals")
    assert array(sample, "semseg").max() < len(CLASSES)
    assert set(np.unique(array(sample, "edge"))) <= {0, 1}
    assert set(np.unique(array(sample, "saliency"))) == {0, 1}
    assert set(array(sample, "attributes")) <= {0, 1}
    assert ((depth == 0) | ((depth > 0.5) & (depth < 60))).all()
    length = np.linalg.norm(normals, axis=-1)
    np.testing.assert_allclose(length, depth > 0, atol=1e-6)


@pytest.mark.parametrize("seed", range(24))
def test_labels_agree_with_each_other(seed: int) -> None:
    sample = small(seed)
    semseg, parts, instance = (array(sample, key) for key in ("semseg", "human_parts", "instance"))
    person = semseg == PERSON
    assert ((instance > 0) == (semseg > 0)).all()
    if person.any():
        assert ((parts > 0) == person).all()
        assert parts.max() < len(PARTS)
    else:
        assert (parts == 255).all()
    np.testing.assert_array_equal(array(sample, "edge").astype(bool), recomputed_edges(sample))
    owners = {int(i) for i in np.unique(instance[person])}
    assert len(array(sample, "identities")) == len(owners)
    assert array(sample, "attributes")[0] == person.any()
    for i in np.unique(instance[instance > 0]):
        assert len(np.unique(semseg[instance == i])) == 1


def neighbors(pixels: NDArray[Any]) -> list[NDArray[Any]]:
    """The four neighbors of all inner pixels."""
    return [pixels[1:-1, 2:], pixels[1:-1, :-2], pixels[2:, 1:-1], pixels[:-2, 1:-1]]


@pytest.mark.parametrize("seed", range(8))
def test_normals_agree_with_depth(seed: int) -> None:
    height, width = 288, 432
    scene = compose_scene(seed)
    sample = trace(scene, height, width)
    normals, depth = array(sample, "normals").astype(float), array(sample, "depth").astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        _, solid = raycast.cast(raycast.Solids(scene.primitives), scene.camera, height, width)
    right, up = scene.camera.grid(height, width)
    rays = np.stack([*np.broadcast_arrays(right, up[:, None]), np.full(depth.shape, -1.0)], axis=-1)
    assert ((normals * rays).sum(axis=-1) <= 1e-6).all(), "a normal points away from the camera"
    east, west, south, north = neighbors(rays * depth[..., None])
    measured = np.cross(east - west, north - south)
    measured /= np.maximum(np.linalg.norm(measured, axis=-1, keepdims=True), 1e-12)
    inner = normals[1:-1, 1:-1]
    turn = np.min([(inner * n).sum(axis=-1) for n in neighbors(normals)], axis=0)
    off_edge = turn > np.cos(np.radians(3))  # no crease
    for other in neighbors(solid):
        off_edge &= (solid[1:-1, 1:-1] == other) & (other >= 0)
    cosine = (inner * measured).sum(axis=-1)[off_edge]
    assert off_edge.mean() > 0.4
    assert cosine.min() > np.cos(np.radians(2))


@pytest.mark.parametrize("seed", range(12))
def test_mirrored_scene_gives_mirrored_labels(seed: int) -> None:
    scene = compose_scene(seed)
    plain, mirrored = trace(scene, 64, 96), trace(scene.mirrored(), 64, 96)
    for key in ("semseg", "human_parts", "instance", "depth", "saliency"):
        differs = array(plain, key) != array(mirrored, key)[:, ::-1]
        assert differs.mean() < 1e-3, key
    flipped = array(mirrored, "normals")[:, ::-1] * (-1, 1, 1)
    assert (np.abs(array(plain, "normals") - flipped).max(axis=-1) > 1e-6).mean() < 1e-3
    np.testing.assert_array_equal(plain["attributes"], mirrored["attributes"])
    np.testing.assert_array_equal(array(mirrored, "edge").astype(bool), recomputed_edges(mirrored))


@pytest.mark.parametrize("seed", range(6))
def test_other_sizes_show_the_same_scene(seed: int) -> None:
    coarse, fine = render(seed, 32, 64), render(seed, 96, 192)
    # The center of a coarse pixel is the center of the middle one of nine fine pixels.
    for key in ("semseg", "instance", "depth"):
        np.testing.assert_array_equal(array(coarse, key), array(fine, key)[1::3, 1::3], err_msg=key)
    np.testing.assert_array_equal(array(coarse, "attributes")[3:6], array(fine, "attributes")[3:6])
    assert coarse["scene"] == fine["scene"]


def test_everything_occurs() -> None:
    samples = [render(seed, 32, 48) for seed in range(300)]
    pixels = sum(np.bincount(array(s, "semseg").ravel(), minlength=len(CLASSES)) for s in samples)
    assert (np.asarray(pixels) > 0.002 * 300 * 32 * 48).all()
    kinds = np.bincount([int(s["scene"]) for s in samples], minlength=len(SCENES)) / len(samples)
    assert (kinds > 0.1).all()
    assert (kinds < 0.24).all()
    share = np.mean([array(s, "attributes") for s in samples], axis=0)
    assert (share > 0.1).all(), share
    assert (share < 0.9).all(), share
    parts = [array(s, "human_parts") for s in samples]
    assert set(np.unique(parts)) == {*range(len(PARTS)), 255}


@pytest.mark.parametrize("level", scenes.LEVELS)
def test_heads_are_inside_the_picture(level: Level) -> None:
    for seed in range(120):
        for height, width in ((32, 48), (36, 48)):
            parts = array(render(seed, height, width, level), "human_parts")
            assert not (parts[0] == figures.HEAD).any(), seed


def test_nearby_figures_show_their_head() -> None:
    shown, total = 0, 0
    for seed in range(300):
        scene = compose_scene(seed)
        first = next(thing for thing in scene.things if thing.kind != "pillar")
        if scene.close_up and first.kind == "person":
            parts, instance = (array(trace(scene, 32, 48), key) for key in ("human_parts", "instance"))
            total += 1
            shown += bool((parts[instance == first.instance] == figures.HEAD).sum() >= 8)
    assert total >= 15
    assert shown == total


def test_things_stand_on_the_floor() -> None:
    for seed in range(20):
        for thing in compose_scene(seed).things:
            solids = raycast.Solids(thing.solids)
            lowest = solids.extent((0.0, 1.0, 0.0))[0].min()
            assert -0.1 < lowest < 0.01, (seed, thing.kind)


def test_identity_fixes_the_look() -> None:
    assert figures.look_of(3) == figures.look_of(3)
    assert len({figures.look_of(i) for i in range(128)}) == 128


def test_identities_come_from_the_given_range() -> None:
    for seed in range(30):
        known = array(render(seed, 24, 32), "identities")
        unknown = array(render(seed, 24, 32, identities=range(64, 128)), "identities")
        assert ((known >= 0) & (known < 64)).all()
        assert ((unknown >= 64) & (unknown < 128)).all()


def test_hue_tells_the_class_only_when_easy() -> None:
    without_blue: dict[Level, float] = {}
    for level in scenes.LEVELS:
        things = [thing for seed in range(150) for thing in compose_scene(seed, level).things]
        colors = [thing.solids[0].surface.first for thing in things if thing.kind == "ball"]
        without_blue[level] = float(np.mean([min(color) == color[2] for color in colors]))
    assert without_blue["easy"] > 0.7  # typical balls are yellow
    assert 0.2 < without_blue["standard"] < 0.45


def test_levels_differ_in_clutter_and_light() -> None:
    count: dict[Level, float] = {}
    light: dict[Level, float] = {}
    for level in scenes.LEVELS:
        drawn = [compose_scene(seed, level) for seed in range(60)]
        count[level] = float(np.mean([len(scene.things) for scene in drawn]))
        light[level] = float(np.mean([scene.light.ambient for scene in drawn]))
    assert count["hard"] > count["standard"] + 1
    assert light["hard"] < light["standard"]


def test_pictures_are_neither_black_nor_flat() -> None:
    for seed in range(60):
        image = array(small(seed), "image") if seed < 24 else array(render(seed, 32, 48), "image")
        assert 15 < image.mean() < 220, seed
        assert image.std() > 8, seed
