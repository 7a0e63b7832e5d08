"""One decision about geometry, carried out on the image and on all maps of a sample.

Crops are taken from the photo before anything is resized, so that only the pixels that stay are touched.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from polytask.data.maps import Image, ValueMap, VectorMap, like, nearest, pick, plain, pointing, unit


class Span(NamedTuple):
    """One axis of a window: which pixels of the photo are seen, and where in the frame."""

    start: int  # first pixel of the photo
    stop: int  # one past the last
    length: int  # pixels of the frame that they fill
    before: int  # pixels of the frame that are empty before them
    total: int  # length of the frame

    @property
    def seen(self) -> slice:
        """Where in the photo."""
        return slice(self.start, self.stop)

    @property
    def filled(self) -> slice:
        """Where in the frame."""
        return slice(self.before, self.before + self.length)


class Window(NamedTuple):
    """A part of the photo, magnified, perhaps mirrored, and laid into a frame."""

    rows: Span
    columns: Span
    zoom: float = 1.0  # what meters are divided by
    mirrored: bool = False
    aligned: bool = False  # corners, in interpolation, also of vectors; labels by upper left corners

    def image(self, image: Tensor) -> Tensor:
        """The filled part of the frame, ``[3, h, w]`` of the image's type, bilinear.

        Antialiased only below half the size, so that scales down to 0.5 are those of the released codes.
        """
        seen, size = image[:, self.rows.seen, self.columns.seen], (self.rows.length, self.columns.length)
        if seen.shape[-2:] != size:
            how = {"align_corners": self.aligned, "antialias": seen.shape[-2] > 2 * size[0]}
            seen = functional.interpolate(seen[None], size, mode="bilinear", **how)[0]
        return seen.flip(-1) if self.mirrored else seen

    def map(self, value: Any) -> Any:
        """A map in the frame, invalid around; nearest, so that no value is made up."""
        sheet = plain(value)
        smooth = isinstance(value, VectorMap) and self.aligned
        shown = unit(self.image(sheet), self._nearest(pointing(sheet))) if smooth else self._nearest(sheet)
        if isinstance(value, VectorMap):
            shown = unit(shown)
            shown[0] *= -1 if self.mirrored else 1
        elif isinstance(value, ValueMap):
            shown /= value.divisor(self.zoom)
        return like(self.lay(shown, value.FILL), value)

    def lay(self, shown: Tensor, fill: float | Tensor) -> Tensor:
        """``[C, h, w]`` in its place in the frame ``[C, H, W]``, which is ``fill`` elsewhere."""
        size = self.rows.total, self.columns.total
        if shown.shape[-2:] == size:
            return shown
        frame = torch.as_tensor(fill, dtype=shown.dtype).expand(len(shown), *size).clone()
        frame[:, self.rows.filled, self.columns.filled] = shown
        return frame

    def _nearest(self, sheet: Tensor) -> Tensor:
        rows, columns = (
            axis.start + nearest(axis.stop - axis.start, axis.length, self.aligned) for axis in self[:2]
        )
        return pick(sheet, rows, columns[::-1] if self.mirrored else columns)


def turn(
    value: Any,
    degrees: float,
    zoom: float,
    size: tuple[int, int] | None = None,
    *,
    border: int | None = None,
    corner: bool = False,
) -> Any:
    """Rotate counter-clockwise and magnify about the center, the frame staying as it is; then stretch.

    Both steps are one: nothing is sampled twice. Vectors move with their pixels but keep their direction
    (see ``spin``). Image and vectors are cubic, the rest nearest; what lies outside the photo is black or
    invalid.

    Args:
        value: ``Image``, ``ClassMap``, ``ValueMap`` or ``VectorMap``.
        degrees: counter-clockwise, as seen.
        zoom: above 1 magnifies.
        size: height and width of the result, if another than that of ``value``.
        corner: labels are picked in two steps, by upper left corners in the second, as OpenCV does.
        border: class that fills a ``ClassMap`` outside the photo; 255 if not given.
    """
    sheet = plain(value)
    photo = (sheet.shape[-2], sheet.shape[-1])
    grid, pixel, outside = _origin(photo, size or photo, degrees, zoom, corner)
    if isinstance(value, (Image, VectorMap)):
        cubic = functional.grid_sample(sheet[None].float(), grid[None], mode="bicubic", align_corners=False)[
            0
        ]
        if isinstance(value, Image):
            return like(cubic.clamp_(0, 255), value)
        sheet = pointing(sheet)
    found = torch.from_numpy(sheet.flatten(1).numpy().take(pixel, 1))
    if isinstance(value, VectorMap):
        return like(unit(cubic, found & ~outside), value)
    found[:, outside] = value.FILL if border is None or isinstance(value, ValueMap) else border
    if isinstance(value, ValueMap):
        found /= value.divisor(zoom)
    return like(found, value)


@lru_cache(maxsize=1)  # the maps of a sample turn together
def _origin(
    photo: tuple[int, int], size: tuple[int, int], degrees: float, zoom: float, corner: bool
) -> tuple[Tensor, np.ndarray, Tensor]:
    """Where each pixel of a turned and stretched sheet comes from.

    Returns:
        grid ``[H, W, 2]`` of x and y in -1..1, index of the nearest pixel, and whether there is none.
    """
    (height, width), axes = photo, list(zip(photo, size, strict=True))
    c, s = math.cos(math.radians(degrees)) / zoom, math.sin(math.radians(degrees)) / zoom
    cy, cx = (height - 1) / 2, (width - 1) / 2

    def source(y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        y, x = (y - cy)[:, None], x - cx
        return s * x + c * y + cy, c * x - s * y + cx

    exact = [(np.arange(new) + 0.5) * (old / new) - 0.5 for old, new in axes]
    y, x = source(*exact)
    grid = np.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), -1, dtype=np.float32)
    if corner:
        y, x = source(*(nearest(old, new, corner) for old, new in axes))
    row, column = np.rint(y).astype(np.intp), np.rint(x).astype(np.intp)
    outside = (column < 0) | (column >= width) | (row < 0) | (row >= height)
    pixel = np.where(outside, 0, row * width + column)
    return torch.from_numpy(grid), pixel, torch.from_numpy(outside)
