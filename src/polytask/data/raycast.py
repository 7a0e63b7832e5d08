"""Analytic ray casting of a few convex solids: exact depth, normals, ids and shadows.

Every solid is an affine image of a unit shape, so rays are intersected in the solid's own unit frame.
All arithmetic is float64 with + - * / sqrt and comparisons, one element at a time: these are correctly
rounded everywhere, so results are bit-identical across machines (no dot or einsum: BLAS is not).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Vector: TypeAlias = tuple[float, float, float]
Frame: TypeAlias = tuple[Vector, Vector, Vector]  # three axes, each in coordinates of the parent frame
Array: TypeAlias = NDArray[Any]
Triple: TypeAlias = Sequence[Any] | Array  # x, y, z: scalars or arrays that broadcast
Pair: TypeAlias = tuple[Array, Array]

NEAR, FAR = 0.05, 60.0  # meters; what lies beyond is sky
SHADOW_OFFSET = 0.01  # meters along the normal
ON_CAP = 1.0 - 1e-9  # |y| of a hit on the flat end of a unit cylinder or cone


class Shape(IntEnum):
    """Unit shapes around the origin; the y axis is the axis of symmetry."""

    PLANE = 0
    BOX = 1
    ELLIPSOID = 2
    CAPSULE = 3
    CYLINDER = 4
    CONE = 5


class Surface(NamedTuple):
    """Two-color texture in the solid's own frame; `frequency` in cells per meter."""

    family: int  # index into figures.FAMILIES
    frequency: float
    phase: tuple[float, float]
    tilt: float
    first: Vector
    second: Vector


class Primitive(NamedTuple):
    """One solid: `half` holds the half extents along its `axes` in meters (caps of a capsule included)."""

    shape: Shape
    center: Vector
    axes: Frame
    half: Vector
    surface: Surface
    label: int = 0
    instance: int = 0
    part: int = 0


class Camera(NamedTuple):
    """Pin-hole camera: `axes` are right, up, forward; `slope` is the tangent of half the horizontal view."""

    position: Vector
    axes: Frame
    slope: float

    def grid(self, height: int, width: int) -> tuple[Array, Array]:
        """Ray slopes through the pixel centers: right [W] and up [H]; the third component is 1."""
        pixel = self.slope / width
        right = (2.0 * np.arange(width) + 1.0 - width) * pixel
        up = (height - 1.0 - 2.0 * np.arange(height)) * pixel
        return right, up


class Hits(NamedTuple):
    """What the N non-sky pixels see; vectors are [3, N]."""

    pixel: Array  # flat index
    solid: Array
    depth: Array
    point: Array  # world
    normal: Array  # world, unit length, towards the camera
    ray: Array  # world, from the camera, one meter deep
    cosine: Array  # between normal and view direction
    uv: Array  # [2, N] meters on the surface


def mirror(point: Vector, axes: Frame) -> tuple[Vector, Frame]:
    """Reflect a point and a frame at x = 0; also the frame's own x axis, so that it stays a rotation."""
    (a, b, c), (d, e, f), (g, h, i) = axes
    return (-point[0], point[1], point[2]), ((a, -b, -c), (-d, e, f), (-g, h, i))


def dot(a: Triple, b: Triple) -> Any:
    """Inner product in a fixed order of additions."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def combine(axes: Triple, v: Triple) -> tuple[Any, Any, Any]:
    """Leave a frame: axes[0] v[0] + axes[1] v[1] + axes[2] v[2]."""
    (a, b, c), (x, y, z) = axes, v
    return a[0] * x + b[0] * y + c[0] * z, a[1] * x + b[1] * y + c[1] * z, a[2] * x + b[2] * y + c[2] * z


# Entry distance of rays o + t d into unit shapes; NaN where they miss. Either o or d may be scalars.


def hit_plane(o: Triple, d: Triple, _reach: Array) -> Array:
    return np.asarray(-o[1] / d[1])


def hit_box(o: Triple, d: Triple, _reach: Array) -> Array:
    near, far = slab(o[0], d[0])
    for axis in (1, 2):
        enter, leave = slab(o[axis], d[axis])
        near, far = np.maximum(near, enter), np.minimum(far, leave)
    return np.where(near <= far, near, np.nan)


def slab(o: Array, d: Array) -> Pair:
    """Ray parameters at which one coordinate is -1 or 1, in order."""
    inverse = 1.0 / d
    middle, spread = -o * inverse, np.abs(inverse)
    return middle - spread, middle + spread


def hit_ellipsoid(o: Triple, d: Triple, _reach: Array) -> Array:
    return first_root(dot(d, d), dot(o, d), dot(o, o) - 1.0)


def first_root(a: Array, b: Array, c: Array) -> Array:
    """Smaller root of a t² + 2 b t + c for positive a."""
    return np.asarray((-b - np.sqrt(b * b - a * c)) / a)


def hit_cylinder(o: Triple, d: Triple, _reach: Array) -> Array:
    a, b, c = radial(o, d)
    root = np.sqrt(b * b - a * c)
    enter, leave = slab(o[1], d[1])
    near, far = np.maximum((-b - root) / a, enter), np.minimum((root - b) / a, leave)
    return np.where(near <= far, near, np.nan)


def radial(o: Triple, d: Triple) -> tuple[Array, Array, Array]:
    """Coefficients a, b, c of x² + z² - 1 along the ray."""
    return d[0] * d[0] + d[2] * d[2], o[0] * d[0] + o[2] * d[2], o[0] * o[0] + o[2] * o[2] - 1.0


def hit_capsule(o: Triple, d: Triple, reach: Array) -> Array:
    a, b, c = radial(o, d)
    side = first_root(a, b, c)
    y = o[1] + side * d[1]
    # Past the straight part the ray can only enter the ball at that end.
    offset = o[1] - np.copysign(reach, y)
    ball = first_root(a + d[1] * d[1], b + offset * d[1], c + offset * offset)
    return np.where(np.abs(y) <= reach, side, ball)


def hit_cone(o: Triple, d: Triple, _reach: Array) -> Array:
    q, dq = 0.5 - 0.5 * o[1], -0.5 * d[1]  # radius of the cone at the ray's height
    a, b, c = radial(o, d)
    a, b, c = a - dq * dq, b - q * dq, c + 1.0 - q * q
    root = np.sqrt(b * b - a * c)
    base = (-1.0 - o[1]) / d[1]
    x, z = o[0] + base * d[0], o[2] + base * d[2]
    best = np.where(x * x + z * z <= 1.0, base, np.nan)
    for side in ((-b - root) / a, (root - b) / a):
        best = np.fmin(best, np.where(np.abs(o[1] + side * d[1]) <= 1.0, side, np.nan))
    return best


INTERSECTIONS: tuple[Callable[[Triple, Triple, Any], Array], ...]
INTERSECTIONS = (hit_plane, hit_box, hit_ellipsoid, hit_capsule, hit_cylinder, hit_cone)  # by Shape


def unit_normal(shape: int, p: Array, reach: Array) -> Array:
    """Outward gradient [3, N] of a unit shape at surface points p [3, N]; any length."""
    x, y, z = p
    zero, one = np.zeros_like(y), np.ones_like(y)
    if shape == Shape.PLANE:
        return np.stack((zero, one, zero))
    if shape == Shape.BOX:
        size = np.abs(p)
        return np.where(size == size.max(axis=0), np.sign(p), 0.0)
    if shape == Shape.CAPSULE:
        return np.stack((x, y - np.minimum(np.maximum(y, -reach), reach), z))
    if shape == Shape.CYLINDER:
        return np.where(np.abs(y) >= ON_CAP, np.stack((zero, y, zero)), np.stack((x, zero, z)))
    if shape == Shape.CONE:
        return np.where(y <= -ON_CAP, np.stack((zero, -one, zero)), np.stack((x, 0.25 - 0.25 * y, z)))
    return p


class Solids:
    """Primitives as arrays [..., P], ready to be hit by rays."""

    def __init__(self, primitives: Sequence[Primitive]) -> None:
        self.shape = np.array([p.shape for p in primitives], dtype=np.int8)
        self.instance = np.array([p.instance for p in primitives], dtype=np.uint16)
        label, part = np.array([(p.label, p.part) for p in primitives], dtype=np.uint8).T
        self.ids = label, part, self.instance
        self.center = np.array([p.center for p in primitives]).T
        self.half = np.array([p.half for p in primitives]).T
        self.axes = np.array([p.axes for p in primitives]).transpose(1, 2, 0)  # [local axis, world xyz, P]
        self.scale = self.half.copy()
        capsule = self.shape == Shape.CAPSULE  # its caps are round: one unit is the radius, also along y
        self.scale[1, capsule] = self.half[0, capsule]
        self.reach = np.where(capsule, self.half[1] / self.scale[1] - 1.0, 0.0)
        self.inverse = self.axes / self.scale[:, None]  # rows of the map into the unit frame

    def enter(self, vector: Triple, solid: Array | None = None) -> list[Any]:
        """World direction into the unit frames of the solids indexed, by default of all."""
        # `take` keeps components contiguous, which fancy indexing would not.
        inverse = self.inverse if solid is None else self.inverse.take(solid, axis=2)
        return [dot(rows, vector) for rows in inverse]

    def enter_point(self, point: Triple, solid: Array | None = None) -> list[Any]:
        """World position into the unit frames of the solids indexed, by default of all."""
        center = self.center if solid is None else self.center.take(solid, axis=1)
        return self.enter([point[i] - center[i] for i in range(3)], solid)

    def extent(self, direction: Vector) -> Pair:
        """Lowest and highest coordinate of each solid's box along a direction: two arrays [P]."""
        middle = dot(direction, self.center)
        spread = dot([np.abs(dot(axis, direction)) for axis in self.axes], self.half)
        return middle - spread, middle + spread


def cast(solids: Solids, camera: Camera, height: int, width: int) -> tuple[Array, Array]:
    """Z-buffer of depth [H, W] in meters and index of the solid seen [H, W], -1 for sky."""
    right, up = camera.grid(height, width)
    depth = np.full((height, width), FAR)
    winner = np.full((height, width), -1, dtype=np.int16)
    slopes = np.array([solids.enter(axis) for axis in camera.axes]).transpose(2, 1, 0).tolist()
    origins = np.array(solids.enter_point(camera.position)).T.tolist()
    windows = screen_windows(solids, camera, height, width).tolist()
    for k, (top, bottom, left, end) in enumerate(windows):
        if top >= bottom or left >= end:
            continue
        window = slice(top, bottom), slice(left, end)
        rows, columns = up[top:bottom, None], right[left:end]
        direction = [a * columns + (b * rows + c) for a, b, c in slopes[k]]
        t = INTERSECTIONS[solids.shape[k]](origins[k], direction, solids.reach[k])
        closer = (t < depth[window]) & (t > NEAR)
        np.copyto(depth[window], t, where=closer)
        np.copyto(winner[window], k, where=closer)
    return depth, winner


def screen_windows(solids: Solids, camera: Camera, height: int, width: int) -> Array:
    """Pixel windows (top, bottom, left, right) that hold each solid: int [P, 4]."""
    signs = np.array([(i, j, k) for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)]).T  # [3, 8]
    spread = combine(solids.axes[:, :, None, :], signs[:, :, None] * solids.half[:, None, :])
    corner = [spread[i] + (solids.center[i] - camera.position[i]) for i in range(3)]
    x, y, z = (dot(axis, corner) for axis in camera.axes)
    pixels = 0.5 * width / (camera.slope * np.maximum(z, NEAR))
    columns, rows = 0.5 * width + x * pixels, 0.5 * height - y * pixels
    box = np.stack((rows.min(axis=0), rows.max(axis=0), columns.min(axis=0), columns.max(axis=0)), axis=1)
    box += (-1.0, 2.0, -1.0, 2.0)
    plane = solids.shape == Shape.PLANE
    box[plane | (z.min(axis=0) < NEAR)] = 0, height, 0, width
    box[~plane & (z.max(axis=0) < NEAR)] = 0.0
    return np.asarray(np.clip(box, 0, (height, height, width, width)).astype(np.int64))


def resolve(solids: Solids, camera: Camera, depth: Array, winner: Array) -> Hits:
    """Points, normals and surface coordinates of all pixels that see a solid."""
    height, width = depth.shape
    pixel = np.flatnonzero(winner >= 0)
    solid, z = winner.ravel()[pixel], depth.ravel()[pixel]
    right, up = camera.grid(height, width)
    ray = np.stack(combine(camera.axes, (right[pixel % width], up[pixel // width], 1.0)))
    point = ray * z + np.array(camera.position)[:, None]
    local = np.stack(solids.enter_point(point, solid))
    gradient = local_normals(solids, solid, local)
    normal = np.stack(combine(solids.inverse.take(solid, axis=2), gradient))
    normal /= np.sqrt(dot(normal, normal))
    cosine = -dot(normal, ray) / np.sqrt(dot(ray, ray))
    normal *= np.where(cosine < 0.0, -1.0, 1.0)  # planes are seen from either side
    uv = surface_coordinates(local * solids.scale.take(solid, axis=1), np.abs(gradient))
    return Hits(pixel, solid, z, point, normal, ray, np.abs(cosine), uv)


def local_normals(solids: Solids, solid: Array, local: Array) -> Array:
    """Gradients [3, N] in unit frames at the local points [3, N]."""
    gradient = np.empty_like(local)
    shape = solids.shape[solid]
    for kind in Shape:
        chosen = np.flatnonzero(shape == kind)
        if chosen.size:
            gradient[:, chosen] = unit_normal(kind, local.take(chosen, axis=1), solids.reach[solid[chosen]])
    return gradient


def surface_coordinates(local: Array, facing: Array) -> Array:
    """Drop the axis a surface faces most: [2, N] meters out of local points [3, N]."""
    x, y, z = local
    along_x = facing[0] > np.maximum(facing[1], facing[2])
    along_y = facing[1] > np.maximum(facing[0], facing[2])
    return np.stack((np.where(along_x, z, x), np.where(along_y, z, y)))


def cast_shadows(solids: Solids, hits: Hits, direction: Vector) -> Array:
    """Whether a solid stands between each hit and the sun: bool [N]; surfaces turned away count as dark."""
    dark = np.asarray(dot(hits.normal, direction) <= 0.0)
    lit = np.flatnonzero(~dark)
    start = hits.point.take(lit, axis=1) + SHADOW_OFFSET * hits.normal.take(lit, axis=1)
    caster, receiver = shadow_candidates(solids, start, direction)
    foreign = caster != hits.solid[lit[receiver]]  # convex solids never shade their own lit side
    caster, receiver = caster[foreign], receiver[foreign]
    rays = np.stack(solids.enter(direction))
    for kind in Shape:
        chosen = np.flatnonzero(solids.shape[caster] == kind)
        solid = caster[chosen]
        origin = solids.enter_point(start.take(receiver[chosen], axis=1), solid)
        blocked = INTERSECTIONS[kind](origin, rays.take(solid, axis=1), solids.reach[solid]) > 0.0
        dark[lit[receiver[chosen[blocked]]]] = True
    return dark


def shadow_candidates(solids: Solids, start: Array, direction: Vector) -> tuple[Array, Array]:
    """Pairs (solid, column of start) whose boxes overlap when seen from the sun; planes cast no shadow."""
    side, over = across(direction)
    coordinates = dot(side, start), dot(over, start), dot(direction, start)
    bounds = [solids.extent(axis) for axis in (side, over, direction)]
    none = np.zeros(0, dtype=np.intp)
    pairs: list[Pair] = [(none, none)]
    solid = solids.shape != Shape.PLANE
    for instance in np.unique(solids.instance[solid]):
        group = np.flatnonzero(solid & (solids.instance == instance))
        (u0, u1), (v0, v1), (_, w1) = [(low[group], high[group]) for low, high in bounds]
        u, v, w = coordinates
        near = (u > u0.min()) & (u < u1.max()) & (v > v0.min()) & (v < v1.max()) & (w < w1.max())
        some = np.flatnonzero(near)
        u, v, w = (c[some] for c in coordinates)
        u0, u1, v0, v1, w1 = (bound[:, None] for bound in (u0, u1, v0, v1, w1))
        row, column = np.nonzero((u > u0) & (u < u1) & (v > v0) & (v < v1) & (w < w1))
        pairs.append((group[row], some[column]))
    return np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs])


def across(direction: Vector) -> tuple[Vector, Vector]:
    """Two unit vectors that span the plane perpendicular to a direction that is not vertical."""
    x, y, z = direction
    length = float(np.sqrt(x * x + z * z))
    side = (z / length, 0.0, -x / length)
    return side, (y * side[2], z * side[0] - x * side[2], -y * side[0])
