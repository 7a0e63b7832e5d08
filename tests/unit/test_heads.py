"""Per-task output layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from polytask.config import decode, registered
from polytask.errors import ConfigError
from polytask.heads import ConvHead, HRNetHead, PooledHead
from polytask.model import fold_batch_norms


def test_registered() -> None:
    assert {"hrnet", "pooled"} <= set(registered("head"))


@pytest.mark.parametrize("width", [1, 4])
def test_hrnet(width: int) -> None:
    head = HRNetHead(width=width).build(6, 5)
    assert head(torch.randn(2, 6, 3, 4)).shape == (2, 5, 3, 4)
    assert [name for name, _ in head.named_parameters()] == [
        "0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias",
    ]  # fmt: skip
    assert head[0].out_channels == 6 * width
    assert HRNetHead.dense


def test_hrnet_size_is_that_of_the_paper() -> None:
    head = HRNetHead().build(270, 21)
    assert sum(p.numel() for p in head.parameters()) == 294_840 + 1_081 * 21


@pytest.mark.parametrize(("width", "size"), [(7, 6 * 7 * 9 + 7 + 7 * 5 + 5), (0, 6 * 5 + 5)])
def test_conv(width: int, size: int) -> None:
    head = ConvHead(width=width).build(6, 5)
    assert head(torch.randn(2, 6, 3, 4)).shape == (2, 5, 3, 4) and ConvHead.dense
    assert sum(p.numel() for p in head.parameters()) == size


def test_folding_the_batch_norm_changes_nothing() -> None:
    head = HRNetHead().build(6, 5)
    for _ in range(3):
        head(torch.randn(4, 6, 8, 8) * 3 + 1)
    head.eval()
    x = torch.randn(2, 6, 3, 4)
    with torch.no_grad():
        wanted = head(x)
        fold_batch_norms(head)
        torch.testing.assert_close(head(x), wanted, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in head.modules())


def test_folding_leaves_other_modules_alone() -> None:
    head = PooledHead().build(6, 5)
    fold_batch_norms(head)
    assert head(torch.zeros(1, 6, 2, 2)).shape == (1, 5)


def test_pooled() -> None:
    head = PooledHead(dropout=0.5).build(6, 5).eval()
    x = torch.randn(2, 6, 3, 4)
    logits = head(x)
    assert logits.shape == (2, 5) and not PooledHead.dense
    torch.testing.assert_close(head(x.flip(2, 3)), logits)  # where things are does not matter
    torch.testing.assert_close(logits, head.linear(x.mean((2, 3))))
    head.train()
    assert not torch.equal(head(x), logits)


@pytest.mark.parametrize(
    ("spec", "data", "message"),
    [
        (HRNetHead, {"width": 0}, "width: "),
        (PooledHead, {"dropout": 1.0}, "dropout: "),
        (HRNetHead, {"depth": 1}, "depth"),
    ],
)
def test_bad_settings(spec: type, data: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decode(spec, data)
