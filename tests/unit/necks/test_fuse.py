"""The plain neck."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from polytask.errors import ConfigError
from polytask.necks.base import Levels
from polytask.necks.fuse import Fuse, FuseSpec
from polytask.types import Factored, Pyramids, materialize, partition

CHANNELS, TASKS = (4, 6, 8), ("a", "b")


def pyramid(seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, c, 16 // s, 24 // s, generator=g) for c, s in zip(CHANNELS, (1, 2, 4), strict=True)
    ]


def neck(channels: tuple[int, ...] | None = (2, 3, 5)) -> Fuse:
    torch.manual_seed(0)
    built = FuseSpec(channels=channels).build(Levels(CHANNELS, (4, 8, 16), (64, 96)), TASKS)
    assert isinstance(built, Fuse)
    return built


def test_projects_resizes_and_concatenates() -> None:
    fuse, levels = neck(), pyramid()
    maps = fuse(Pyramids(levels), TASKS)
    assert fuse.channels == 10 and set(maps) == set(TASKS)
    pieces = []
    for level, linear in zip(levels, fuse.projections["b"], strict=True):
        convolved = F.conv2d(level, linear.weight[:, :, None, None])
        pieces.append(F.interpolate(convolved, (16, 24), mode="bilinear", align_corners=False))
    torch.testing.assert_close(maps["b"], torch.cat(pieces, 1))
    assert not torch.equal(maps["a"], maps["b"])


def test_pending_maps_are_composed() -> None:
    fuse = neck()
    levels = [Factored(torch.randn(2, *x.shape[2:], 12), torch.randn(x.shape[1], 12)) for x in pyramid()]
    own = fuse(Pyramids(pyramid(), {"a": levels}), ("a",))["a"]
    plain = fuse(Pyramids([materialize(level) for level in levels]), ("a",))["a"]
    torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-4)


def test_tasks_read_their_own_pyramid_and_only_asked_ones_run() -> None:
    fuse = neck()
    pyramids = Pyramids(pyramid(), {"a": pyramid(1)})
    maps = fuse(pyramids, ("a",))
    assert set(maps) == {"a"}
    torch.testing.assert_close(maps["a"], fuse(Pyramids(pyramid(1)), ("a",))["a"])


@pytest.mark.parametrize("pending", [False, True])
def test_without_projections_levels_are_concatenated_once(pending: bool) -> None:
    fuse = neck(None)
    own: list = [Factored(x.permute(0, 2, 3, 1), torch.eye(x.shape[1])) if pending else x for x in pyramid(1)]
    maps = fuse(Pyramids(pyramid(), {"c": own}), ("a", "b", "c"))
    assert fuse.channels == sum(CHANNELS) == maps["a"].shape[1]
    assert maps["a"] is maps["b"]
    torch.testing.assert_close(maps["c"], fuse(Pyramids(pyramid(1)), ("a",))["a"])
    assert list(fuse.parameters()) == []


def test_projections_belong_to_their_tasks() -> None:
    part = partition(neck(), TASKS)
    assert not part.shared and {task: len(own) for task, own in part.per_task.items()} == {"a": 3, "b": 3}


def test_starts_as_a_convolution_would() -> None:
    built = FuseSpec(channels=(64,)).build(Levels((100,), (4,), (64, 64)), ("a",))
    weight = built.projections["a"][0].weight  # type: ignore[index]
    assert 0.95 / 10 < float(weight.abs().max().detach()) <= 1 / 10


def test_one_number_per_level() -> None:
    with pytest.raises(
        ConfigError, match=r"model\.neck\.channels: one projection per .*expected 3 numbers, got \[2, 3\]"
    ):
        neck((2, 3))
