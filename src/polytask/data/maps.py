"""Label maps that know how geometry acts on their values, as tv_tensors, so that v2 transforms compose.

================  =====================  =========  =========================================
type              tensor                 invalid    under geometry
================  =====================  =========  =========================================
``ClassMap``      uint8 ``[1, H, W]``    255        nearest
``ValueMap``      float32 ``[1, H, W]``  0          nearest; a zoom divides or multiplies them
``VectorMap``     float32 ``[3, H, W]``  (0, 0, 0)  cubic, unit length again; turn with the image
================  =====================  =========  =========================================

Whatever fill a transform asks for, a map is filled with its own invalid value. ``resize`` stretches the
whole frame and is no zoom; ``affine`` (scale) and ``resized_crop`` are. Batches hold class indices as int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import functional as kernels
from torchvision.tv_tensors import Image, Mask, TVTensor

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
    """Class indices, uint8 ``[1, H, W]`` (``[H, W]`` is accepted), 255 = ignore.

    Args:
        data: anything ``torch.as_tensor`` takes, in 0..255.
        empty_is_ignored: a map without any class but 0 says nothing and becomes 255 all over.
    """

    FILL, CHANNELS, DTYPE = IGNORE, 1, torch.uint8
    empty_is_ignored: bool = False

    def __new__(cls, data: Any, *, empty_is_ignored: bool = False) -> ClassMap:
        data = torch.as_tensor(data)
        if data.dtype != torch.uint8 and data.numel() and not 0 <= data.min() <= data.max() <= IGNORE:
            raise ValueError(f"ClassMap takes 0..{IGNORE}, got {data.min()}..{data.max()}")
        made = cls._sheet(data)
        if empty_is_ignored:
            made.empty_is_ignored = True
        return made  # type: ignore[no-any-return]


class ValueMap(DenseMap):
    """Positive quantities such as meters, float32 ``[1, H, W]`` (``[H, W]`` is accepted), 0 = invalid.

    Args:
        data: anything ``torch.as_tensor`` takes.
        zoom_power: magnifying by z multiplies values by z to this power: -1 for depth, 1 for inverse depth.
    """

    FILL, CHANNELS, DTYPE = 0, 1, torch.float32
    zoom_power: int = -1

    def __new__(cls, data: Any, *, zoom_power: int = -1) -> ValueMap:
        made = cls._sheet(data)
        if zoom_power != cls.zoom_power:
            made.zoom_power = zoom_power
        return made  # type: ignore[no-any-return]

    def divisor(self, zoom: float) -> float:
        """What magnifying divides the values by."""
        return float(zoom**-self.zoom_power)


class VectorMap(DenseMap):
    """Unit vectors, float32 ``[3, H, W]``: x right, y up, z to the camera; (0, 0, 0) = invalid."""

    FILL, CHANNELS, DTYPE = 0, 3, torch.float32

    def __new__(cls, data: Any) -> VectorMap:
        return cls._sheet(data)  # type: ignore[no-any-return]


class Mirror(TVTensor):  # type: ignore[misc]  # torchvision has no types
    """The image as a target, float32 ``[3, H, W]`` in 0..1; `Pipeline.finish` puts in what the model sees."""

    def __new__(cls, image: Tensor) -> Mirror:
        return (plain(image).float() / 255).as_subclass(cls)


def plain(value: Tensor) -> Tensor:
    """The same storage without the tv_tensor type."""
    return value.as_subclass(Tensor)


def like(tensor: Tensor, value: Any) -> Any:
    """A tensor with the tv_tensor type, and the marks, of ``value``."""
    return value.wrap(tensor, value) if isinstance(value, DenseMap) else tensor.as_subclass(type(value))


def unit(vectors: Tensor, valid: Tensor | None = None) -> Tensor:
    """Vectors ``[3, H, W]`` of length one; those of length zero, or not in ``valid``, become zero."""
    x, y, z = vectors
    scale = (x * x + y * y + z * z).clamp_min_(1e-38).rsqrt_()[None]
    units: Tensor = vectors * (scale if valid is None else scale.mul_(valid))
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


# --- stretching -----------------------------------------------------------------------------------


def stretch(value: Any, size: tuple[int, int], *, corner: bool = False, smooth: bool = False) -> Any:
    """Resize an image or map to ``(H, W)``: image (clipped to 0..255) and vectors cubic, the rest nearest.

    Args:
        value: ``Image``, ``ClassMap``, ``ValueMap`` or ``VectorMap``.
        size: height and width of the result.
        corner: nearest by the upper left corners of pixels, as OpenCV does, instead of their centers.
        smooth: antialiased where image or vectors shrink, as Pillow does it.
    """
    sheet = plain(value)
    rows, columns = (nearest(o, n, corner) for o, n in zip(sheet.shape[-2:], size, strict=True))
    if isinstance(value, (ClassMap, ValueMap)):
        return like(pick(sheet, rows, columns), value)
    same = tuple(sheet.shape[-2:]) == tuple(size)
    exact = sheet if same or smooth else sheet.float()  # in bytes it is fast, but clipped after each axis
    cubic = exact if same else functional.interpolate(exact[None], size, mode="bicubic", antialias=smooth)[0]
    if isinstance(value, VectorMap):
        return like(unit(cubic, pick(pointing(sheet), rows, columns)), value)
    return like(cubic.clamp(0, 255), value)


def nearest(old: int, new: int, corner: bool = False) -> np.ndarray:
    """Which of ``old`` pixels each of ``new`` ones shows, by centers or by upper left corners."""
    steps = np.arange(new)
    return steps * old // new if corner else (2 * steps + 1) * old // (2 * new)


def pick(sheet: Tensor, rows: np.ndarray, columns: np.ndarray) -> Tensor:
    """``[C, H, W]`` at some rows and columns; NumPy gathers ten times as fast as torch."""
    return torch.from_numpy(sheet.numpy()[:, rows][:, :, columns])


# --- kernels for the v2 transforms -----------------------------------------------------------------


def _mirrored(value: DenseMap, axis: int) -> Any:
    flipped = plain(value).flip(axis)
    if isinstance(value, VectorMap):
        flipped[-1 - axis].neg_()  # x along the last axis, y along the one before
    return like(flipped, value)


def _resize(value: DenseMap, size: list[int] | None, max_size: int | None = None, **_: Any) -> Any:
    sketch = torch.empty((1, *value.shape[-2:]), device="meta")  # torchvision's rule for partial sizes
    height, width = kernels.resize_mask(sketch, size, max_size=max_size).shape[-2:]
    return stretch(value, (height, width))


def _crop(value: DenseMap, top: int, left: int, height: int, width: int) -> Any:
    below, beyond = top + height - value.shape[-2], left + width - value.shape[-1]
    margins = (max(-left, 0), max(beyond, 0), max(-top, 0), max(below, 0))
    padded = functional.pad(plain(value), margins, value=value.FILL)
    top, left = max(top, 0), max(left, 0)
    return like(padded[:, top : top + height, left : left + width], value)


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
    return like(plain(value) / value.divisor(zoom), value) if isinstance(value, ValueMap) else value


def _filled(kernel: Callable[..., Tensor]) -> Callable[..., Any]:
    """A torchvision mask kernel that fills with the map's own invalid value."""

    def run(value: DenseMap, *args: Any, fill: Any = None, interpolation: Any = None, **kwargs: Any) -> Any:  # noqa: ARG001
        return like(kernel(plain(value), *args, fill=value.FILL, **kwargs), value)

    return run


def _rotate_vectors(value: VectorMap, angle: float, **kwargs: Any) -> Any:
    return like(spin(plain(_filled(kernels.rotate_mask)(value, angle=angle, **kwargs)), angle), value)


def _affine(value: DenseMap, angle: float, scale: float, **kwargs: Any) -> Any:
    moved = _filled(kernels.affine_mask)(value, angle=angle, scale=scale, **kwargs)
    if isinstance(moved, VectorMap):
        return like(spin(plain(moved), -angle), moved)  # torchvision's affine turns clockwise
    return _zoomed(moved, scale)


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
    for kind in (ClassMap, ValueMap, VectorMap):
        table = everywhere | ({kernels.rotate: _rotate_vectors} if kind is VectorMap else {})
        for operation, kernel in table.items():
            kernels.register_kernel(operation, kind)(kernel)


_register()

__all__ = [
    "IGNORE",
    "ClassMap",
    "DenseMap",
    "Image",
    "Mirror",
    "ValueMap",
    "VectorMap",
    "plain",
    "spin",
    "stretch",
    "unit",
]
