from __future__ import annotations

import pytest
import torch

from polytask.metrics.reconstruction import ImageError


def test_errors_are_means_over_images() -> None:
    target = torch.full((3, 3, 4, 5), 0.5)
    prediction = target.clone()
    prediction[0] += 0.1  # MSE 0.01: 20 dB
    prediction[1] -= 0.01  # MSE 0.0001: 40 dB
    metric = ImageError()
    metric.update(prediction[:1], target[:1])
    metric.update(prediction[1:2], target[1:2])
    assert metric.compute() == pytest.approx({"MAE": 0.055, "PSNR": 30.0}, rel=1e-5)
    metric.update(prediction[2:], target[2:])
    assert metric.compute()["PSNR"] == pytest.approx(160 / 3, rel=1e-5)  # none is better than 100 dB
