from __future__ import annotations

import numpy as np
import pytest
import torch

from polytask.errors import DataError
from polytask.tasks import Depth, Normals, Task


def test_normals_are_encoded_channels_first() -> None:
    raw = 0.8 * torch.randn(4, 5, 3, dtype=torch.float64).clamp(-1, 1)
    encoded = Normals().encode(raw)
    assert encoded.shape == (3, 4, 5) and encoded.dtype == torch.float32
    assert encoded[:, 1, 2].tolist() == pytest.approx(raw[1, 2].tolist(), rel=1e-6)


def test_normals_as_colors() -> None:
    vectors = np.array([[0, 0, 1], [-1, 0, 0], [0, 0, 0]], np.float32).T[:, None]  # [3, 1, 3]
    assert Normals().colorize(vectors)[0].tolist() == [[128, 128, 255], [0, 128, 128], [0, 0, 0]]


def test_normalize_target_reaches_the_metric() -> None:
    prediction = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
    target = 0.5 * prediction
    means = []
    for flag in (True, False):
        (metric,) = Normals(normalize_target=flag).metrics()
        metric.update(prediction, target)
        means.append(metric.compute()["mean"])
    assert means == pytest.approx([0, 60], abs=1e-4)


def test_depth_gets_brighter_with_distance() -> None:
    picture = Depth(max_depth=10.0).colorize(np.array([[0.0, -1.0, 0.1, 2.0, 5.0, 9.0, 10.0, 50.0]]))
    light = picture.astype(float) @ [0.2126, 0.7152, 0.0722]
    assert not picture[0, :2].any()
    assert (np.diff(light[0, 1:7]) > 0).all()
    assert picture[0, 6].tolist() == picture[0, 7].tolist() == [253, 231, 37]


def test_depth_without_a_maximum_scales_to_the_picture() -> None:
    near, far = (Depth().colorize(scale * np.array([[[1.0, 2.0, 4.0]]])) for scale in (1, 10))
    assert np.array_equal(near, far)
    assert not Depth().colorize(np.zeros((1, 2, 2))).any()


def test_max_depth_reaches_the_metric() -> None:
    (metric,) = Depth(max_depth=3.0).metrics()
    metric.update(torch.tensor([[[1.0, 9.0]]]), torch.tensor([[[[1.0, 5.0]]]]))
    assert metric.compute()["rmse"] == 0


@pytest.mark.parametrize("task", [Depth(), Normals()])
def test_maps_with_nan_or_of_another_shape_are_refused(task: Task) -> None:
    shape = (4, 5, 3)[: 3 if task.channels == 3 else 2]
    broken = torch.ones(shape)
    broken[0, 0] = float("nan")
    with pytest.raises(DataError, match=rf"map with {task.channels} values that are not finite"):
        task.encode(broken)
    with pytest.raises(DataError, match=r"unexpected shape, expected height x width.*, got \[4, 5, 2\]"):
        task.encode(torch.ones(4, 5, 2))


def test_negative_depth_is_refused() -> None:
    with pytest.raises(DataError, match=r"depth map with 2 negative values, expected 0 where .* got '-3'"):
        Depth().encode(torch.tensor([[1.0, -3.0], [-1.0, 0.0]]))


@pytest.mark.parametrize("vectors", [torch.ones(2, 2, 3) * 255, torch.full((2, 2, 3), 0.1)])
def test_normals_far_from_unit_length_are_refused(vectors: torch.Tensor) -> None:
    with pytest.raises(DataError, match="normals of another length, expected vectors of length 1, or 0"):
        Normals().encode(vectors)
    assert not Normals().encode(torch.zeros(2, 2, 3)).any()
