from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from polytask.data.nyud import Nyud
from polytask.data.thinning import contours, thin
from polytask.metrics.boundary import BoundaryScore, boundary_counts, suppress
from polytask.metrics.edge import BoundaryF
from polytask.tasks.edge import Boundary, Edge


def ridge(size: int = 40, column: float = 20.0, height: float = 0.9) -> Tensor:
    """A soft vertical line, ``[1, H, W]``."""
    across = torch.exp(-((torch.arange(size) - column) ** 2) / 4)
    return (height * across).expand(1, size, size).contiguous()


def line(size: int = 40, column: int = 20) -> Tensor:
    target = torch.zeros(1, 1, size, size, dtype=torch.long)
    target[..., column] = 1
    return target


def test_suppression_leaves_the_crest() -> None:
    kept = suppress(ridge()[0].numpy())
    assert set(np.argwhere(kept[5:-5, 5:-5])[:, 1] + 5) == {20}
    assert kept[20, 20] == pytest.approx(0.9, abs=1e-6)
    assert kept[2, 20] == pytest.approx(0.9 * 2 / 5) and kept[0, 20] == 0


def test_a_line_within_the_tolerance_is_found() -> None:
    metric = BoundaryScore(max_dist=0.04)  # of a diagonal of 56.6 pixels: 2.3
    near = {shift: metric.of(ridge(column=20 + shift), line())["odsF"] for shift in (0, 2, 3)}
    assert near[0] == pytest.approx(near[2]) and near[0] > 95  # the ends fade
    assert near[3] == 0


def test_pixels_are_matched_one_to_one() -> None:
    two = torch.maximum(ridge(column=17), ridge(column=23))
    counts = boundary_counts(two[0].numpy(), line()[0, 0].numpy() == 1, 0.1, (0.5,))
    assert counts[0, 0] == 40 and counts[0, 1] > 60 and counts[0, 2] == 40


def test_padding_changes_nothing() -> None:
    g = torch.Generator().manual_seed(0)
    prediction = (0.5 * ridge() + 0.4 * torch.rand(1, 40, 40, generator=g)).clamp(0, 1)
    padded = torch.full((1, 1, 56, 64), 255)
    padded[..., 7:47, 11:51] = line()
    around = torch.rand(1, 56, 64, generator=g)
    around[..., 7:47, 11:51] = prediction
    for truth in ("lines", "contours"):
        metric = BoundaryScore(truth=truth)  # type: ignore[arg-type]
        assert metric.of(around, padded) == metric.of(prediction, line())


def test_pixels_without_a_label_are_not_predicted() -> None:
    target = line()
    target[..., 26:34] = 255
    both = torch.maximum(ridge(), ridge(column=30))
    assert BoundaryScore().of(both, target)["odsF"] > 95 > BoundaryScore().of(both, line())["odsF"]


def test_contours_of_an_edge_map_are_around_it() -> None:
    edge = line()[0, 0].numpy() == 1
    around = thin(contours(edge))
    assert contours(edge)[:, 19:21].all() and around[5:-5, 19:21].any(1).all()
    assert not around[5:-5].sum(1).max() > 1  # the pixels beside the line and those of the line have merged
    assert np.array_equal(contours(np.array([[1, 1, 2], [1, 1, 2]])), [[False, True, False]] * 2)


def test_images_without_boundaries() -> None:
    metric, none = BoundaryScore(), torch.zeros(1, 1, 40, 40, dtype=torch.long)
    assert metric.of(torch.zeros(1, 40, 40), none)["odsF"] == 100
    assert metric.of(torch.zeros(1, 40, 40), line())["odsF"] == 0
    metric.update(ridge(), line())
    alone = metric.compute()
    metric.update(ridge(), none)  # in oisF, as published, its lowest threshold counts
    assert metric.compute()["oisF"] < 70 < alone["oisF"]
    assert all(math.isnan(v) for v in metric.of(ridge(), torch.full_like(none, 255)).values())


@pytest.mark.parametrize(("height", "width"), [(1, 40), (40, 1), (1, 1), (2, 40)])
def test_maps_that_are_all_border(height: int, width: int) -> None:
    edges = line()[..., :height, 20 - width // 2 : 20 + width - width // 2]
    found = BoundaryScore(0.1).of(torch.ones(1, height, width), edges)
    assert found["odsF"] == 0 and edges.any()
    alone = torch.full((1, 1, 40, 40), 255)
    alone[..., 5:6, 10:30] = line()[..., 5:6, 10:30]  # one row has labels
    assert BoundaryScore(0.1).of(ridge(), alone)["odsF"] == 0


def test_probabilities_are_those_of_a_file() -> None:
    written = (ridge() * 255).to(torch.uint8)
    metric = BoundaryScore()
    assert metric.of(written.float() / 255, line()) == metric.of(ridge(), line())


def test_task_scores_it_in_the_end() -> None:
    assert [type(metric) for metric in Edge().accumulators()] == [BoundaryF]
    assert [type(metric) for metric in Edge().accumulators(final=True)] == [BoundaryF, BoundaryScore]
    assert len(Edge(boundary=None).accumulators(final=True)) == 1
    metric = Edge.model_validate({"boundary": {"max_dist": 0.011, "truth": "contours"}}).metrics()[1]
    assert isinstance(metric, BoundaryScore) and (metric.max_dist, metric.truth) == (0.011, "contours")
    nyud = Nyud.TASKS["edge"]
    assert isinstance(nyud, Edge) and nyud.boundary == Boundary(max_dist=0.011, truth="contours")
