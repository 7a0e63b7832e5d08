from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.losses import balanced_bce, cross_entropy, masked_l1, normals_cosine, normals_l1
from polytask.metrics.base import Total
from polytask.tasks import Normals
from polytask.tasks.base import identity

Loss = Callable[[Tensor, Tensor, Total], Tensor | None]


def draw(seed: int = 0) -> dict[str, tuple[Loss, Tensor, Tensor]]:
    """Per loss: the function, logits and a target with invalid pixels, four images."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (4, 1, 6, 7), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.2] = 255
    binary = torch.where(labels == 255, 255, (labels == 0).long())
    vectors = F.normalize(torch.randn(4, 3, 6, 7, generator=g), dim=1)
    some = torch.rand(4, 1, 6, 7, generator=g) > 0.3
    logits = torch.randn(4, 5, 6, 7, generator=g)
    return {
        "cross_entropy": (cross_entropy, logits, labels),
        "hed": (balanced_bce, logits[:, :1], binary),
        "fixed": (lambda x, y, t: balanced_bce(x, y, t, positive_weight=0.8), logits[:, :1], binary),
        "normals": (normals_l1, logits[:, :3], vectors * some),
        "cosine": (normals_cosine, logits[:, :3], vectors * some),
        "depth": (masked_l1, logits[:, :1], 3 * torch.rand(some.shape, generator=g) * some),
        "classes": (
            lambda x, y, t: cross_entropy(x, y, t, ignore=-1),
            torch.randn(4, 5, generator=g),
            torch.tensor([0, -1, 4, 2]),
        ),
    }


NAMES = list(draw())


@pytest.mark.parametrize("name", NAMES)
def test_shares_of_processes_add_up(name: str) -> None:
    loss, logits, target = draw()[name]
    whole = loss(logits, target, identity)
    asked: list[list[Tensor]] = []
    for half in (slice(0, 1), slice(1, 4)):  # first pass: what each process contributes
        sent: list[Tensor] = []
        loss(logits[half], target[half], lambda counts, sent=sent: sent.append(counts) or counts)
        asked.append(sent)
    assert [len(sent) for sent in asked] == [1, 1]  # one exchange each, or processes would wait for ever
    together = asked[0][0] + asked[1][0]
    shares = [loss(logits[half], target[half], lambda _: together) for half in (slice(0, 1), slice(1, 4))]
    assert whole is not None and None not in shares
    torch.testing.assert_close(sum(shares), whole)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_valid_gives_none(name: str) -> None:
    loss, logits, target = draw()[name]
    nothing = {"classes": -1, "normals": 0, "cosine": 0, "depth": 0}.get(name, 255)
    empty = torch.full_like(target, nothing)
    assert loss(logits, empty, identity) is None
    share = loss(logits.requires_grad_(), empty, lambda counts: counts + 5)  # another process has labels
    assert share is not None and share.detach() == 0
    share.backward()
    assert logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("name", NAMES)
def test_invalid_pixels_have_no_gradient(name: str) -> None:
    loss, logits, target = draw()[name]
    value = loss(logits.requires_grad_(), target, identity)
    assert value is not None
    value.backward()
    assert logits.grad is not None
    nothing = {"classes": -1, "normals": 0, "cosine": 0, "depth": 0}.get(name, 255)
    invalid = target == nothing if name == "classes" else (target == nothing).all(1)  # [B, H, W]
    where = logits.grad.movedim(1, -1)[invalid]
    assert len(where) and not where.any()


def test_cross_entropy_is_the_mean_over_valid_pixels() -> None:
    _, logits, target = draw()["cross_entropy"]
    torch.testing.assert_close(
        cross_entropy(logits, target, identity), F.cross_entropy(logits, target[:, 0], ignore_index=255)
    )


def test_balanced_bce_by_hand() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 3.0]).view(1, 1, 2, 2)
    target = torch.tensor([1, 0, 0, 255]).view(1, 1, 2, 2)
    positive, negative = math.log1p(math.exp(-2)), math.log1p(math.exp(-1)) + math.log1p(math.exp(0.5))
    for weight, w in ((None, 2 / 3), (0.9, 0.9)):
        loss = balanced_bce(logits, target, identity, positive_weight=weight)
        assert loss is not None
        assert float(loss) == pytest.approx((w * positive + (1 - w) * negative) / 3, rel=1e-6)


def test_a_batch_of_one_kind_weighs_nothing() -> None:
    for label in (0, 1):
        loss = balanced_bce(torch.randn(1, 1, 3, 3), torch.full((1, 1, 3, 3), label), identity)
        assert loss is not None and float(loss) == 0


def test_normals_are_compared_by_direction() -> None:
    target = F.normalize(torch.randn(2, 3, 4, 4), dim=1)
    same, opposite = normals_l1(7 * target, target, identity), normals_l1(-target, target, identity)
    assert same is not None and float(same) == pytest.approx(0, abs=1e-6)
    assert opposite is not None and float(opposite) == pytest.approx(float(2 * target.abs().mean()), rel=1e-5)


def test_a_zero_vector_has_an_ordinary_gradient() -> None:
    logits = torch.zeros(1, 3, 2, 2, requires_grad=True)
    loss = normals_l1(logits, F.normalize(torch.ones(1, 3, 2, 2), dim=1), identity)
    assert loss is not None
    loss.backward()
    assert logits.grad is not None and 0 < float(logits.grad.abs().max()) <= 1


def test_low_precision_logits_are_summed_in_float32() -> None:
    for name, (loss, logits, target) in draw().items():
        short, long = loss(logits.bfloat16(), target, identity), loss(logits, target, identity)
        assert short is not None and short.dtype == torch.float32, name
        torch.testing.assert_close(short, long, rtol=0.02, atol=0.02)


def test_cosine_of_normals_by_hand() -> None:
    """One minus the cosine over valid pixels: 0, 1 and 2 for vectors that agree, are square and oppose."""
    target = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]]).T.reshape(1, 3, 1, 4)
    logits = torch.tensor([[5.0, 0, 0], [0, 2, 0], [-1, 0, 0], [3, 3, 3]]).T.reshape(1, 3, 1, 4)
    assert normals_cosine(logits, target, identity) == pytest.approx(1.0)
    assert normals_cosine(logits[..., :2], target[..., :2], identity) == pytest.approx(0.5)
    assert Normals(distance="cosine").loss(logits, target) == pytest.approx(1.0)
    assert Normals().loss(logits, target) != pytest.approx(1.0)
