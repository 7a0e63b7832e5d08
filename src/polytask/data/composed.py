"""A pipeline made of transforms that a recipe names."""

from __future__ import annotations

import importlib
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from polytask.config import Spec, register
from polytask.data.maps import Image
from polytask.data.pipelines import Pipeline, Size, geometry
from polytask.errors import ConfigError
from polytask.types import Sample


class Step(Spec):
    """One transform: a class and what it is called with."""

    name: str = Field(description="class in torchvision.transforms.v2, or anywhere: package.module.Class")
    options: dict[str, Any] = Field(default={}, description="keyword arguments; `transforms` are steps again")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.build()
        return self

    def build(self) -> Any:
        """The transform; raises ValueError if there is none such, or if it refuses the options."""
        module, _, name = self.name.rpartition(".")
        inner = [Step.model_validate(step).build() for step in self.options.get("transforms", ())]
        options = self.options | ({"transforms": inner} if inner else {})
        try:
            return getattr(importlib.import_module(module or "torchvision.transforms.v2"), name)(**options)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{self.name}: {error}") from None


@register("pipeline")
class Composed(Pipeline):
    """Your own torchvision v2 transforms in training, on the image and all maps; then stretched to size."""

    type: Literal["v2"] = "v2"
    transforms: tuple[Step, ...] = Field(min_length=1, description="steps in their order, as {name, options}")

    def train(self, sample: Sample, size: Size) -> Sample:
        """Transform, stretch, normalize."""
        moved: Any = geometry(sample)
        floats = moved["image"].is_floating_point()  # in 0..255; torchvision takes floats for 0..1
        if floats:
            moved["image"] = Image(moved["image"] / 255)
        for step in self.transforms:
            try:
                moved = step.build()(moved)
            except (TypeError, ValueError, RuntimeError) as error:
                what = f"transform {step.name} fails ({error})"
                raise ConfigError(what, where="data.pipeline.transforms") from None
        if floats:
            moved["image"] = Image(moved["image"] * 255)
        return self.evaluate({**sample, **moved}, size)
