"""Label maps that know how geometry acts on their values, as tv_tensors, so that v2 transforms compose.

================  =====================  =========  =========================================
type              tensor                 invalid    under geometry
================  =====================  =========  =========================================
``ClassMap``      int64 ``[1, H, W]``    255        nearest
``ValueMap``      float32 ``[1, H, W]``  0          nearest; divided by the zoom factor
``VectorMap``     float32 ``[3, H, W]``  (0, 0, 0)  cubic, unit length again; turn with the image
================  =====================  =========  =========================================

Whatever fill a transform asks for, a map is filled with its own invalid value. ``resize`` stretches the
whole frame and is no zoom; ``affine`` (scale) and ``resized_crop`` are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import functional as kernels
from torchvision.tv_tensors import Image, Mask

IGNORE = 255


class DenseMap(Mask):  # type: ignore[misc]  # torchvision has no types
    """Base of the three map types; a sheet of values ``[channels, H, W]`` beside the image."""

    FILL: ClassVar[int]
    CHANNELS: ClassVar[int]
    DTYPE: ClassVar[torch.dtype]

    @classmethod
    def _sheet(cls, data: Any) -> Any:
        sheet = torch.as_tensor(data).to(cls.DTYPE)
        if sheet.ndim == 2 and cls.CHANNELS == 1:
            sheet = sheet[None]
        if sheet.ndim != 3 or sheet.shape[0] != cls.CHANNELS:
            raise ValueError(f"{cls.__name__} takes [{cls.CHANNELS}, H, W], got {list(sheet.shape)}")
        return sheet.as_subclass(cls)

    @classmethod
    def wrap(cls, wrappee: Tensor, like: Any, **_: Any) -> Any:
        """``wrappee`` as a map of the type of ``like``, with its marks."""
        wrapped = wrappee.as_subclass(type(like))
        wrapped.__dict__.update(like.__dict__)
        return wrapped


class ClassMap(DenseMap):
    """Class indices, int64 ``[1, H, W]`` (``[H, W]`` is accepted), 255 = ignore.

    Args:
        data: anything ``torch.as_tensor`` takes.
        empty_is_ignored: a map without any class but 0 says nothing and becomes 255 all over.
    """

    FILL, CHANNELS, DTYPE = IGNORE, 1, torch.int64
    empty_is_ignored: bool = False

    def __new__(cls, data: Any, *, empty_is_ignored: bool = False) -> ClassMap:
        made = cls._sheet(data)
        if empty_is_ignored:
            made.empty_is_ignored = True
        return made  # type: ignore[no-any-return]


class ValueMap(DenseMap):
    """Positive quantities such as meters, float32 ``[1, H, W]`` (``[H, W]`` is accepted), 0 = invalid.

    Args:
        data: anything ``torch.as_tensor`` takes.
        scales_with_zoom: whether magnifying by z divides the values by z, as depth does.
    """

    FILL, CHANNELS, DTYPE = 0, 1, torch.float32
    scales_with_zoom: bool = True

    def __new__(cls, data: Any, *, scales_with_zoom: bool = True) -> ValueMap:
        made = cls._sheet(data)
        if not scales_with_zoom:
            made.scales_with_zoom = False
        return made  # type: ignore[no-any-return]


class VectorMap(DenseMap):
    """Unit vectors, float32 ``[3, H, W]``: x right, y up, z to the camera; (0, 0, 0) = invalid."""

    FILL, CHANNELS, DTYPE = 0, 3, torch.float32

    def __new__(cls, data: Any) -> VectorMap:
        return cls._sheet(data)  # type: ignore[no-any-return]


def plain(value: Tensor) -> Tensor:
    """The same storage without the tv_tensor type."""
    return value.as_subclass(Tensor)


def _like(tensor: Tensor, value: Any) -> Any:
    return value.wrap(tensor, value) if isinstance(value, DenseMap) else tensor.as_subclass(type(value))


def unit(vectors: Tensor, valid: Tensor | None = None) -> Tensor:
    """Vectors ``[3, H, W]`` of length one; those of length zero, or not in ``valid``, become zero."""
    x, y, z = vectors
    length = (x * x + y * y + z * z).sqrt()[None]
    keep = length > 0 if valid is None else (length > 0) & valid
    units: Tensor = torch.where(keep, vectors / length.clamp_min(1e-12), 0.0)
    return units


def pointing(vectors: Tensor) -> Tensor:
    """Which of the vectors ``[3, H, W]`` are not zero, boolean ``[1, H, W]``."""
    present: Tensor = vectors != 0
    x, y, z = present
    found: Tensor = x | y | z
    return found[None]


def spin(vectors: Tensor, degrees: float) -> Tensor:
    """Turn x and y of ``[3, H, W]`` counter-clockwise, as seen in the picture (x right, y up)."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y, z = vectors
    return torch.stack((c * x - s * y, s * x + c * y, z))


# --- stretching and turning ------------------------------------------------------------------------


def stretch(value: Any, size: tuple[int, int], *, corner: bool = False) -> Any:
    """Resize an image or map to ``(H, W)``: image (clipped to 0..255) and vectors cubic, the rest nearest.

    Args:
        value: ``Image``, ``ClassMap``, ``ValueMap`` or ``VectorMap``.
        size: height and width of the result.
        corner: nearest by the upper left corners of pixels, as OpenCV does, instead of their centers.
    """
    sheet = plain(value)
    if isinstance(value, (ClassMap, ValueMap)):
        return _like(_pick(sheet, size, corner), value)
    same = tuple(sheet.shape[-2:]) == tuple(size)
    cubic = sheet.float() if same else functional.interpolate(sheet[None].float(), size, mode="bicubic")[0]
    if isinstance(value, VectorMap):
        return _like(unit(cubic, _pick(pointing(sheet), size, corner)), value)
    return _like(cubic.clamp(0, 255), value)


def _pick(sheet: Tensor, size: tuple[int, int], corner: bool) -> Tensor:
    rows, columns = (
        torch.arange(new) * old // new if corner else (2 * torch.arange(new) + 1) * old // (2 * new)
        for old, new in zip(sheet.shape[-2:], size, strict=True)
    )
    return sheet[:, rows][:, :, columns]


def turn(value: Any, degrees: float, zoom: float, *, border: int | None = None) -> Any:
    """Rotate counter-clockwise and magnify about the center, the frame staying as it is.

    Vectors move with their pixels but keep their direction (see ``spin``). Image and vectors are cubic,
    the rest nearest; what lies outside the photo is black or invalid.

    Args:
        value: ``Image``, ``ClassMap``, ``ValueMap`` or ``VectorMap``.
        degrees: counter-clockwise, as seen.
        zoom: above 1 magnifies.
        border: class that fills a ``ClassMap`` outside the photo; 255 if not given.
    """
    sheet = plain(value)
    origin = _origin(sheet.shape[-2], sheet.shape[-1], degrees, zoom)
    if isinstance(value, ClassMap):
        return _like(origin.nearest(sheet, IGNORE if border is None else border), value)
    if isinstance(value, ValueMap):
        return _like(origin.nearest(sheet, 0) / (zoom if value.scales_with_zoom else 1.0), value)
    cubic = origin.cubic(sheet.float())
    if isinstance(value, VectorMap):
        return _like(unit(cubic, origin.nearest(pointing(sheet), 0)), value)
    return _like(cubic.clamp(0, 255), value)


class _Origin(NamedTuple):
    """For every pixel of a turned sheet, where it comes from."""

    grid: Tensor  # [H, W, 2], x and y in -1..1
    pixel: Tensor  # [H * W], index of the nearest one
    inside: Tensor  # [H, W], whether there is one

    def nearest(self, sheet: Tensor, fill: int) -> Tensor:
        found = sheet.flatten(1).index_select(1, self.pixel).view(sheet.shape)
        return torch.where(self.inside, found, torch.tensor(fill, dtype=sheet.dtype))

    def cubic(self, sheet: Tensor) -> Tensor:
        return functional.grid_sample(sheet[None], self.grid[None], mode="bicubic", align_corners=False)[0]


@lru_cache(maxsize=1)  # the maps of a sample turn together
def _origin(height: int, width: int, degrees: float, zoom: float) -> _Origin:
    c, s = math.cos(math.radians(degrees)) / zoom, math.sin(math.radians(degrees)) / zoom
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    cy, cx = (height - 1) / 2, (width - 1) / 2
    x, y = x - cx, y - cy
    x, y = c * x - s * y + cx, s * x + c * y + cy
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), -1)
    column, row = x.round().long(), y.round().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    pixel = row.clamp_(0, height - 1) * width + column.clamp_(0, width - 1)
    return _Origin(grid, pixel.flatten(), inside)


# --- kernels for the v2 transforms -----------------------------------------------------------------


def _flip_vectors(value: VectorMap) -> Any:
    return _like(plain(value).flip(-1) * torch.tensor([-1.0, 1.0, 1.0])[:, None, None], value)


def _flip_vectors_over(value: VectorMap) -> Any:
    return _like(plain(value).flip(-2) * torch.tensor([1.0, -1.0, 1.0])[:, None, None], value)


def _resize(value: DenseMap, size: list[int] | None, max_size: int | None = None, **_: Any) -> Any:
    sketch = torch.empty((1, *value.shape[-2:]), device="meta")  # torchvision's rule for partial sizes
    height, width = kernels.resize_mask(sketch, size, max_size=max_size).shape[-2:]
    return stretch(value, (height, width))


def _crop(value: DenseMap, top: int, left: int, height: int, width: int) -> Any:
    below, beyond = top + height - value.shape[-2], left + width - value.shape[-1]
    margins = (max(-left, 0), max(beyond, 0), max(-top, 0), max(below, 0))
    padded = functional.pad(plain(value), margins, value=value.FILL)
    top, left = max(top, 0), max(left, 0)
    return _like(padded[:, top : top + height, left : left + width], value)


def _center_crop(value: DenseMap, output_size: Sequence[int] | int) -> Any:
    size = [output_size] if isinstance(output_size, int) else list(output_size)
    height, width = size[0], size[-1]
    top, left = round((value.shape[-2] - height) / 2), round((value.shape[-1] - width) / 2)
    return _crop(value, top, left, height, width)


def _resized_crop(
    value: DenseMap, top: int, left: int, height: int, width: int, size: list[int], **_: Any
) -> Any:
    zoom = math.sqrt(value.shape[-2] * value.shape[-1] / (height * width))
    return _zoomed(_resize(_crop(value, top, left, height, width), size), zoom)


def _zoomed(value: Any, zoom: float) -> Any:
    scales = isinstance(value, ValueMap) and value.scales_with_zoom
    return _like(plain(value) / zoom, value) if scales else value


def _filled(kernel: Callable[..., Tensor]) -> Callable[..., Any]:
    """A torchvision mask kernel that fills with the map's own invalid value."""

    def run(value: DenseMap, *args: Any, fill: Any = None, interpolation: Any = None, **kwargs: Any) -> Any:  # noqa: ARG001
        return _like(kernel(plain(value), *args, fill=value.FILL, **kwargs), value)

    return run


def _rotate_vectors(value: VectorMap, angle: float, **kwargs: Any) -> Any:
    return _like(spin(plain(_filled(kernels.rotate_mask)(value, angle=angle, **kwargs)), angle), value)


def _affine(value: DenseMap, angle: float, scale: float, **kwargs: Any) -> Any:
    moved = _filled(kernels.affine_mask)(value, angle=angle, scale=scale, **kwargs)
    if isinstance(moved, VectorMap):
        return _like(spin(plain(moved), -angle), moved)  # torchvision's affine turns clockwise
    return _zoomed(moved, scale)


def _mirrored(value: DenseMap, across: int) -> Any:
    return _like(plain(value).flip(across), value)


def _register() -> None:
    everywhere: dict[Any, Callable[..., Any]] = {
        kernels.horizontal_flip: lambda value: _mirrored(value, -1),
        kernels.vertical_flip: lambda value: _mirrored(value, -2),
        kernels.resize: _resize,
        kernels.crop: _crop,
        kernels.center_crop: _center_crop,
        kernels.resized_crop: _resized_crop,
        kernels.pad: _filled(kernels.pad_mask),
        kernels.rotate: _filled(kernels.rotate_mask),
        kernels.affine: _affine,
        kernels.perspective: _filled(kernels.perspective_mask),
        kernels.elastic: _filled(kernels.elastic_mask),
    }
    vectors = {
        kernels.horizontal_flip: _flip_vectors,
        kernels.vertical_flip: _flip_vectors_over,
        kernels.rotate: _rotate_vectors,
    }
    for kind, table in ((ClassMap, {}), (ValueMap, {}), (VectorMap, vectors)):
        for operation, kernel in {**everywhere, **table}.items():
            kernels.register_kernel(operation, kind)(kernel)


_register()

__all__ = [
    "IGNORE",
    "ClassMap",
    "DenseMap",
    "Image",
    "ValueMap",
    "VectorMap",
    "plain",
    "spin",
    "stretch",
    "turn",
    "unit",
]
