from __future__ import annotations

import numpy as np
import pytest
import torch

from polytask.config import decode
from polytask.errors import ConfigErrors, DataError
from polytask.tasks import Edge, Saliency
from polytask.tasks.base import identity


def test_weights_of_positives() -> None:
    assert Saliency().balance is None
    assert Edge().balance == 0.95
    for bad in (0, 1, 1.5):
        with pytest.raises(ConfigErrors, match="positive_weight"):
            decode(Edge, {"positive_weight": bad})


def test_weight_reaches_the_loss() -> None:
    logits, target = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1, 0], [0, 0]]]])
    light, heavy = (Edge(positive_weight=w).loss(logits, target, identity) for w in (0.1, 0.9))
    assert light is not None and heavy is not None
    assert float(light) == pytest.approx((0.1 + 0.9 * 3) * np.log(2) / 4, rel=1e-6)
    assert float(heavy) == pytest.approx((0.9 + 0.1 * 3) * np.log(2) / 4, rel=1e-6)


def test_encode_refuses_other_values() -> None:
    with pytest.raises(DataError, match="expected 0, 1 or 255, got 128"):
        Saliency().encode(torch.tensor([[0, 1, 255, 128]], dtype=torch.uint8))


def test_shades() -> None:
    probability = Edge().colorize(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert probability[0, :, 0].tolist() == [0, 128, 255]
    assert Edge().colorize(np.array([[[0, 1, 255]]]))[0].tolist() == [[0] * 3, [255] * 3, [128] * 3]


def test_double_sigmoid_reaches_the_metric() -> None:
    prediction = torch.tensor([[[0.1, 0.9], [0.2, 0.8]]])
    target = torch.tensor([[[[0, 1], [0, 1]]]])
    states = []
    for double in (False, True):
        _, metric, _ = Saliency(double_sigmoid=double).metrics()
        metric.update(prediction, target)
        states.append(metric.state["passed"])
    assert not torch.equal(*states)
