"""What happens to a sample between the file and the batch, in training and in evaluation."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import functional as kernels

from polytask.config import Spec, register
from polytask.data.maps import IGNORE, ClassMap, DenseMap, Mirror, VectorMap, plain, spin, stretch
from polytask.data.windows import turn
from polytask.types import Sample

Size = tuple[int, int]
Positive = Annotated[float, Field(gt=0.0)]


def _ordered(span: tuple[float, float]) -> tuple[float, float]:
    if span[0] > span[1]:
        raise ValueError("the lower factor comes first")
    return span


Range = Annotated[tuple[Positive, Positive], AfterValidator(_ordered)]


class Pipeline(Spec):
    """Base of the transform recipes.

    Samples come in with ``image`` as a tv_tensor ``Image`` (``[3, H, W]`` in 0..255; uint8, or float32
    where a dataset stores fractions) and every dense task as a map of ``polytask.data.maps``; they leave
    with the image normalized. All randomness is drawn from torch's global generator, which the data layer
    seeds per sample.
    """

    type: str
    mean: tuple[float, float, float] = Field(default=(0.485, 0.456, 0.406), description="of RGB in 0..1")
    std: tuple[Positive, Positive, Positive] = Field(
        default=(0.229, 0.224, 0.225), description="of RGB in 0..1"
    )

    @abstractmethod
    def train(self, sample: Sample, size: Size) -> Sample:
        """Augment, bring to ``size`` (H, W), normalize."""

    def evaluate(self, sample: Sample, size: Size) -> Sample:
        """Bring to ``size`` (H, W), normalize; nothing random. Stretches unless a pipeline does otherwise."""
        moved = geometry(sample).items()
        fitted = {k: v if v.shape[-2:] == size else stretch(v, size, smooth=True) for k, v in moved}
        return self.finish({**sample, **fitted})

    def finish(self, sample: Sample) -> Sample:
        """Mark empty maps as ignored and turn the image of 0..255 into normalized float32, or a target."""
        finished = {name: _mark_empty(value) for name, value in sample.items()}
        image = sample["image"]
        mirrors = {name: Mirror(image) for name, value in sample.items() if isinstance(value, Mirror)}
        return {**finished, **mirrors, "image": self.normalize(image)}

    def normalize(self, image: Tensor) -> Tensor:
        """``[3, H, W]`` in 0..255 to float32 with the pipeline's mean and standard deviation removed."""
        mean, std = (torch.tensor(three)[:, None, None] for three in (self.mean, self.std))
        return torch.mul(plain(image), 1 / (255 * std)).sub_(mean / std)

    def restore(self, maps: Tensor, photo: Size) -> Tensor:
        """Maps ``[B, C, H, W]`` of a photo that went through ``evaluate``, as large as the photo was."""
        return functional.interpolate(maps.float(), photo, mode="bilinear", align_corners=False)

    def denormalize(self, image: Tensor) -> Tensor:
        """Back from ``normalize`` to uint8 ``[..., 3, H, W]``, for pictures."""
        mean, std = (
            torch.tensor(three, device=image.device)[:, None, None] for three in (self.mean, self.std)
        )
        return ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def _mark_empty(value: Any) -> Any:
    """A class map that must not be empty, and is, becomes wholly ignored."""
    if isinstance(value, ClassMap) and value.empty_is_ignored:
        sheet = plain(value)
        if (sheet + 1).max() <= 1:  # in bytes, 255 + 1 is 0
            return value.wrap(torch.full_like(sheet, IGNORE), value)
    return value


def geometry(sample: Sample) -> dict[str, Any]:
    """The entries that geometry acts on: the image and the dense maps."""
    return {k: v for k, v in sample.items() if k == "image" or isinstance(v, DenseMap)}


def chance(probability: float) -> bool:
    """True with the given probability."""
    return bool(torch.rand(()) < probability)


def uniform(low: float, high: float) -> float:
    """A number between the two."""
    return low + (high - low) * float(torch.rand((), dtype=torch.float64))


@register("pipeline")
class Plain(Pipeline):
    """Perhaps a flip; stretched to size only if the size differs."""

    type: Literal["plain"] = "plain"
    flip: float = Field(
        default=0.5, ge=0.0, le=1.0, description="probability of a horizontal flip in training"
    )

    def train(self, sample: Sample, size: Size) -> Sample:
        """Flip, stretch, normalize."""
        if chance(self.flip):
            sample = {**sample, **{k: kernels.horizontal_flip(v) for k, v in geometry(sample).items()}}
        return self.evaluate(sample, size)


@register("pipeline")
class Astmt(Pipeline):
    """The transforms of the ASTMT line (MTI-Net, MTLoRA, AdaMTL): flip, one affine, stretch to size.

    The defaults repair what is harmful in the released code: labels outside the photo are ignored and
    vectors turn with the image, not against it. ``border="zero"``, ``normal_rotation="compat"`` and
    ``nearest="corner"`` give the released arithmetic (cubic overshoot is clipped in any case).
    """

    type: Literal["astmt"] = "astmt"
    flip: float = Field(default=0.5, ge=0.0, le=1.0, description="probability of a horizontal flip")
    rotate: float = Field(default=20.0, ge=0.0, le=180.0, description="largest rotation, degrees")
    scale: Range = Field(default=(0.75, 1.25), description="range of the zoom")
    scales: tuple[Positive, ...] = Field(default=(), description="choices of the zoom, in place of `scale`")
    border: Literal["ignore", "zero"] = Field(
        default="ignore", description="class outside the photo: 255 or 0"
    )
    normal_rotation: Literal["compat", "geometric", "off"] = Field(
        default="geometric", description="how normals turn: with the image, against it as released, or not"
    )
    nearest: Literal["center", "corner"] = Field(
        default="center", description="which point of a pixel picks its label when maps are stretched"
    )

    EYE: ClassVar[tuple[float, float]] = (0.0, 1.0)
    """No rotation, no zoom."""

    def train(self, sample: Sample, size: Size) -> Sample:
        """Flip, rotate and zoom about the center, stretch, mark, normalize."""
        mirrored, degrees, zoom = chance(self.flip), uniform(-self.rotate, self.rotate), self._zoom()
        fitted = {k: self._move(v, mirrored, degrees, zoom, size) for k, v in geometry(sample).items()}
        return self.finish({**sample, **fitted})

    def evaluate(self, sample: Sample, size: Size) -> Sample:
        """Stretch, mark, normalize."""
        corner = self.nearest == "corner"
        fitted = {k: stretch(v, size, corner=corner) for k, v in geometry(sample).items()}
        return self.finish({**sample, **fitted})

    def _zoom(self) -> float:
        if self.scales:
            return self.scales[int(torch.randint(len(self.scales), ()))]
        return uniform(*self.scale)

    def _move(self, value: Any, mirrored: bool, degrees: float, zoom: float, size: Size) -> Any:
        corner = self.nearest == "corner"
        if mirrored:
            value = kernels.horizontal_flip(value)
        if (degrees, zoom) == self.EYE:
            return stretch(value, size, corner=corner)
        border = 0 if self.border == "zero" else IGNORE
        moved = turn(value, degrees, zoom, size, border=border, corner=corner)
        if isinstance(moved, VectorMap) and self.normal_rotation != "off":
            sign = 1 if self.normal_rotation == "geometric" else -1
            moved = moved.wrap(spin(plain(moved), sign * degrees), moved)
        return moved
