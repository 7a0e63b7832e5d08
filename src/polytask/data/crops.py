"""Transforms that show a part of the photo, magnified, without changing the shape of objects."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torchvision.transforms import v2

from polytask.config import register
from polytask.data.colors import distort, in_unit_range
from polytask.data.maps import IGNORE, DenseMap, Image, ValueMap, plain
from polytask.data.pipelines import Pipeline, Positive, Range, Size, chance, uniform
from polytask.data.windows import Span, Window
from polytask.types import Sample


class Framed(Pipeline):
    """Base of the pipelines that lay the photo, or a part of it, into a frame of ``image_size``.

    What lies around the photo is ignored by every metric. In evaluation all of the photo is shown; one that
    is larger than the frame is shrunk until it fits, and scored at that size.
    """

    flip: float = Field(default=0.5, ge=0.0, le=1.0, description="probability of a horizontal flip")
    scale: Range = Field(default=(0.5, 2.0), description="range of the zoom")
    max_share: float = Field(
        default=0.75, gt=0.0, le=1.0, description="of one semseg class in a crop, else it is drawn again"
    )
    photometric: bool = Field(default=True, description="random changes of color")

    FITTED: ClassVar[bool] = False
    """Whether the photo fills the frame before the zoom, and is laid at the upper left of a gray one."""
    RECOLOR: ClassVar[Callable[[Tensor], Tensor]]

    def train(self, sample: Sample, size: Size) -> Sample:
        """Scale, crop, flip, change colors, pad, normalize."""
        window = self.choose(sample, size)
        image = window.image(plain(sample["image"]))
        return self._show(window, sample, type(self).RECOLOR(image) if self.photometric else image)

    def evaluate(self, sample: Sample, size: Size) -> Sample:
        """Pad, normalize."""
        window = self._whole(sample["image"].shape[-2:], size)
        return self._show(window, sample, window.image(plain(sample["image"])))

    def restore(self, maps: Tensor, photo: Size) -> Tensor:
        """Cut off what lies around the photo; see ``Pipeline.restore``."""
        rows, columns, *_ = self._whole(photo, (maps.shape[-2], maps.shape[-1]))
        return super().restore(maps[..., rows.filled, columns.filled], photo)

    def choose(self, sample: Sample, size: Size) -> Window:
        """A random part; up to ten draws until no class takes up more of it than ``max_share``."""
        photo, zoom, semseg = sample["image"].shape[-2:], uniform(*self.scale), sample.get("semseg")
        fit = max(f / p for p, f in zip(photo, size, strict=True)) if self.FITTED else 1.0
        for _ in range(10):
            rows, columns = (self._part(p, fit * zoom, f) for p, f in zip(photo, size, strict=True))
            if semseg is None or self.max_share == 1.0:
                break
            counts = plain(semseg)[0, rows.seen, columns.seen].flatten().bincount(minlength=256)[:IGNORE]
            if int(counts.max()) < self.max_share * int(counts.sum()):
                break
        return Window(rows, columns, zoom, chance(self.flip))

    def _part(self, length: int, zoom: float, frame: int) -> Span:
        scaled = max(int(length * zoom), 1)
        if scaled <= frame:
            return self._laid(length, scaled, frame)
        return _random_span(length, min(max(round(frame / zoom), 1), length), frame)

    def _whole(self, photo: Size, frame: Size) -> Window:
        zoom = min(f / p for p, f in zip(photo, frame, strict=True))
        zoom = zoom if self.FITTED else min(zoom, 1.0)
        rows, columns = (self._laid(p, max(round(p * zoom), 1), f) for p, f in zip(photo, frame, strict=True))
        return Window(rows, columns)

    def _laid(self, length: int, scaled: int, frame: int) -> Span:
        return Span(0, length, scaled, 0 if self.FITTED else (frame - scaled) // 2, frame)

    def _show(self, window: Window, sample: Sample, image: Tensor) -> Sample:
        mapped: Sample = {k: window.map(v) for k, v in sample.items() if isinstance(v, DenseMap)}
        blank = torch.full((3,), 128.0) if self.FITTED else 255 * torch.tensor(self.mean)
        return self.finish({**sample, **mapped, "image": window.lay(image.float(), blank[:, None, None])})


def _random_span(length: int, seen: int, frame: int) -> Span:
    start = int(torch.randint(length - seen + 1, ()))
    return Span(start, start + seen, frame, 0, frame)


@register("pipeline")
class Atrc(Framed):
    """The transforms of the ATRC line (InvPT, MLoRE): scale, varied crop, flip, colors, centered padding.

    Vectors are nearest like labels. Without ``semseg`` among the tasks, the first crop is taken.
    """

    type: Literal["atrc"] = "atrc"
    RECOLOR = distort


@register("pipeline")
class Multimae(Framed):
    """The transforms of MultiMAE (computation sharing on NYUv2): fill the frame, scale, flip, jitter."""

    type: Literal["multimae"] = "multimae"
    scale: Range = (0.1, 2.0)
    max_share: float = 1.0

    FITTED: ClassVar[bool] = True
    RECOLOR = partial(in_unit_range, v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.5))


@register("pipeline")
class Mtan(Pipeline):
    """The transforms of the MTAN line (LibMTL, balancers): images in 0..1, a zoomed part, a flip.

    Image and vectors are bilinear with aligned corners, the rest nearest; vectors are unit length again.
    """

    type: Literal["mtan"] = "mtan"
    flip: float = Field(default=0.5, ge=0.0, le=1.0, description="probability of a horizontal flip")
    mean: tuple[float, float, float] = Field(default=(0.0, 0.0, 0.0), description="of RGB in 0..1")
    std: tuple[Positive, Positive, Positive] = Field(default=(1.0, 1.0, 1.0), description="of RGB in 0..1")
    scales: tuple[Annotated[float, Field(ge=1.0)], ...] = Field(
        default=(1.0, 1.2, 1.5), description="choices of the zoom"
    )
    inverse_depth: Literal["multiply", "divide"] = Field(
        default="multiply", description="what the zoom does to inverse depth; divide: as released"
    )

    def train(self, sample: Sample, size: Size) -> Sample:
        """Crop by 1/zoom, resize back, flip; stretched if the size differs."""
        zoom = self.scales[int(torch.randint(len(self.scales), ()))] if self.scales else 1.0
        rows, columns = (_random_span(p, int(p / zoom), p) for p in sample["image"].shape[-2:])
        window = Window(rows, columns, zoom, chance(self.flip), aligned=True)
        moved: Sample = {k: window.map(self._kind(v)) for k, v in sample.items() if isinstance(v, DenseMap)}
        image = Image(window.image(plain(sample["image"])))
        return self.evaluate({**sample, **moved, "image": image}, size)

    def _kind(self, value: DenseMap) -> DenseMap:
        """Inverse depth as if it were meters, if the released code is to be followed."""
        return ValueMap(value) if isinstance(value, ValueMap) and self.inverse_depth == "divide" else value
