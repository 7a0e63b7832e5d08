"""Swin blocks in their faster form against timm's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import Tensor, nn

from polytask.backbones.swin import Merging, Windowed, fuse_attention, quicken, reorder
from tests.helpers import gap

SMALL: dict[str, Any] = {
    "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4, "num_classes": 0,
    "patch_size": 2, "drop_path_rate": 0.3,
}  # fmt: skip


def pair(**changes: Any) -> tuple[nn.Module, nn.Module]:
    """timm's network, and one of the same weights in the faster form."""
    torch.manual_seed(0)
    own = timm.create_model("swin_tiny_patch4_window7_224", **{**SMALL, "img_size": 32, **changes})
    quick = copy.deepcopy(own)
    quicken(quick)
    return own, quick


def run(net: nn.Module, size: int) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    y = net(torch.randn(3, 3, size, size))
    y.square().sum().backward()
    return y.detach(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_are_those_of_timm(training: bool) -> None:
    own, quick = (net.train(training) for net in pair())
    assert sum(isinstance(m.forward, Windowed) for m in quick.modules()) == 4
    assert sum(isinstance(m.forward, Merging) for m in quick.modules()) == 1
    assert quick.state_dict().keys() == own.state_dict().keys()
    (y, gradients), (wanted, expected) = run(quick, 32), run(own, 32)
    assert gap([y], [wanted]) < 1e-5
    assert gap(gradients, expected) < 1e-4


def test_windows_that_do_not_fit_stay_with_timm() -> None:
    own, quick = pair(img_size=36)  # 18 and 9 tokens a side
    assert not any(isinstance(m.forward, Windowed) for m in quick.modules())
    assert gap([run(quick.eval(), 36)[0]], [run(own.eval(), 36)[0]]) < 1e-5


def test_odd_maps_are_padded_before_merging() -> None:
    merging = PatchMerging(4)
    quick = copy.deepcopy(merging)
    quicken(quick)
    x = torch.randn(2, 5, 7, 4)
    assert gap([quick(x)], [merging(x)]) == 0.0


def test_fused_attention_gives_the_same() -> None:
    own, quick = (net.eval() for net in pair())
    fuse_attention(quick)
    assert gap([run(quick, 32)[0]], [run(own, 32)[0]]) < 1e-5


def test_pairs_that_must_not_meet_have_weight_zero() -> None:
    shifted = [m for m in pair()[1].modules() if isinstance(m, SwinTransformerBlock) and any(m.shift_size)]
    assert shifted
    for block in shifted:
        assert set(block.attn_mask.unique().tolist()) == {0.0, -torch.inf}
        assert (block.attn_mask == 0).any(-1).all()  # every token meets at least itself


def test_reorder_is_differentiable_twice_and_batched() -> None:
    order = torch.randperm(5)
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(reorder(x, order, order.argsort()), x[:, order])

    def call(x: Tensor) -> Tensor:
        return reorder(x, order, order.argsort())

    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(lambda x: call(x) ** 2, x)
    rows = torch.eye(30, dtype=torch.float64).view(30, 2, 5, 3)
    (jacobian,) = torch.autograd.grad(call(x), x, rows, is_grads_batched=True)
    assert torch.equal(call(jacobian.view(60, 5, 3)).view(30, 30), rows.view(30, 30))
