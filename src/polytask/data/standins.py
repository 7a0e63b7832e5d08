"""Stand-ins for photos of faces and of pets: made-up persons and animals, ray-cast like the rooms.

Pictures are pure functions of their arguments. Who changes the order of draws changes all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from polytask.data import figures
from polytask.data.figures import (
    FAMILIES,
    UPRIGHT,
    Draws,
    Palette,
    Thing,
    compose,
    plain,
    turn_x,
    turn_y,
    turn_z,
)
from polytask.data.raycast import Array, Camera, Primitive, Shape, Surface, Vector, mirror
from polytask.data.scenes import LEVELS, Light, Sample, Scene, trace

FACE_SIZE, PET_SIZE = (64, 64), (96, 128)
FACE_SEED, PET_SEED = 0x1DE1000000, 0x1DE2000000  # beyond the seeds of rooms and of their persons
VIEWS, CATS = 12, 4  # portraits of each person; breeds that are cats
HAIR = {"Black_Hair": (0.07, 0.5, 0.12), "Blond_Hair": (0.13, 0.55, 0.95), "Brown_Hair": (0.06, 0.75, 0.42)}
PAINT = {
    "red": plain((0.7, 0.15, 0.15)),
    "white": plain((0.95, 0.95, 0.92)),
    "dark": plain((0.06, 0.05, 0.06)),
}
BALL, ROD, BOX, CONE, DISC = Shape.ELLIPSOID, Shape.CAPSULE, Shape.BOX, Shape.CONE, Shape.CYLINDER

# Shape, center, half extents, paint, tilt in degrees; what is off the middle plane is there on both sides.
Solid: TypeAlias = tuple[Shape, tuple[int, int, int], tuple[int, int, int], str, int]
FACE: dict[str, tuple[Solid, ...]] = {  # millimeters from the middle of the head, the face at +z
    "not any": (
        (BALL, (0, -270, -20), (220, 115, 100), "shirt", 0), (ROD, (0, -130, -15), (48, 120, 48), "shade", 0),
        (BALL, (0, 0, 0), (76, 104, 88), "skin", 0), (BALL, (0, 28, -22), (85, 104, 86), "hair", 0),
        (BALL, (76, 0, -5), (12, 24, 14), "skin", 0), (BALL, (32, 34, 74), (17, 4, 6), "hair", 0),
        (BALL, (31, 14, 79), (15, 9, 6), "white", 0), (BALL, (31, 14, 82), (7, 8, 6), "dark", 0),
    ),
    "long hair": ((BALL, (0, -60, -50), (96, 134, 55), "hair", 0),),
    "Big_Nose": ((BALL, (0, -18, 87), (19, 22, 28), "shade", 0),),
    "not Big_Nose": ((BALL, (0, -18, 87), (10, 20, 16), "shade", 0),),
    "Eyeglasses": (
        (BOX, (32, 12, 91), (27, 20, 2), "dark", 0), (BOX, (0, 18, 99), (30, 3, 2), "dark", 0),
        (BOX, (78, 18, 45), (3, 4, 45), "dark", 0),
    ),
    "Goatee": ((BALL, (0, -85, 51), (34, 32, 25), "hair", 0),),
    "Smiling": (
        (BALL, (0, -56, 74), (30, 13, 10), "red", 0), (BALL, (0, -52, 79), (24, 6, 10), "white", 0),
        (BALL, (30, -48, 70), (10, 4, 6), "red", 40),
    ),
    "not Smiling": ((BALL, (0, -56, 74), (20, 6, 10), "red", 0),),
    "Wearing_Hat": (
        (DISC, (0, 72, -10), (135, 6, 125), "shirt", 0), (CONE, (0, 125, -15), (90, 55, 90), "shirt", 0),
    ),
    "Wearing_Necktie": ((CONE, (0, -250, 82), (26, 90, 10), "red", 0),),
    "not Young": (
        (BALL, (0, 50, 77), (30, 2, 4), "shade", 0), (BALL, (0, 62, 71), (30, 2, 4), "shade", 0),
        (BALL, (32, -32, 76), (3, 20, 3), "shade", 29),
    ),
}  # fmt: skip
BODY: tuple[Solid, ...] = (  # per cent of girth, height of the back, and half the length; the head is at +z
    (BALL, (0, 100, 0), (100, 36, 100), "coat", 0), (ROD, (55, 48, 72), (34, 48, 10), "coat", 0),
    (ROD, (55, 48, -72), (34, 48, 10), "coat", 0), (BALL, (0, 130, 88), (55, 40, 20), "coat", 0),
    (BALL, (0, 130, -125), (16, 8, 45), "coat", 0),
)  # fmt: skip
SKULL: tuple[Solid, ...] = (  # per cent of its radius, as are the ears: pointed, hanging, folded
    (BALL, (0, 0, 0), (90, 90, 100), "coat", 0), (BALL, (38, 22, 80), (15, 17, 12), "dark", 0),
)  # fmt: skip
EARS: tuple[Solid, ...] = (
    (CONE, (55, 95, -5), (36, 55, 18), "coat", -14), (BALL, (95, -30, -10), (14, 85, 40), "coat", 9),
    (BALL, (75, 60, 10), (25, 30, 20), "dark", 0),
)  # fmt: skip


def _assemble(thing: Thing, solids: Iterable[Solid], paint: Mapping[str, Surface], unit: Vector) -> None:
    """Add solids in the thing's frame, measured in `unit` along each axis."""
    for shape, place, extent, color, degrees in solids:
        x, y, z = (i * u for i, u in zip(place, unit, strict=True))
        a, b, c = (i * u for i, u in zip(extent, unit, strict=True))
        center, turn = (x, y, z), turn_z(degrees / 57.29578)
        for at, axes in ((center, turn), mirror(center, turn))[: 1 + (x != 0.0)]:
            thing.add(shape, at, (a, b, c), paint[color], axes)


def _shoot(draws: Draws, camera: Camera, thing: Thing, size: tuple[int, int]) -> Sample:
    """The thing on a floor before a wall."""
    light, paint, one = Light.draw(draws, LEVELS["easy"]), Palette(cells=(1.2, 5.0)).surface, (1.0, 1.0, 1.0)
    behind = 0.0, 0.0, thing.place[2] + 1.0 + draws.uniform()
    floor = Primitive(Shape.PLANE, (0.0, 0.0, 0.0), UPRIGHT, one, paint(draws))
    wall = Primitive(Shape.PLANE, behind, turn_x(-1.5708), one, paint(draws))
    scene = Scene(0, draws.integer(1 << 48), camera, light, [thing], [floor, wall, *thing.solids], True)
    return trace(scene, *size)


def portrait(person: int, view: int) -> tuple[Array, frozenset[str]]:
    """A view of a person, uint8 [H, W, 3], and the CelebA attributes that hold.

    Face and shirt follow from the person, all else from person and view.
    """
    who, draws = (Draws(FACE_SEED + (person << 8) + stream) for stream in (255, view))
    hair = who.pick([*HAIR])
    of_person = {"Pale_Skin": 0.5, "Young": 0.5, "Goatee": 0.35, "Big_Nose": 0.5}
    of_view = {"Eyeglasses": 0.3, "Smiling": 0.5, "Wearing_Hat": 0.25, "Wearing_Necktie": 0.3}
    holds = {hair} | {name for name, chance in of_person.items() if who.chance(chance)}
    holds |= {name for name, chance in of_view.items() if draws.chance(chance)}
    holds |= {"No_Beard"} - {name.replace("Goatee", "No_Beard") for name in holds}
    tone = (0.2, 0.98) if "Pale_Skin" in holds else (who.uniform(0.4, 0.6), who.uniform(0.42, 0.85))
    skin, tint = figures.from_hsv(who.uniform(0.045, 0.075), *tone), figures.from_hsv(*HAIR[hair])
    shade, shirt = (0.72 * skin[0], 0.72 * skin[1], 0.72 * skin[2]), Palette(cells=(10.0, 25.0)).surface(who)
    paint = {**PAINT, "skin": plain(skin), "shade": plain(shade), "hair": plain(tint), "shirt": shirt}
    place = draws.uniform(-0.03, 0.03), draws.uniform(1.58, 1.62), 1.0
    thing = Thing("person", 1, place, 3.14159 + draws.uniform(-0.45, 0.45))
    thing.frame = compose(thing.frame, turn_x(draws.uniform(-0.12, 0.12)))
    unit = who.uniform(9e-4, 1.08e-3), who.uniform(9e-4, 1.08e-3), 1e-3
    shown = holds | ({"long hair"} if who.chance(0.5) else set())
    for name, solids in FACE.items():
        if (name.removeprefix("not ") in shown) != name.startswith("not "):
            _assemble(thing, solids, paint, unit)
    camera = Camera((0.0, 1.55, 0.0), UPRIGHT, draws.uniform(0.22, 0.27))
    return np.asarray(_shoot(draws, camera, thing, FACE_SIZE)["image"]), frozenset(holds)


def pet(breed: int, number: int) -> tuple[Array, Array]:
    """Picture uint8 [H, W, 3] and trimap uint8 [H, W] (1 animal, 2 background, 3 border) of a breed.

    Proportions, ears and coat follow from the breed, the rest from the number too.
    """
    kind, draws, is_cat = Draws(PET_SEED - 1 - breed), Draws(PET_SEED + (breed << 16) + number), breed < CATS
    length = kind.uniform(0.34, 0.44) if is_cat else kind.uniform(0.28, 0.66)
    back, girth = kind.uniform(0.5, 0.75) * length, kind.uniform(0.2, 0.22 if is_cat else 0.3) * length
    snout, ears = (10, 0) if is_cat else (30 + kind.integer(90), kind.integer(3))
    colors = [figures.from_hsv(0.08, kind.uniform(0.0, 0.7), kind.uniform(0.1, 0.95)) for _ in range(2)]
    coat = Surface(breed % len(FAMILIES), 14.0, (draws.uniform(), draws.uniform()), 0.3, *colors)
    distance, yaw = 1.0 + 1.6 * length, draws.pick((-1.0, 1.0)) * draws.uniform(0.6, 2.6)
    thing, paint = Thing("background", 1, (0.0, 0.0, distance), yaw), {**PAINT, "coat": coat}
    _assemble(thing, BODY, paint, (0.01 * girth, 0.01 * back, 0.005 * length))
    skull = 0.045 + 0.45 * girth
    thing.place = figures.move(thing.place, thing.frame, (0.0, 1.5 * back + 0.3 * skull, 0.52 * length))
    thing.frame = compose(thing.frame, turn_y(draws.uniform(-0.7, 0.7)))
    jaws: Solid = (BALL, (0, -30, 75 + 4 * snout // 10), (42, 36, 30 + 6 * snout // 10), "coat", 0)
    nose: Solid = (BALL, (0, -20, 105 + snout), (16, 13, 12), "dark", 0)
    _assemble(thing, (*SKULL, jaws, nose, EARS[ears]), paint, (0.01 * skull, 0.01 * skull, 0.01 * skull))
    axes = turn_x(draws.uniform(0.0, 0.3))  # looks at the middle of the body
    eye = draws.uniform(-0.1, 0.1), back + distance * axes[1][2] / axes[1][1], 0.0
    camera = Camera(eye, axes, draws.uniform(0.48, 0.58) * (0.38 + length))
    sample = _shoot(draws, camera, thing, PET_SIZE)
    mask = np.asarray(sample["instance"]) > 0
    around = sliding_window_view(np.pad(mask, 1, mode="edge"), (3, 3))
    border = around.any((2, 3)) & ~around.all((2, 3))  # two pixels wide
    return np.asarray(sample["image"]), np.where(border, 3, np.where(mask, 1, 2)).astype(np.uint8)
