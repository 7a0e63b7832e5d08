"""The procedurally rendered data set `rooms`: a scene, its picture and its exact labels from one integer.

A seed fixes the scene at every picture size. Who changes the order of draws bumps VERSION.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from polytask.data import figures, raycast
from polytask.data.figures import CLASSES, PARTS, UPRIGHT, Draws, Palette, Thing, turn_x, turn_y, turn_z
from polytask.data.raycast import Array, Camera, Frame, Hits, Primitive, Shape, Surface, Vector, dot, mirror

__all__ = ["ATTRIBUTES", "CLASSES", "PARTS", "SCENES", "VERSION", "compose_scene", "render", "trace"]

VERSION: int = 1
SCENES = ("wall", "corner", "room", "ground", "colonnade", "steps")
ATTRIBUTES = ("person", "robot", "many_objects", "sky", "warm_light",
              "close_up", "raised_arm", "round_object", "shadowed", "patterned_floor")  # fmt: skip
FIGURES = ("person", "robot")
KINDS = ("crate", "ball", "can", "cone", "table", "chair", "lamp", "plant", "screen", "person", *FIGURES)
CLOSE_UPS = ("person", *FIGURES, "chair", "plant")
WIDEST = 1.5  # aspect ratio up to which the heads of all figures are in the picture
SPECK = 1.0 / 246.0  # share of the picture under which an object is not salient: 25 pixels at 64 x 96
RADIAN = 3.14159265358979 / 180.0
Level: TypeAlias = Literal["easy", "standard", "hard"]
Sample: TypeAlias = dict[str, NDArray[Any] | int]


class Difficulty(NamedTuple):
    """What the levels change: ranges of counts, noise and ambient light; biases of surfaces."""

    objects: tuple[int, int] = (4, 9)
    noise: tuple[float, float] = (0.006, 0.03)
    ambient: tuple[float, float] = (0.22, 0.45)
    occluders: int = 0
    typical_hue: float = 0.0  # share of objects whose hue gives their class away
    plain: float = 0.0  # share of surfaces without a texture


LEVELS: dict[Level, Difficulty] = {
    "easy": Difficulty(typical_hue=0.7, plain=0.5),
    "standard": Difficulty(),
    "hard": Difficulty(objects=(7, 12), noise=(0.02, 0.06), ambient=(0.1, 0.22), occluders=2),
}


class Light(NamedTuple):
    """A sun (`direction` points to it), ambient light, a sky from horizon to zenith, and the film."""

    direction: Vector
    sun: Vector
    sky: tuple[Vector, Vector]
    warm: bool
    ambient: float
    gamma: float
    vignette: float
    noise: float

    @classmethod
    def draw(cls, draws: Draws, level: Difficulty) -> Light:
        x, y, z = draws.uniform(-0.8, 0.8), draws.uniform(0.5, 1.2), draws.uniform(-1.2, -0.3)
        length = float(np.sqrt(x * x + y * y + z * z))
        warm, power = draws.chance(0.5), draws.uniform(0.65, 1.0)
        red, green, blue = (1.0, 0.85, 0.6) if warm else (0.85, 0.95, 1.0)
        horizon = figures.from_hsv(draws.uniform(), draws.uniform(0.0, 0.3), draws.uniform(0.7, 1.0))
        zenith = figures.from_hsv(draws.uniform(), draws.uniform(0.2, 0.6), draws.uniform(0.45, 0.95))
        film = draws.uniform(0.8, 1.15), draws.uniform(0.0, 0.35), draws.uniform(*level.noise)
        direction, sun = (x / length, y / length, z / length), (power * red, power * green, power * blue)
        return cls(direction, sun, (horizon, zenith), warm, draws.uniform(*level.ambient), *film)


class Scene(NamedTuple):
    """All a picture is made of; instance i is things[i - 1]."""

    kind: int
    seed: int
    camera: Camera
    light: Light
    things: list[Thing]
    primitives: list[Primitive]  # the floor comes first
    close_up: bool

    def mirrored(self) -> Scene:
        """The scene reflected at the plane x = 0."""
        camera = Camera(*mirror(self.camera.position, self.camera.axes), self.camera.slope)
        light = self.light._replace(direction=mirror(self.light.direction, UPRIGHT)[0])
        moved = ((p, *mirror(p.center, p.axes)) for p in self.primitives)
        solids = [p._replace(center=center, axes=axes) for p, center, axes in moved]
        return self._replace(camera=camera, light=light, primitives=solids)


class Stage:
    """A scene while it is put together: the view, and what stands where."""

    def __init__(self, seed: int, level: Difficulty, identities: range) -> None:
        self.draws, self.level, self.identities = Draws(seed), level, identities
        self.left, self.right, self.back = -50.0, 50.0, 5.0  # where the floor for objects ends
        self.structure: list[Primitive] = []
        self.things: list[Thing] = []
        self.heads: list[tuple[float, float]] = []  # distance and height above the eye

    def set_view(self, *, close_figure: bool, to_the_left: bool) -> None:
        draws = self.draws
        degrees, height = draws.uniform(42.0, 62.0), draws.uniform(0.9, 1.7)
        if close_figure:  # only a wide view from chest height shows head and legs at once
            degrees, height = 31.0 + 0.5 * degrees, 0.85 + 0.5 * height
        sine, cosine = figures.sine_cosine(0.5 * degrees * RADIAN)
        self.slope, self.eye = sine / cosine, (draws.uniform(-0.4, 0.4), height, 0.0)
        self.heading = turn_y(draws.uniform(-0.25, -0.05 if to_the_left else 0.25))

    def ahead(self, side: float, distance: float) -> Vector:
        """Point of the floor at a distance from the eye and `side` half picture widths off the axis."""
        offset = side * self.slope * distance, 0.0, distance
        return figures.move((self.eye[0], 0.0, 0.0), self.heading, offset)

    def paint(self) -> Surface:
        return Palette(self.level.plain, cells=(1.2, 5.0)).surface(self.draws)

    def add_plane(self, center: Vector, axes: Frame = UPRIGHT) -> None:
        self.structure.append(Primitive(Shape.PLANE, center, axes, (1.0, 1.0, 1.0), self.paint()))

    def build(self, kind: str) -> None:
        """Floor, then walls and ceiling, or pillars, or steps."""
        draws = self.draws
        self.add_plane((0.0, 0.0, 0.0))
        if kind in ("wall", "corner", "room"):
            self.back = draws.uniform(5.5, 8.0)
            self.add_plane((0.0, 0.0, self.back), turn_x(-90.0 * RADIAN))
        if kind in ("corner", "room"):  # side walls stand where the view still shows them
            self.left = max(-draws.uniform(2.2, 3.4), 0.8 * self.ahead(-1.0, self.back)[0])
            self.add_plane((self.left, 0.0, 0.0), turn_z(90.0 * RADIAN))
        if kind == "room":
            self.right = min(draws.uniform(2.2, 3.4), 0.8 * self.ahead(1.0, self.back)[0])
            self.add_plane((self.right, 0.0, 0.0), turn_z(90.0 * RADIAN))
            self.add_plane((0.0, draws.uniform(2.6, 3.2), 0.0))
        if kind == "colonnade":  # two rows of two; the far pair is always in view
            side, near, far = draws.uniform(0.6, 0.85), draws.uniform(2.8, 3.6), draws.uniform(4.6, 5.6)
            for offset, distance in ((-side, near), (side, near), (-side, far), (side, far)):
                self.add_thing("pillar", self.ahead(offset * far / distance, distance), 0.0)
        if kind == "steps":
            self.build_steps(draws.uniform(5.0, 5.8), draws.uniform(0.2, 0.32), draws.uniform(0.3, 0.5))

    def build_steps(self, front: float, rise: float, run: float) -> None:
        """A wide flight of steps up to a terrace."""
        surfaces, count = (self.paint(), self.paint()), 4 + self.draws.integer(3)
        for step in range(1, count + 1):
            depth, top = 0.5 * run if step < count else 15.0, 0.5 * rise * step
            center, half = (0.0, top, front + run * (step - 1) + depth), (20.0, top, depth)
            self.structure.append(Primitive(Shape.BOX, center, UPRIGHT, half, surfaces[step % 2]))

    def add_thing(self, kind: str, spot: Vector, yaw: float, size: float = 1.0) -> None:
        thing = Thing(kind, len(self.things) + 1, spot, yaw, size)
        hue = CLASSES.index(kind) / len(CLASSES) if self.draws.chance(self.level.typical_hue) else None
        if kind == "person":
            thing.identity = self.draws.pick(self.identities)
        thing.build(self.draws, Palette(self.level.plain, hue))
        self.things.append(thing)

    def add_object(self, kind: str, near: float, far: float, spread: float) -> bool:
        """Put an object on a free spot of the floor in view; False if a few tries find none."""
        draws, size, above = self.draws, 1.0, -1.0  # only figures have a head to keep in view
        if kind in FIGURES:
            size = draws.uniform(1.45, 1.9) if kind == "person" else draws.uniform(1.2, 1.7)
            above = 1.04 * size - self.eye[1]
            if near > 1.5:  # step back until the head is in view without looking up
                near = min(max(near, above * WIDEST / (0.8 * self.slope)), far)
        for _ in range(20):
            distance = draws.uniform(near, far)
            spot = self.ahead(draws.uniform(-spread, spread), distance)
            if self.is_free(spot, figures.FOOTPRINT[kind]):
                self.heads.append((distance - 0.1, above))
                self.add_thing(kind, spot, draws.uniform(-180.0, 180.0) * RADIAN, size)
                return True
        return False

    def is_free(self, spot: Vector, radius: float) -> bool:
        x, _, z = spot
        inside = self.left + radius < x < self.right - radius and z < self.back - radius
        return inside and not any(thing.blocks(x, z, radius) for thing in self.things)

    def add_occluder(self) -> None:
        """A narrow board close to the eye that hides part of what is behind."""
        draws = self.draws
        x, _, z = self.ahead(draws.pick((-1.0, 1.0)) * draws.uniform(0.2, 0.9), draws.uniform(1.0, 1.25))
        half = draws.uniform(0.02, 0.07), draws.uniform(0.4, 1.1), 0.02
        self.structure.append(Primitive(Shape.BOX, (x, half[1], z), UPRIGHT, half, self.paint()))

    def aim(self) -> Camera:
        """Look down a little, but not so much that a head leaves the picture."""
        sine, cosine = figures.sine_cosine(self.draws.uniform(-0.3, -0.02))
        slope, top = sine / cosine, 0.9 * self.slope / WIDEST
        for distance, above in self.heads:
            head = above / distance
            slope = max(slope, (head - top) / (1.0 + head * top))
        cosine = 1.0 / float(np.sqrt(1.0 + slope * slope))
        pitch = (1.0, 0.0, 0.0), (0.0, cosine, -slope * cosine), (0.0, slope * cosine, cosine)
        tilted = figures.compose(pitch, turn_z(self.draws.normal(0.03)))
        return Camera(self.eye, figures.compose(self.heading, tilted), self.slope)


def compose_scene(seed: int, difficulty: Level = "standard", identities: range = range(64)) -> Scene:
    """Draw a scene: type, light, view, structure, close-up, objects, occluders; last the camera's pitch."""
    level = LEVELS[difficulty]
    stage = Stage(seed, level, identities)
    draws = stage.draws
    kind, light = draws.integer(len(SCENES)), Light.draw(draws, level)
    close_up = draws.pick(CLOSE_UPS) if draws.chance(0.3) else ""
    stage.set_view(close_figure=close_up in FIGURES, to_the_left=SCENES[kind] == "corner")
    stage.build(SCENES[kind])
    is_close = bool(close_up) and stage.add_object(close_up, 1.35, 2.0, 0.3)
    for _ in range(level.objects[0] + draws.integer(level.objects[1] - level.objects[0] + 1)):
        stage.add_object(draws.pick(KINDS), 1.9, 4.6, 0.85)
    for _ in range(level.occluders):
        stage.add_occluder()
    primitives = stage.structure + [solid for thing in stage.things for solid in thing.solids]
    return Scene(kind, seed, stage.aim(), light, stage.things, primitives, is_close)


def render(
    seed: int, height: int, width: int, difficulty: Level = "standard", *, identities: range = range(64)
) -> Sample:
    """Picture and labels of one seed.

    image uint8 [H, W, 3]; semseg, human_parts (255 everywhere without a person), edge, saliency uint8 [H, W];
    instance uint16 [H, W]; depth float32 [H, W] in meters along the axis, 0 = sky; normals float32 [H, W, 3],
    x right, y up, z to the camera, 0 = sky; scene int; attributes uint8 [10]; identities int64 [persons in
    view], largest first, each out of the range `identities`.
    """
    return trace(compose_scene(seed, difficulty, identities), height, width)


def trace(scene: Scene, height: int, width: int) -> Sample:
    """Render a scene; see `render`."""
    solids, camera = raycast.Solids(scene.primitives), scene.camera
    with np.errstate(divide="ignore", invalid="ignore"):  # rays that miss are NaN
        z, winner = raycast.cast(solids, camera, height, width)
        hits = raycast.resolve(solids, camera, z, winner)
        dark = raycast.cast_shadows(solids, hits, scene.light.direction)
    # Index -1, the sky, finds the appended zero.
    semseg, part, instance = (np.append(ids, ids[:1])[winner] for ids in solids.ids)
    area = np.bincount(instance.ravel(), minlength=len(scene.things) + 1)
    seen = (t for t in scene.things if area[t.instance])
    persons = sorted((-area[t.instance], t.identity) for t in seen if t.kind == "person")
    normals = np.zeros((height * width, 3), dtype=np.float32)
    normals[hits.pixel] = np.stack([dot(axis, hits.normal) for axis in camera.axes], axis=1) * (1, 1, -1)
    return {
        "image": expose(scene.light, shade(scene, hits, dark, (height, width)), scene.seed),
        "semseg": semseg,
        "human_parts": part if persons else np.full_like(part, 255),
        "instance": instance,
        "depth": np.where(winner >= 0, z, 0.0).astype(np.float32),
        "normals": normals.reshape(height, width, 3),
        "edge": find_edges(instance),
        "saliency": find_salient(scene, winner, instance),
        "scene": scene.kind,
        "attributes": describe(scene, area, sky=bool((winner < 0).any()), dark=int(dark.sum())),
        "identities": np.array([identity for _, identity in persons], dtype=np.int64),
    }


def find_edges(instance: Array) -> Array:
    """1 where the instance (hence perhaps the class) differs to the right or below: uint8 [H, W]."""
    edge = np.zeros(instance.shape, dtype=np.uint8)
    edge[:, :-1] |= instance[:, :-1] != instance[:, 1:]
    edge[:-1] |= instance[:-1] != instance[1:]
    return edge


def find_salient(scene: Scene, winner: Array, instance: Array) -> Array:
    """Large, central objects whose surfaces (unshaded, hence exact) stand out in color: uint8 [H, W]."""
    (height, width), solids = winner.shape, scene.primitives
    seen = np.bincount(winner.ravel() + 1, minlength=len(solids) + 1)  # sky first
    owner = np.array([0, *(p.instance for p in solids)])
    colors = np.array([scene.light.sky, *((p.surface.first, p.surface.second) for p in solids)])
    tint = np.rint(127.5 * (colors[:, 0] + colors[:, 1])).T  # whole numbers, whose sums are exact
    area = np.bincount(owner, weights=seen)
    color = np.stack([np.bincount(owner, weights=seen * channel) for channel in tint])
    count = np.maximum(area, 1.0)
    contrast = (color / count - color.sum(axis=1, keepdims=True) / area.sum()) / 255.0
    y, x = (np.bincount(instance.ravel(), c.ravel(), area.size) for c in np.indices((height, width)) + 0.5)
    x, y = x / (count * width) - 0.5, y / (count * height) - 0.5
    far = (x * x + y * y) / 0.1225
    bell = 1.0 / (1.0 + far * (1.0 + far * (0.5 + far / 6.0)))  # nearly exp(-far)
    score = np.sqrt(area) * bell * (0.25 + np.sqrt(dot(contrast, contrast)))
    score[0] = 0.0  # background
    score[area < SPECK * winner.size] = 0.0
    salient = (score >= 0.55 * score.max()) & (score > 0.0)
    return np.asarray(salient[instance].astype(np.uint8))


def describe(scene: Scene, area: Array, *, sky: bool, dark: int) -> Array:
    """The image-level flags of ATTRIBUTES: uint8 [10]; `area` counts the pixels of each instance."""
    seen = [t for t in scene.things if area[t.instance]]
    clear = [t for t in seen if area[t.instance] >= 0.5 * SPECK * area.sum()]
    kinds = {t.kind for t in seen}
    flags = (
        "person" in kinds, "robot" in kinds, len(clear) > 5, sky, scene.light.warm,
        scene.close_up, any(t.raised_arm and t.identity >= 0 for t in clear),
        any(t.kind in figures.ROUND for t in clear),
        dark > 0.12 * area.sum(), scene.primitives[0].surface.family not in figures.SMOOTH,
    )  # fmt: skip
    return np.array(flags, dtype=np.uint8)


def shade(scene: Scene, hits: Hits, dark: Array, shape: tuple[int, int]) -> Array:
    """Light as it reaches the film, float [H, W, 3] around [0, 1]: Lambert and Blinn, sky behind."""
    (height, width), camera, light = shape, scene.camera, scene.light
    right, up = camera.grid(height, width)
    elevation = camera.axes[0][1] * right + (camera.axes[1][1] * up + camera.axes[2][1])[:, None]
    horizon, zenith = np.array(light.sky, dtype=np.float32)
    image = horizon + (zenith - horizon) * np.clip(2.0 * elevation, 0.0, 1.0).reshape(-1, 1)
    half = np.array(light.direction)[:, None] - hits.ray / np.sqrt(dot(hits.ray, hits.ray))
    glint = np.maximum(dot(hits.normal, half), 0.0) / np.sqrt(dot(half, half))
    sun = np.where(dark, 0.0, dot(hits.normal, light.direction)) * np.array(light.sun)[:, None]
    # A little more ambient light from above keeps the faces of a box apart in the shade.
    ambient = light.ambient * (0.85 + 0.15 * hits.normal[1])
    albedo = texture(scene, hits, 2.0 * camera.slope / width)
    image[hits.pixel] = (albedo * (ambient + sun) + np.where(dark, 0.0, 0.25 * glint**24)).T
    return np.asarray(image.reshape(height, width, 3))


def texture(scene: Scene, hits: Hits, pixel: float) -> Array:
    """Surface colors [3, N]; cells under a `pixel` (radians) fade to their mean, so they do not alias."""
    rows = [(*s[:2], *s.phase, s.tilt, *s.first, *s.second) for s in (p.surface for p in scene.primitives)]
    table = np.array(rows, dtype=np.float32).T.take(hits.solid, axis=1)
    family, frequency, tilt, first, second = table[0], table[1], table[4], table[5:8], table[8:]
    u, v = hits.uv.astype(np.float32) * frequency + table[2:4]
    v = v + tilt * u
    mix = np.zeros_like(u)
    for index, pattern in enumerate(figures.FAMILIES.values()):
        chosen = np.flatnonzero(family == index)
        mix[chosen] = pattern(u[chosen], v[chosen])
    cells = frequency * (hits.depth * pixel / np.maximum(hits.cosine, 0.05)).astype(np.float32)
    mix = 0.5 + (mix - 0.5) * np.clip(1.6 - 1.6 * cells, 0.0, 1.0)
    return np.asarray(first + (second - first) * mix)


def expose(light: Light, image: Array, seed: int) -> Array:
    """Gamma, vignette and noise of the film: uint8 [H, W, 3]."""
    y, x = (np.linspace(-1.0, 1.0, n, dtype=np.float32) for n in image.shape[:2])
    falloff = 1.0 - 0.5 * light.vignette * (x * x + (y * y)[:, None])
    grain = np.random.Generator(np.random.PCG64(seed)).standard_normal(image.shape, dtype=np.float32)
    film = np.clip(image.astype(np.float32), 0.0, 1.0) ** light.gamma * falloff[..., None]
    return np.asarray(np.clip(255.0 * (film + light.noise * grain) + 0.5, 0.0, 255.0).astype(np.uint8))
