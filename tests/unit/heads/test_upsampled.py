"""The head on enlarged maps: less work before, the same result."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from polytask.adapters.base import fold_batch_norms
from polytask.heads import UpsampledHead
from polytask.heads.upsampled import UpsampledConv2d


@pytest.mark.parametrize("size", [(5, 7), (1, 3), (8, 8), (2, 1)])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_convolution_of_the_enlarged_map(size: tuple[int, int], factor: int) -> None:
    torch.manual_seed(0)
    layer = UpsampledConv2d(6, factor).double()
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    found = []
    for plain in (False, True):
        x = x.detach().requires_grad_()
        layer.zero_grad()
        large = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
        y = F.conv2d(large, layer.weight, layer.bias, padding=1) if plain else layer(x)
        y.square().sum().backward()
        assert layer.bias is not None
        found.append([y, x.grad, layer.weight.grad, layer.bias.grad])
        found[-1] = [value.detach().clone() for value in found[-1] if value is not None]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_layers_and_folding() -> None:
    head = UpsampledHead(factor=2).build(8, 3)
    assert isinstance(head, nn.Sequential) and isinstance(head[0], UpsampledConv2d)
    head(torch.randn(4, 8, 3, 4))  # statistics
    x = torch.randn(2, 8, 3, 4)
    with torch.no_grad():
        expected = head.eval()(x)
        fold_batch_norms(head)
        torch.testing.assert_close(head(x), expected)
    assert expected.shape == (2, 3, 6, 8)
    assert isinstance(head[1], nn.Identity)


def test_trains_after_inference_mode_and_export() -> None:
    """Nothing that a pass in inference mode or under fake tensors makes is left for the next one."""
    layer = UpsampledConv2d(2, 3)
    x = torch.randn(1, 2, 4, 5)
    with torch.inference_mode():
        expected = layer(x).tolist()
    torch.export.export(layer, (torch.randn(1, 2, 6, 7),), strict=False)
    assert type(layer(torch.randn(1, 2, 6, 7))) is torch.Tensor
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), torch.tensor(expected))
    assert layer.weight.grad is not None
