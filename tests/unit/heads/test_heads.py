"""Per-task output layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from polytask.config import decode, registered
from polytask.errors import ConfigError
from polytask.heads import (
    VAE,
    ConvHead,
    HRNetHead,
    PooledHead,
    VAEHead,
)
from polytask.model import fold_batch_norms
from polytask.tasks import Reconstruction, TaskSet
from polytask.types import drain
from tests.helpers import SIZE, build, image, model_spec


def test_registered() -> None:
    names = {"hrnet", "conv", "aspp", "segformer", "updecoder", "pooled", "vae"}
    assert names <= set(registered("head"))


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


def vae(latent: int = 6, doublings: int = 3) -> VAE:
    torch.manual_seed(0)
    head = VAEHead(latent=latent, doublings=doublings).build(5, 3)
    assert isinstance(head, VAE)
    return head


@pytest.mark.parametrize("size", [(4, 4), (7, 9), (2, 3)])
def test_vae_gives_pictures_from_maps_of_any_size(size: tuple[int, int]) -> None:
    head = vae()
    assert VAEHead.dense and VAEHead.PENALTIES == ("kl",)
    assert head(torch.randn(2, 5, *size)).shape == (2, 3, 32, 32)


def test_vae_draws_in_training_only() -> None:
    head, x = vae(), torch.randn(4, 5, 4, 4)
    torch.manual_seed(1)
    first = head(x)
    assert not torch.equal(first, head(x))
    torch.manual_seed(1)
    assert torch.equal(first, head(x))
    drain(head)
    head.eval()
    assert torch.equal(head(x), head(x))
    assert drain(head) == ({}, {})


def test_kl_is_that_of_torch_distributions() -> None:
    head, x = vae(), torch.randn(4, 5, 4, 4)
    mean, log_variance = head.encode(x).chunk(2, 1)
    q = Normal(mean, (log_variance / 2).exp())
    expected = kl_divergence(q, Normal(torch.zeros_like(mean), torch.ones_like(mean))).sum(1).mean()
    head(x)
    penalties, stats = drain(head)
    torch.testing.assert_close(penalties["kl"], expected)
    assert penalties["kl"].requires_grad
    assert int(stats["active_units"]) == int((mean.var(0, correction=0) > 0.01).sum())


def test_kl_pulls_the_code_to_the_prior() -> None:
    head, x = vae(), 3 * torch.randn(16, 5, 4, 4)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    kls, units = [], []
    for _ in range(60):
        optimizer.zero_grad()
        head(x)
        penalties, stats = drain(head)
        penalties["kl"].backward()
        optimizer.step()
        kls.append(penalties["kl"].item())
        units.append(int(stats["active_units"]))
    assert kls[-1] < 0.05 * max(kls)
    assert units[-1] < units[0]


def test_penalty_reaches_the_objective() -> None:
    tasks = TaskSet({"again": Reconstruction()})
    spec = model_spec(heads={"again": {"type": "vae", "latent": 4}})
    model = build(spec, tasks).train()
    output = model(image())
    assert output.logits["again"].shape == (2, 3, *SIZE)
    assert set(output.penalties) == {"kl"}
    owned = model.partition().per_task["again"]
    (gradient,) = torch.autograd.grad(output.penalties["kl"], owned["heads.again.encode.4.weight"])
    assert gradient.any()
