"""The embedding and reconstruction kinds beyond what the contract asks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from polytask.data.maps import Mirror
from polytask.data.pipelines import Plain
from polytask.errors import DataError
from polytask.losses import supervised_contrastive
from polytask.tasks import Embedding, Reconstruction
from polytask.tasks.base import identity

TASK = Embedding(dimension=4, temperature=0.5)


def by_definition(vectors: Tensor, ids: list[int], temperature: float) -> tuple[float, int]:
    """Sum over anchors of equation 2 of Khosla et al., and their number."""
    units = [v / v.norm() for v in vectors]
    total, anchors = 0.0, 0
    for i, mine in enumerate(ids):
        positives = [p for p, other in enumerate(ids) if p != i and other == mine >= 0]
        if positives:
            weights = {
                a: math.exp(float(units[i] @ units[a]) / temperature)
                for a, o in enumerate(ids)
                if a != i and o >= 0
            }
            total -= sum(math.log(weights[p] / sum(weights.values())) for p in positives) / len(positives)
            anchors += 1
    return total, anchors


def test_loss_is_equation_2() -> None:
    vectors, ids = (
        torch.randn(9, 4, generator=torch.Generator().manual_seed(0)),
        [3, 1, 3, -1, 8, 3, 1, -1, 0],
    )
    total, anchors = by_definition(vectors, ids, 0.5)
    loss = TASK.loss(vectors, torch.tensor(ids))
    assert loss is not None and anchors == 5
    assert float(loss) == pytest.approx(total / anchors, rel=1e-5)


def test_shares_are_means_over_all_anchors_compared_within_their_process() -> None:
    vectors = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    ids = [0, 1, 0, 0, 1, 2, 1, 2]
    parts = (slice(0, 4), slice(4, 8))
    sums = [by_definition(vectors[part], ids[part], 0.5) for part in parts]
    anchors = sum(count for _, count in sums)
    shares = [TASK.loss(vectors[p], torch.tensor(ids[p]), lambda _: torch.tensor(anchors)) for p in parts]
    assert [float(share) for share in shares] == pytest.approx(
        [total / anchors for total, _ in sums], rel=1e-5
    )
    whole = TASK.loss(vectors, torch.tensor(ids))
    assert abs(float(whole) - float(sum(shares))) > 0.01  # one process sees more to compare with


def test_a_process_without_anchors_adds_nothing() -> None:
    for ids in ([1, 2], [-1, -1], [5]):
        vectors = torch.randn(len(ids), 4, requires_grad=True)
        share = TASK.loss(vectors, torch.tensor(ids), lambda count: count + 3)
        assert share is not None and share.item() == 0
        (gradient,) = torch.autograd.grad(share, vectors)
        assert not gradient.any()
        assert TASK.loss(vectors, torch.tensor(ids)) is None


def test_gradient_is_right() -> None:
    vectors = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 1, 0, 1, 1, -1])
    assert torch.autograd.gradcheck(
        lambda v: supervised_contrastive(v, ids, identity, temperature=0.2), vectors
    )


def test_identities() -> None:
    assert TASK.encode(torch.tensor(7, dtype=torch.int32)).dtype == torch.long
    with pytest.raises(DataError, match="unknown identity, expected 0 or more, or -1, got -2"):
        TASK.encode(torch.tensor(-2))
    assert TASK.caption(np.array(2880)) == "2880"
    assert TASK.caption(np.array([0.5, -0.25, 0, 1, 0])) == "0.50 -0.25 0.00 1.00 …"
    assert TASK.colorize(np.array([0.5, -1.0, 1.0, 0.0]))[0, :, 0].tolist() == [191, 0, 255, 128]


def test_target_of_reconstruction_is_what_the_model_sees() -> None:
    image = torch.randint(0, 256, (3, 10, 14)).to(torch.uint8)
    encoded = Reconstruction().encode(image)
    assert type(encoded) is Mirror and encoded.dtype == torch.float32 and encoded.max() <= 1
    pipeline = Plain(flip=1.0)
    sample = pipeline.train({"image": image, "again": encoded}, (5, 7))
    mean, std = (torch.tensor(v)[:, None, None] for v in (pipeline.mean, pipeline.std))
    assert sample["again"].shape == (3, 5, 7)
    torch.testing.assert_close(
        sample["again"].as_subclass(Tensor), sample["image"] * std + mean, atol=1e-5, rtol=0
    )


def test_reconstruction_as_colors() -> None:
    prediction = Reconstruction().predict(torch.tensor([[-1.0, 0.5, 2.0]]).view(1, 3, 1, 1))
    assert Reconstruction().colorize(prediction[0].numpy()).tolist() == [[[0, 128, 255]]]
