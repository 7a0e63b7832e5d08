"""What happens to a sample between the file and the batch, in training and in evaluation."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torchvision.transforms.v2 import functional as kernels

from polytask.config import Spec, register
from polytask.data.maps import IGNORE, ClassMap, DenseMap, VectorMap, plain, spin, stretch, turn
from polytask.types import Sample

Size = tuple[int, int]
Positive = Annotated[float, Field(gt=0.0)]


class Pipeline(Spec):
    """Base of the transform recipes.

    Samples come in with ``image`` as a tv_tensor ``Image`` (uint8 ``[3, H, W]``) and every dense task as
    a map of ``polytask.data.maps``; they leave with the image normalized. All randomness is drawn from
    torch's global generator, which the data layer seeds per sample.
    """

    type: str
    mean: tuple[float, float, float] = Field(default=(0.485, 0.456, 0.406), description="of RGB in 0..1")
    std: tuple[Positive, Positive, Positive] = Field(
        default=(0.229, 0.224, 0.225), description="of RGB in 0..1"
    )

    @abstractmethod
    def train(self, sample: Sample, size: Size) -> Sample:
        """Augment, bring to ``size`` (H, W), normalize."""

    @abstractmethod
    def evaluate(self, sample: Sample, size: Size) -> Sample:
        """Bring to ``size`` (H, W), normalize; nothing random."""

    def finish(self, sample: Sample) -> Sample:
        """Mark empty maps as ignored and turn the image of 0..255 into normalized float32."""
        finished = {name: _mark_empty(value) for name, value in sample.items()}
        return {**finished, "image": self.normalize(finished["image"])}

    def normalize(self, image: Tensor) -> Tensor:
        """``[3, H, W]`` in 0..255 to float32 with the pipeline's mean and standard deviation removed."""
        mean, std = (torch.tensor(three)[:, None, None] for three in (self.mean, self.std))
        return (plain(image).float() / 255 - mean) / std

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
        if not ((sheet != 0) & (sheet != IGNORE)).any():
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

    def evaluate(self, sample: Sample, size: Size) -> Sample:
        """Stretch, normalize."""
        fitted = {k: v if v.shape[-2:] == size else stretch(v, size) for k, v in geometry(sample).items()}
        return self.finish({**sample, **fitted})


@register("pipeline")
class Astmt(Pipeline):
    """The transforms of the ASTMT line (MTI-Net, MTLoRA, AdaMTL): flip, one affine, stretch to size.

    The defaults repair what is harmful in the released code: labels outside the photo are ignored and
    vectors are not turned against the image. ``border="zero"``, ``normal_rotation="compat"`` and
    ``nearest="corner"`` give the released arithmetic (cubic overshoot is clipped in any case).
    """

    type: Literal["astmt"] = "astmt"
    flip: float = Field(default=0.5, ge=0.0, le=1.0, description="probability of a horizontal flip")
    rotate: float = Field(default=20.0, ge=0.0, le=180.0, description="largest rotation, degrees")
    scale: tuple[float, float] = Field(default=(0.75, 1.25), description="range of the zoom")
    scales: tuple[float, ...] = Field(default=(), description="choices of the zoom, in place of `scale`")
    border: Literal["ignore", "zero"] = Field(
        default="ignore", description="class outside the photo: 255 or 0"
    )
    normal_rotation: Literal["compat", "geometric", "off"] = Field(
        default="off", description="how normals turn with the image: as released, as geometry demands, or not"
    )
    nearest: Literal["center", "corner"] = Field(
        default="center", description="which point of a pixel picks its label when maps are stretched"
    )

    EYE: ClassVar[tuple[float, float]] = (0.0, 1.0)
    """No rotation, no zoom."""

    @model_validator(mode="after")
    def _check_zoom(self) -> Astmt:
        low, high = self.scale
        if not 0 < low <= high or any(choice <= 0 for choice in self.scales):
            raise ValueError("zoom factors must be positive, the lower one first")
        return self

    def train(self, sample: Sample, size: Size) -> Sample:
        """Flip, rotate and zoom about the center, stretch, mark, normalize."""
        mirrored, degrees, zoom = chance(self.flip), uniform(-self.rotate, self.rotate), self._zoom()
        moved = {k: self._move(v, mirrored, degrees, zoom) for k, v in geometry(sample).items()}
        return self.evaluate({**sample, **moved}, size)

    def evaluate(self, sample: Sample, size: Size) -> Sample:
        """Stretch, mark, normalize."""
        corner = self.nearest == "corner"
        fitted = {k: stretch(v, size, corner=corner) for k, v in geometry(sample).items()}
        return self.finish({**sample, **fitted})

    def _zoom(self) -> float:
        if self.scales:
            return self.scales[int(torch.randint(len(self.scales), ()))]
        return uniform(*self.scale)

    def _move(self, value: Any, mirrored: bool, degrees: float, zoom: float) -> Any:
        if mirrored:
            value = kernels.horizontal_flip(value)
        if (degrees, zoom) == self.EYE:
            return value
        moved = turn(value, degrees, zoom, border=0 if self.border == "zero" else IGNORE)
        if isinstance(moved, VectorMap) and self.normal_rotation != "off":
            sign = 1 if self.normal_rotation == "geometric" else -1
            moved = moved.wrap(spin(plain(moved), sign * degrees), moved)
        return moved
