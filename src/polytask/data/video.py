"""Clips in the rooms: a moving camera and one or two persons who walk."""

from __future__ import annotations

from polytask.data.figures import Draws, Palette, Thing, compose, sine_cosine, turn_y
from polytask.data.raycast import Camera
from polytask.data.scenes import FIGURES, KINDS, LEVELS, SCENES, Level, Light, Scene, Stage

FRAMES = 32  # of a clip
STILL = tuple(kind for kind in KINDS if kind not in FIGURES)
HALF_TURN = 3.141592653589793


class _Gait(Draws):
    """Stands in for chance where a figure draws its pose: the numbers of one moment of a walk."""

    def __init__(self, steps: float) -> None:
        sine, cosine = sine_cosine(HALF_TURN * (1.0 - 2.0 * (steps % 1.0)))
        swing, knee = 0.5 + 0.45 * sine, 0.5 + 0.4 * cosine
        left, right = (0.9, 1.0 - swing, 0.3, 0.75, 1.0, knee), (0.9, swing, 0.3, 0.75, 1.0, 1.0 - knee)
        self._numbers = iter((0.5, swing, *left, *right))  # lean, stride, then arm and leg per side

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * next(self._numbers)


def compose_frame(seed: int, frame: int, difficulty: Level = "standard") -> Scene:
    """The scene of a clip at a moment, 0 to FRAMES - 1: what stands still is the same in all of them."""
    stage, moment = Stage(seed, LEVELS[difficulty], range(64)), frame / FRAMES - 0.5
    draws = stage.draws
    kind, light = draws.integer(len(SCENES)), Light.draw(draws, stage.level)
    stage.set_view(close_figure=False, to_the_left=SCENES[kind] == "corner")
    stage.build(SCENES[kind])
    lanes = [2.4 + 0.8 * walker + draws.uniform(0.0, 0.3) for walker in range(1 + draws.integer(2))]
    for _ in range(3 + draws.integer(3)):
        stage.add_object(draws.pick(STILL), lanes[-1] + 0.7, lanes[-1] + 2.2, 0.85)
    for distance in lanes:
        _add_walker(stage, distance, moment)
    still, phase, (x, y, z) = stage.aim(), draws.uniform(), stage.eye
    sine, cosine = sine_cosine(HALF_TURN * (2.0 * ((moment + phase) % 1.0) - 1.0))
    eye = x + 0.12 * sine, y + 0.03 * cosine, z + 0.2 * moment
    camera = Camera(eye, compose(turn_y(0.04 * cosine), still.axes), still.slope)
    solids = stage.structure + [solid for thing in stage.things for solid in thing.solids]
    return Scene(kind, seed * FRAMES + frame, camera, light, stage.things, solids, False)


def _add_walker(stage: Stage, distance: float, moment: float) -> None:
    """A person who crosses the view at a distance; `moment` is -0.5 at the beginning, 0.5 at the end."""
    draws = stage.draws
    size, path, phase = draws.uniform(1.45, 1.9), draws.uniform(0.8, 1.4), draws.uniform()
    identity, side = draws.pick(stage.identities), draws.pick((-1.0, 1.0))
    x, _, z = stage.ahead(draws.uniform(-0.3, 0.3), distance)
    spot = x + side * path * moment, 0.0, z
    thing = Thing("person", len(stage.things) + 1, spot, side * 0.5 * HALF_TURN, size)
    thing.identity = identity
    thing.build(_Gait(phase + path * moment / (0.8 * size)), Palette())  # a double step is as long as that
    stage.things.append(thing)
    stage.heads.append((distance - 0.3, 1.04 * size - stage.eye[1]))
