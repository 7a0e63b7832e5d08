from __future__ import annotations

import pytest
import torch

from polytask.metrics.attributes import AttributeF1


def test_scores_are_means_over_attributes() -> None:
    metric = AttributeF1(3)
    prediction = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 1]])
    target = torch.tensor([[1, 0, 0], [1, 0, 0], [1, -1, 0]])
    metric.update(prediction, target)
    f1, accuracy = metric.per_attribute()
    assert f1.tolist() == pytest.approx([0.8, 0, 0])  # without any positive it is 0
    assert accuracy.tolist() == pytest.approx([2 / 3, 1 / 2, 2 / 3])
    found = metric.compute()
    assert found == pytest.approx({"F1": 80 / 3, "accuracy": 100 * 11 / 18, "error": 100 * 7 / 18})


def test_attributes_that_nobody_knows_are_left_out() -> None:
    metric = AttributeF1(2)
    metric.update(torch.tensor([[1, 1]]), torch.tensor([[1, -1]]))
    assert metric.compute() == pytest.approx({"F1": 100, "accuracy": 100, "error": 0})
