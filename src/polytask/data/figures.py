"""Things that stand in a room: textured objects and posed figures, drawn from a reproducible stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import factorial, fsum
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np

from polytask.data.raycast import Array, Frame, Primitive, Shape, Surface, Vector, combine

CLASSES = (
    "background", "crate", "ball", "can", "cone", "table", "chair",
    "lamp", "pillar", "plant", "person", "robot", "screen",
)  # fmt: skip
PARTS = ("background", "head", "torso", "upper_arms", "lower_arms", "upper_legs", "lower_legs")
HEAD, TORSO, UPPER_ARM, LOWER_ARM, UPPER_LEG, LOWER_LEG, HAND, FOOT = range(1, 9)  # the first six are parts
# Radius on the floor in meters.
FOOTPRINT = {"crate": 0.4, "ball": 0.3, "can": 0.25, "cone": 0.3, "table": 0.55, "chair": 0.32, "lamp": 0.28,
             "pillar": 0.28, "plant": 0.35, "person": 0.33, "robot": 0.33, "screen": 0.4}  # fmt: skip
UPRIGHT: Frame = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
ROUND = ("ball", "can", "cone")
IDENTITY_SEED = 0x1DE0000000  # beyond every sample seed, so that looks and scenes never share a stream
T = TypeVar("T")
Paint: TypeAlias = Callable[[], Surface]
Bone: TypeAlias = tuple[int, Vector, Frame, float]  # part, center, frame, length in units of figure height


class Draws:
    """Random numbers out of the raw PCG64 stream, whose stability numpy guarantees (unlike Generator's)."""

    def __init__(self, seed: int) -> None:
        self._source = np.random.PCG64(seed)
        self._block: list[int] = []

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        if not self._block:
            self._block = self._source.random_raw(256).tolist()[::-1]
        return low + (high - low) * ((self._block.pop() >> 11) * 2.0**-53)

    def integer(self, count: int) -> int:
        """One of 0 .. count - 1."""
        return int(self.uniform() * count)

    def normal(self, deviation: float) -> float:
        """Nearly Gaussian: a sum of twelve uniform numbers, which needs no logarithm."""
        return deviation * fsum([self.uniform(-0.5, 0.5) for _ in range(12)])

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.integer(len(choices))]


SERIES = [(-1) ** (k // 2) / factorial(k) for k in range(25)]  # of x^k: sine where k is odd, else cosine


def sine_cosine(angle: float) -> tuple[float, float]:
    """Sine and cosine for |angle| <= pi by their series, free of the platform's math library."""
    square, sine, cosine = angle * angle, 0.0, SERIES[24]
    for k in range(22, -1, -2):
        sine, cosine = sine * square + SERIES[k + 1], cosine * square + SERIES[k]
    return sine * angle, cosine


def turn_x(angle: float) -> Frame:
    s, c = sine_cosine(angle)
    return (1.0, 0.0, 0.0), (0.0, c, s), (0.0, -s, c)


def turn_y(angle: float) -> Frame:
    s, c = sine_cosine(angle)
    return (c, 0.0, -s), (0.0, 1.0, 0.0), (s, 0.0, c)


def turn_z(angle: float) -> Frame:
    s, c = sine_cosine(angle)
    return (c, s, 0.0), (-s, c, 0.0), (0.0, 0.0, 1.0)


def compose(outer: Frame, inner: Frame) -> Frame:
    return combine(outer, inner[0]), combine(outer, inner[1]), combine(outer, inner[2])


def move(start: Vector, frame: Frame, offset: Vector, size: float = 1.0) -> Vector:
    """A point given by its offset, in units of `size`, in a frame that sits at `start`."""
    x, y, z = combine(frame, offset)
    return start[0] + size * x, start[1] + size * y, start[2] + size * z


def from_hsv(hue: float, saturation: float, value: float) -> Vector:
    """Color in [0, 1] per channel; hue is taken modulo 1."""
    sector = hue % 1.0 * 6.0
    index, part = int(sector), sector - int(sector)
    low, falling = value * (1.0 - saturation), value * (1.0 - saturation * part)
    rising = value * (1.0 - saturation * (1.0 - part))
    return (
        (value, rising, low), (falling, value, low), (low, value, rising),
        (low, falling, value), (rising, low, value), (value, low, falling),
    )[index % 6]  # fmt: skip


def noise(u: Array, v: Array) -> Array:
    """Random values on the integer lattice, smoothly joined."""
    column, row = np.floor(u), np.floor(v)
    x, y = u - column, v - row
    x, y = x * x * (3.0 - 2.0 * x), y * y * (3.0 - 2.0 * y)
    i, j = column.astype(np.int32), row.astype(np.int32)
    low = scatter(i, j) * (1.0 - x) + scatter(i + 1, j) * x
    high = scatter(i, j + 1) * (1.0 - x) + scatter(i + 1, j + 1) * x
    return np.asarray(low * (1.0 - y) + high * y)


def scatter(i: Array, j: Array) -> Array:
    """A number in [0, 1) for each lattice point."""
    mixed: Array = i * np.int32(374761393) + j * np.int32(668265263)
    mixed = (mixed ^ mixed >> 13) * np.int32(1274126177)
    return (mixed >> 8 & 0xFFFF) * np.float32(2.0**-16)


# Share of the second color at texture coordinates (u, v).
FAMILIES: dict[str, Callable[[Array, Array], Array]] = {
    "plain": lambda u, _v: np.zeros_like(u),
    "checker": lambda u, v: (np.floor(u) + np.floor(v)) % 2.0,
    "stripes": lambda _u, v: np.floor(2.0 * v) % 2.0,
    "bricks": lambda u, v: ((u + np.floor(2.0 * v) / 2.0) % 1.0 < 0.1) | (2.0 * v % 1.0 < 0.2),
    "noise": noise,
    "marble": lambda u, v: 0.5 + 0.5 * np.sin(4.0 * v + 6.0 * noise(u, v)),
    "dots": lambda u, v: (u % 1.0 - 0.5) ** 2 + (v % 1.0 - 0.5) ** 2 < 0.1,
    "gradient": lambda _u, v: np.abs(0.6 * v % 2.0 - 1.0),
}
SMOOTH = (0, 7)  # families without a pattern: plain, gradient


class Palette(NamedTuple):
    """How surfaces are drawn: probability of a plain one, fixed hue if any, cells per meter."""

    plain: float = 0.0
    hue: float | None = None
    cells: tuple[float, float] = (3.0, 10.0)

    def surface(self, draws: Draws) -> Surface:
        family = draws.integer(len(FAMILIES)) * (not draws.chance(self.plain))
        hue = draws.uniform() if self.hue is None else self.hue + draws.uniform(0.0, 0.06)
        first = from_hsv(hue, draws.uniform(0.25, 0.9), draws.uniform(0.45, 0.95))
        second = from_hsv(hue + draws.uniform(-0.3, 0.3), draws.uniform(0.1, 0.9), draws.uniform(0.25, 1.0))
        second = first if family == 0 else second
        phase = draws.uniform(0.1, 0.9), draws.uniform(0.1, 0.9)
        return Surface(family, draws.uniform(*self.cells), phase, draws.uniform(-0.7, 0.7), first, second)


class Thing:
    """An object under construction: solids that share a place, a class and an instance number."""

    def __init__(self, kind: str, instance: int, place: Vector, yaw: float, size: float = 1.0) -> None:
        self.kind, self.instance, self.place, self.size = kind, instance, place, size
        self.frame = turn_y(yaw)
        self.solids: list[Primitive] = []
        self.identity = -1
        self.raised_arm = False

    def add(
        self, shape: Shape, center: Vector, half: Vector, surface: Surface,
        turn: Frame = UPRIGHT, part: int = 0,
    ) -> None:  # fmt: skip
        """Append a solid; `center`, `half` and `turn` are in the thing's own frame, in units of `size`."""
        half = half[0] * self.size, half[1] * self.size, half[2] * self.size
        spot, axes = move(self.place, self.frame, center, self.size), compose(self.frame, turn)
        label = CLASSES.index(self.kind)
        self.solids.append(Primitive(shape, spot, axes, half, surface, label, self.instance, part))

    def build(self, draws: Draws, palette: Palette) -> None:
        """Draw the thing's solids."""
        BUILDERS[self.kind](self, draws, lambda: palette.surface(draws))

    def blocks(self, x: float, z: float, radius: float) -> bool:
        """Whether something of this radius at (x, z) would stand too close."""
        dx, dz, gap = x - self.place[0], z - self.place[2], max(0.55, 0.9 * (radius + FOOTPRINT[self.kind]))
        return dx * dx + dz * dz < gap * gap


SIMPLE: dict[str, tuple[Shape, tuple[float, float], tuple[float, float]]] = {  # ranges of radius, half height
    "ball": (Shape.ELLIPSOID, (0.16, 0.38), (1.0, 1.0)),
    "can": (Shape.CYLINDER, (0.14, 0.26), (0.2, 0.45)),
    "cone": (Shape.CONE, (0.2, 0.35), (0.25, 0.5)),
    "pillar": (Shape.CYLINDER, (0.22, 0.22), (1.4, 1.4)),
}


def simple(thing: Thing, draws: Draws, paint: Paint) -> None:
    shape, radii, heights = SIMPLE[thing.kind]
    r, h = draws.uniform(*radii), draws.uniform(*heights)
    h = r if thing.kind == "ball" else h
    thing.add(shape, (0.0, h, 0.0), (r, h, r), paint())


def crate(thing: Thing, draws: Draws, paint: Paint) -> None:
    x, y, z = (draws.uniform(0.18, 0.42) for _ in range(3))
    thing.add(Shape.BOX, (0.0, y, 0.0), (x, y, z), paint())


def table(thing: Thing, draws: Draws, paint: Paint) -> None:
    x, h, z = draws.uniform(0.35, 0.6), draws.uniform(0.55, 0.8), draws.uniform(0.25, 0.4)
    thing.add(Shape.BOX, (0.0, h - 0.03, 0.0), (x, 0.03, z), paint())
    add_legs(thing, (x - 0.04, h - 0.06, z - 0.04), 0.03, paint())


def add_legs(thing: Thing, corner: Vector, thickness: float, surface: Surface) -> None:
    """Four square legs from the floor up to (±x, height, ±z)."""
    x, height, z = corner
    for side, end in ((-x, -z), (x, -z), (-x, z), (x, z)):
        thing.add(Shape.BOX, (side, 0.5 * height, end), (thickness, 0.5 * height, thickness), surface)


def chair(thing: Thing, draws: Draws, paint: Paint) -> None:
    w, seat, back = draws.uniform(0.2, 0.26), draws.uniform(0.4, 0.5), draws.uniform(0.22, 0.32)
    cloth = paint()
    thing.add(Shape.BOX, (0.0, seat, 0.0), (w, 0.03, w), cloth)
    thing.add(Shape.BOX, (0.0, seat + back, 0.03 - w), (w, back, 0.03), cloth)
    add_legs(thing, (w - 0.03, seat - 0.03, w - 0.03), 0.025, paint())


def lamp(thing: Thing, draws: Draws, paint: Paint) -> None:
    h, r, metal = draws.uniform(0.6, 0.8), draws.uniform(0.17, 0.25), paint()
    thing.add(Shape.CYLINDER, (0.0, 0.02, 0.0), (0.17, 0.02, 0.17), metal)
    thing.add(Shape.CYLINDER, (0.0, h, 0.0), (0.025, h, 0.025), metal)
    thing.add(Shape.CONE, (0.0, 2.0 * h, 0.0), (r, 0.17, r), paint())


def plant(thing: Thing, draws: Draws, paint: Paint) -> None:
    h = draws.uniform(0.12, 0.2)
    thing.add(Shape.CYLINDER, (0.0, h, 0.0), (0.15, h, 0.15), paint())
    leaf = Palette(hue=0.27).surface(draws)
    for quarter in range(4):
        around = 1.5708 * quarter - 2.4 + draws.uniform(-0.4, 0.4)
        turn = compose(turn_y(around), turn_x(draws.uniform(0.2, 0.7)))
        length = draws.uniform(0.25, 0.42)
        foot = (0.0, 2.0 * h - 0.03, 0.0)
        thing.add(Shape.ELLIPSOID, move(foot, turn, (0.0, length, 0.0)), (0.1, length, 0.035), leaf, turn)


def screen(thing: Thing, draws: Draws, paint: Paint) -> None:
    x, y = draws.uniform(0.3, 0.45), draws.uniform(0.2, 0.3)
    stem, frame = draws.uniform(0.25, 0.4), paint()
    thing.add(Shape.CYLINDER, (0.0, 0.02, 0.0), (0.2, 0.02, 0.2), frame)
    thing.add(Shape.CYLINDER, (0.0, stem, 0.0), (0.03, stem, 0.03), frame)
    vivid = paint()._replace(family=1 + draws.integer(len(FAMILIES) - 1), frequency=draws.uniform(6.0, 12.0))
    thing.add(Shape.BOX, (0.0, 2.0 * stem + y, 0.0), (x, y, 0.025), vivid)


class Look(NamedTuple):
    """What an identity fixes; two renders of one identity share it, not the pose."""

    skin: Surface
    hair: Surface
    shirt: Surface
    trousers: Surface
    shoes: Surface
    girth: float
    sleeves: Surface
    shins: Surface


@lru_cache(maxsize=256)
def look_of(identity: int) -> Look:
    """The look of an identity, from its own stream."""
    draws, cloth = Draws(IDENTITY_SEED + identity), Palette(cells=(4.0, 12.0))
    tone = draws.uniform()  # light to dark
    skin = plain(from_hsv(draws.uniform(0.04, 0.09), 0.3 + 0.3 * tone, 0.95 - 0.55 * tone))
    hair = plain(from_hsv(draws.uniform(0.02, 0.12), draws.uniform(0.1, 0.7), draws.uniform(0.08, 0.7)))
    shirt, trousers, shoes = (cloth.surface(draws) for _ in range(3))
    sleeves = shirt if draws.chance(0.5) else skin
    shins = trousers if draws.chance(0.65) else skin
    return Look(skin, hair, shirt, trousers, shoes, draws.uniform(0.85, 1.25), sleeves, shins)


def plain(color: Vector) -> Surface:
    return Surface(0, 1.0, (0.5, 0.5), 0.0, color, color)


def limb(start: Vector, frame: Frame, bend: float, parts: Sequence[tuple[int, float]]) -> list[Bone]:
    """Hinged segments (part, length) that hang from `start`."""
    bones = []
    for part, length in parts:
        bones.append((part, move(start, frame, (0.0, -0.5 * length, 0.0)), frame, length))
        start, frame = move(start, frame, (0.0, -length, 0.0)), compose(frame, turn_x(bend))
    return bones


def draw_bones(thing: Thing, draws: Draws, shoulder: float) -> list[Bone]:
    """A random pose: upper and lower arms with hands, legs with feet; sinks the thing onto its lower foot."""
    thing.frame = compose(thing.frame, turn_x(draws.uniform(-0.05, 0.05)))
    bones: list[Bone] = []
    soles: list[float] = []
    stride = draws.uniform(-0.55, 0.55)
    for side in (-1.0, 1.0):
        low, high = (-1.9, 0.9) if draws.chance(0.5) else (-0.5, 0.5)
        pitch, spread = draws.uniform(low, high), side * draws.uniform(0.02, 0.25)
        thing.raised_arm |= pitch < -1.1
        arm = (UPPER_ARM, 0.17), (LOWER_ARM, 0.15), (HAND, 0.05)
        frame = compose(turn_z(spread), turn_x(pitch))
        bones += limb((side * shoulder, 0.78, 0.0), frame, draws.uniform(-1.4, 0.0), arm)
        hip, knee = side * stride * draws.uniform(0.4, 1.0), draws.uniform(0.0, 0.6)  # legs balance
        leg = limb((side * 0.055, 0.5, 0.0), turn_x(hip), knee, ((UPPER_LEG, 0.25), (LOWER_LEG, 0.22)))
        _, shin, frame, _ = leg[1]
        x, y, z = move(shin, frame, (0.0, -0.11, 0.0))
        bones += [*leg, (FOOT, (x, y - 0.017, z + 0.03), UPRIGHT, 0.05)]
        soles.append(y - 0.04)
    x, y, z = thing.place
    thing.place = (x, y - thing.size * min(soles), z)  # a bent leg is shorter: stand on the lower foot
    return bones


def person(thing: Thing, draws: Draws, _paint: Paint) -> None:
    look = look_of(thing.identity)
    wide = 0.105 * look.girth
    clothes = {
        UPPER_ARM: (0.036, look.shirt), LOWER_ARM: (0.03, look.sleeves), HAND: (0.026, look.skin),
        UPPER_LEG: (0.052, look.trousers), LOWER_LEG: (0.04, look.shins), FOOT: (0.032, look.shoes),
    }  # fmt: skip
    for part, center, frame, length in draw_bones(thing, draws, wide + 0.022):
        radius, cloth = clothes[part]
        if part == FOOT:
            thing.add(Shape.ELLIPSOID, center, (radius, 0.025, 0.07), cloth, frame, LOWER_LEG)
            continue
        half = (radius, 0.5 * length + radius, radius)
        thing.add(Shape.CAPSULE, center, half, cloth, frame, LOWER_ARM if part == HAND else part)
    thing.add(Shape.CAPSULE, (0.0, 0.66, 0.0), (wide, 0.1 + wide, 0.075 * look.girth), look.shirt, part=TORSO)
    thing.add(Shape.CAPSULE, (0.0, 0.85, 0.0), (0.034, 0.06, 0.034), look.skin, part=TORSO)
    thing.add(Shape.ELLIPSOID, (0.0, 0.93, 0.0), (0.058, 0.074, 0.066), look.skin, part=HEAD)
    thing.add(Shape.ELLIPSOID, (0.0, 0.946, -0.016), (0.064, 0.07, 0.066), look.hair, part=HEAD)


def robot(thing: Thing, draws: Draws, paint: Paint) -> None:
    shell, joints = paint(), paint()
    for part, center, frame, length in draw_bones(thing, draws, 0.165):
        half = (0.045, 0.022, 0.075) if part == FOOT else (0.036, 0.46 * length, 0.036)
        thing.add(Shape.BOX, center, half, joints if part in (LOWER_ARM, LOWER_LEG) else shell, frame)
    thing.add(Shape.BOX, (0.0, 0.66, 0.0), (0.125, 0.16, 0.08), shell)
    thing.add(Shape.CYLINDER, (0.0, 0.84, 0.0), (0.03, 0.03, 0.03), joints)
    thing.add(Shape.BOX, (0.0, 0.925, 0.0), (0.07, 0.06, 0.065), joints)


BUILDERS: dict[str, Callable[[Thing, Draws, Paint], None]] = {
    "crate": crate, "ball": simple, "can": simple, "cone": simple, "table": table, "chair": chair,
    "lamp": lamp, "pillar": simple, "plant": plant, "person": person, "robot": robot, "screen": screen,
}  # fmt: skip
