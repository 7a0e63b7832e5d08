"""One level per task."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polytask.config import decode, encode
from polytask.errors import ConfigError
from polytask.necks.base import Levels
from polytask.necks.level import LevelSpec
from polytask.tasks import TaskSet
from polytask.types import Pyramids
from tests.helpers import SCENE, TASKS, build, image, model_spec

CHANNELS = (4, 8, 16)
LEVELS = Levels(CHANNELS, (1, 4, 8), (64, 96))


def test_every_task_gets_its_level_untouched() -> None:
    spec = LevelSpec(level=1, levels={"b": -1})
    assert decode(LevelSpec, encode(spec)) == spec
    neck = spec.build(LEVELS, ("a", "b", "c"))
    assert [neck.channels_of(task) for task in ("a", "b", "c")] == [8, 16, 8]
    shared, own = ([torch.randn(1, c, 2, 2) for c in CHANNELS] for _ in range(2))
    maps = neck(Pyramids(list(shared), {"c": list(own)}), ("a", "b", "c"))
    assert maps["a"] is shared[1] and maps["b"] is shared[2] and maps["c"] is own[1]
    assert set(neck(Pyramids(list(shared)), ("b",))) == {"b"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"level": 3}, r"model\.neck\.level: no such level, expected -3 to 2, got 3"),
        ({"levels": {"b": -4}}, r"model\.neck\.levels\.b: no such level"),
        ({"levels": {"bb": 0}}, r"levels\.bb: 'bb' is not a task of this run; did you mean 'b'"),
    ],
)
def test_misfits(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LevelSpec(**settings).build(LEVELS, ("a", "b"))


@pytest.mark.parametrize("name", ["unet", "segnet"])
def test_maps_and_classes_from_one_network(name: str) -> None:
    tasks = TaskSet({**TASKS, "scene": SCENE})
    neck, head = {"type": "level", "levels": {"scene": -1}}, {"type": "conv", "width": 0}
    model = build(model_spec({"name": name, "options": {"width": 4}}, neck=neck, head=head), tasks)
    logits = model(image(2, (64, 96))).logits
    assert logits["semseg"].shape == (2, 3, 64, 96) and logits["scene"].shape == (2, 2)
    model(image()).logits["scene"].sum().backward()
    reached = {
        name.split(".")[2] for name, p in model.named_parameters() if p.grad is not None and "net" in name
    }
    assert reached == {"encoder"}
