"""Made-up faces, pets and clips: pure functions, with the properties that let them stand in for others."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from polytask.data import raycast, standins, video
from polytask.data.raycast import Solids, combine, dot
from polytask.data.scenes import Scene, trace

SIZE = (48, 72)
PETS, FACES, CLIPS = "8ba019981ea27a75", "bcb7ea745b8802d4", "67626690308ef1ba"
ATTRIBUTES = {
    "Big_Nose", "Black_Hair", "Blond_Hair", "Brown_Hair", "Eyeglasses", "Goatee", "No_Beard", "Pale_Skin",
    "Smiling", "Wearing_Hat", "Wearing_Necktie", "Young",
}  # fmt: skip
OF_PERSON = ATTRIBUTES - {"Eyeglasses", "Smiling", "Wearing_Hat", "Wearing_Necktie"}


def digest(*arrays: Any) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()[
        :16
    ]


def test_labels_have_not_changed() -> None:
    """Labels are bit-identical everywhere; pictures may differ in the last bit."""
    assert digest(*(standins.pet(breed, 3)[1] for breed in range(12))) == PETS
    flags = [sorted(standins.portrait(person, 5)[1]) for person in range(6)]
    assert digest(np.frombuffer(repr(flags).encode(), np.uint8)) == FACES
    frames = [trace(video.compose_frame(4_000_000 + k, 7 * k), *SIZE) for k in range(3)]
    assert digest(*(frame[name] for frame in frames for name in ("semseg", "depth"))) == CLIPS


def test_pictures_repeat() -> None:
    assert np.array_equal(standins.portrait(3, 1)[0], standins.portrait(3, 1)[0])
    assert np.array_equal(standins.pet(3, 1)[0], standins.pet(3, 1)[0])
    assert not np.array_equal(standins.pet(3, 1)[0], standins.pet(3, 2)[0])


def test_attributes_follow_from_the_person_or_the_view() -> None:
    seen = set[str]()
    for person in range(12):
        views = [standins.portrait(person, view)[1] for view in range(0, standins.VIEWS, 3)]
        assert len({view & OF_PERSON for view in views}) == 1
        assert all(len(view & {"Black_Hair", "Blond_Hair", "Brown_Hair"}) == 1 for view in views)
        assert all(("Goatee" in view) != ("No_Beard" in view) for view in views)
        seen |= frozenset().union(*views)
    assert seen == ATTRIBUTES


def test_every_attribute_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[standins.Solid] = []
    monkeypatch.setattr(standins, "_assemble", lambda _, solids, *__: built.extend(solids))
    monkeypatch.setattr(standins, "_shoot", lambda *_: {"image": None})
    for person in range(12):
        for view in range(4):
            built.clear()
            holds = standins.portrait(person, view)[1]
            for name, solids in standins.FACE.items():
                expected = (name.removeprefix("not ") in holds) != name.startswith("not ")
                if name != "long hair":
                    assert all((solid in built) == expected for solid in solids), name


def test_an_attribute_shows() -> None:
    """Dark lenses, and bright or dark skin, can be told from the middle of the picture."""
    faces = [standins.portrait(person, view) for person in range(16) for view in range(4)]
    eyes = {
        worn: np.mean([p[24:36, 22:42].mean() for p, h in faces if ("Eyeglasses" in h) == worn])
        for worn in (0, 1)
    }
    skin = {
        pale: np.mean([p[30:40, 26:38].mean() for p, h in faces if ("Pale_Skin" in h) == pale])
        for pale in (0, 1)
    }
    assert eyes[1] < eyes[0] - 10
    assert skin[1] > skin[0] + 10


@pytest.mark.parametrize("breed", [0, 5, 11])
def test_trimap(breed: int) -> None:
    for number in range(4):
        _, trimap = standins.pet(breed, number)
        assert set(np.unique(trimap)) == {1, 2, 3}
        assert 0.03 < (trimap == 1).mean() < 0.5
        inside, outside = trimap == 1, trimap == 2
        touching = (inside[:, 1:] & outside[:, :-1]) | (inside[:, :-1] & outside[:, 1:])
        assert not touching.any()  # the border is between
        assert trimap[0].min() == trimap[-1].min() == 2  # the whole animal is in the picture


def moved(scene: Scene, other: Scene, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Flat index of each pixel that sees a solid, and column and row of what it sees in another frame."""
    (height, width), first, second = size, Solids(scene.primitives), Solids(other.primitives)
    with np.errstate(divide="ignore", invalid="ignore"):
        hits = raycast.resolve(first, scene.camera, *raycast.cast(first, scene.camera, height, width))
    local = first.enter_point(hits.point, hits.solid)
    rigid = [local[i] * second.scale[i].take(hits.solid) for i in range(3)]
    point = combine(second.axes.take(hits.solid, axis=2), rigid)
    seen = [point[i] + second.center[i].take(hits.solid) - other.camera.position[i] for i in range(3)]
    x, y, z = (dot(axis, seen) for axis in other.camera.axes)
    pixel = 2.0 * other.camera.slope / width
    return hits.pixel, np.stack(
        (0.5 * (width - 1.0) + x / (z * pixel), 0.5 * (height - 1.0) - y / (z * pixel))
    )


@pytest.mark.parametrize("seed", range(4_000_000, 4_000_006))
def test_most_of_a_frame_is_in_the_next(seed: int) -> None:
    frame = seed % 31
    before, after = (video.compose_frame(seed, frame + k) for k in (0, 1))
    pixel, place = moved(before, after, SIZE)
    column, row = np.rint(place).astype(int)
    inside = (column >= 0) & (column < SIZE[1]) & (row >= 0) & (row < SIZE[0])
    first, second = trace(before, *SIZE), trace(after, *SIZE)
    assert 1 <= len(np.unique(first["instance"][first["semseg"] == 10])) <= 2  # type: ignore[index]
    found = np.asarray(second["instance"])[row[inside], column[inside]]
    same = found == np.asarray(first["instance"]).ravel()[pixel[inside]]
    assert same.sum() > 0.8 * len(pixel)
    assert not np.array_equal(first["semseg"], second["semseg"]) or np.abs(place).max() > 0


def test_what_stands_still_is_the_same_in_all_frames() -> None:
    for seed in (4_000_000, 4_000_003):
        frames = [video.compose_frame(seed, k) for k in range(0, video.FRAMES, 5)]
        walkers = {t.instance for t in frames[0].things if t.kind == "person"}
        still = [[p for p in f.primitives if p.instance not in walkers] for f in frames]
        assert all(part == still[0] for part in still)
        looks = [[(p.shape, p.half, p.surface) for p in f.primitives] for f in frames]
        assert all(look == looks[0] for look in looks)  # rigid
        assert len({f.camera.position for f in frames}) == len(frames)
