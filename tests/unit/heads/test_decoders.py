"""The heads aspp, segformer and updecoder against plain formulas."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.config import decode
from polytask.errors import ConfigError
from polytask.heads import ASPPHead, HeadSpec, SegFormerHead, UpDecoderHead
from polytask.heads.segformer import SegFormer
from polytask.model import fold_batch_norms
from polytask.parallel import BatchNorm2d
from polytask.types import count
from tests.helpers import SWIN, TASKS, build, gap, image, model_spec, shake

LEVELS, OUTPUTS = (3, 4, 5, 6), 7
CHANNELS = sum(LEVELS)
HEADS: dict[str, HeadSpec] = {
    "aspp": ASPPHead(rates=(1, 2, 3)),
    "segformer": SegFormerHead(width=8),
    "updecoder": UpDecoderHead(width=8),
    "updecoder_legacy": UpDecoderHead(width=8, legacy=True),
}
SIZES = {"aspp": (6, 8), "segformer": (6, 8), "updecoder": (48, 64), "updecoder_legacy": (192, 256)}
each = pytest.mark.parametrize("name", HEADS)


def made(name: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    spec = decode(type(HEADS[name]), {**HEADS[name].model_dump(), **changes})
    head = spec.build_on(LEVELS, OUTPUTS)
    shake(head)
    return head


def features(batch: int = 2) -> Tensor:
    return torch.randn(batch, CHANNELS, 6, 8, generator=torch.Generator().manual_seed(1))


def size(head: nn.Module) -> int:
    return count(dict(head.named_parameters()))


@each
def test_shapes(name: str) -> None:
    assert HEADS[name].dense
    assert made(name)(features()).shape == (2, OUTPUTS, *SIZES[name])


@each
def test_batch_norms_cover_all_processes(name: str) -> None:
    norms = [m for m in made(name).modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(isinstance(norm, BatchNorm2d) for norm in norms)


@each
def test_every_parameter_and_the_input_get_a_gradient(name: str) -> None:
    head, x = made(name).train(), features().requires_grad_()
    y = head(x)
    (y * torch.arange(y.numel()).view_as(y).sin()).sum().backward()
    assert x.grad is not None and x.grad.any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@each
def test_folding_changes_nothing(name: str) -> None:
    head = made(name)
    for seed in range(3):
        torch.manual_seed(seed)
        head(3 * torch.randn(4, CHANNELS, 6, 8) + 1)
    folded = copy.deepcopy(head.eval())
    folded = folded.merged() if isinstance(folded, SegFormer) else folded
    fold_batch_norms(folded)
    with torch.no_grad():
        torch.testing.assert_close(folded(features()), head(features()), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


@each
def test_in_a_model_with_and_without_projections(name: str) -> None:
    for neck in ({"type": "fuse", "channels": [3, 4, 5, 6]}, {"type": "fuse", "channels": None}):
        model = build(model_spec(SWIN, neck=neck, head=HEADS[name].model_dump())).eval()
        with torch.no_grad():
            logits, merged = model(image()).logits, model.merged()(image()).logits
        assert {task: x.shape[1:] for task, x in logits.items()} == {
            task: (kind.channels, 64, 64) for task, kind in TASKS.items()
        }
        assert gap(logits, merged) < 1e-5


# --- aspp ------------------------------------------------------------------------------------------


def test_aspp_is_the_formula() -> None:
    head, x = made("aspp").eval(), features()
    state = head.state_dict()

    def block(x: Tensor, convolution: str, norm: str, dilation: int = 1) -> Tensor:
        weight = state[f"{convolution}.weight"]
        x = F.conv2d(x, weight, padding=dilation * (weight.shape[-1] // 2), dilation=dilation)
        mean, variance = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        return F.relu(F.batch_norm(x, mean, variance, state[f"{norm}.weight"], state[f"{norm}.bias"]))

    branches = [
        block(x, f"0.convs.{k}.0", f"0.convs.{k}.1", dilation) for k, dilation in enumerate((1, 1, 2, 3))
    ]
    pooled = block(x.mean((2, 3), keepdim=True), "0.convs.4.1", "0.convs.4.2").expand_as(branches[0])
    y = block(torch.cat([*branches, pooled], 1), "0.project.0", "0.project.1")
    y = F.conv2d(block(y, "1", "2"), state["4.weight"], state["4.bias"])
    with torch.no_grad():
        torch.testing.assert_close(head(x), y, rtol=1e-4, atol=1e-4)


def test_aspp_size_and_names() -> None:
    head = ASPPHead().build(270, 21)
    branches = 2 * 270 * 256 + 3 * 9 * 270 * 256
    assert size(head) == branches + 1280 * 256 + 9 * 256 * 256 + 7 * 2 * 256 + 257 * 21
    names = {name.rpartition(".")[0] for name, _ in head.named_parameters()}
    convs = {f"0.convs.{k}.{part}" for k in range(4) for part in (0, 1)}
    assert names == convs | {"0.convs.4.1", "0.convs.4.2", "0.project.0", "0.project.1", "1", "2", "4"}


def test_aspp_cannot_train_on_one_image() -> None:
    head = made("aspp").train()
    with pytest.raises(ConfigError, match=r"data\.batch_size: .*head 'aspp' .*expected at least 2, got 1"):
        head(features(1))
    assert head.eval()(features(1)).shape[0] == 1


# --- segformer -------------------------------------------------------------------------------------


def by_levels(head: SegFormer, levels: list[Tensor]) -> Tensor:
    """The formula of the paper, level by level."""
    maps = [
        head.get_submodule(f"linear_c{number}").proj(level.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for number, level in enumerate(levels, 1)
    ]
    sized = [F.interpolate(m, maps[0].shape[2:], mode="bilinear", align_corners=False) for m in maps]
    fused = F.relu(head.linear_fuse.bn(head.linear_fuse.conv(torch.cat(sized[::-1], 1))))
    return head.linear_pred(fused)  # type: ignore[no-any-return]


@pytest.mark.parametrize("training", [False, True])
def test_segformer_is_the_formula_with_its_gradients(training: bool) -> None:
    head = made("segformer", dropout=0.0).double().train(training)
    assert isinstance(head, SegFormer)
    levels = [
        torch.randn(2, channels, 16 // 2**k, 24 // 2**k, dtype=torch.float64, requires_grad=True)
        for k, channels in enumerate(LEVELS)
    ]
    sized = [F.interpolate(x, (16, 24), mode="bilinear", align_corners=False) for x in levels]
    wanted, found = by_levels(copy.deepcopy(head), levels), head(torch.cat(sized, 1))
    torch.testing.assert_close(found, wanted)
    weights = torch.arange(found.numel(), dtype=torch.float64).view_as(found).sin()
    named = [*levels, *head.parameters()]
    ours = torch.autograd.grad((head(torch.cat(sized, 1)) * weights).sum(), named, retain_graph=True)
    theirs = torch.autograd.grad((by_levels(head, levels) * weights).sum(), named)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_segformer_size_and_names() -> None:
    head = SegFormerHead().build_on((18, 36, 72, 144), 21)
    assert size(head) == (270 + 4) * 256 + 1024 * 256 + 2 * 256 + 257 * 21
    assert {name.rpartition(".")[0] for name, _ in head.named_parameters()} == {
        *(f"linear_c{k}.proj" for k in (1, 2, 3, 4)), "linear_fuse.conv", "linear_fuse.bn", "linear_pred",
    }  # fmt: skip


def test_segformer_of_one_level() -> None:
    head = SegFormerHead(width=8).build(5, 2)
    assert size(head) == 6 * 8 + 8 * 8 + 2 * 8 + 9 * 2
    assert head(torch.randn(2, 5, 3, 4)).shape == (2, 2, 3, 4)


def test_segformer_drops_whole_channels_in_training_only() -> None:
    head = made("segformer", dropout=0.5).train()
    assert not torch.equal(head(features()), head(features()))
    head.eval()
    assert torch.equal(head(features()), head(features()))


# --- updecoder -------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_updecoder_size_and_names(legacy: bool) -> None:
    head = UpDecoderHead(legacy=legacy).build(270, 21)
    doubling = 4 * 270 * 32 + 2 * 4 * 32 * 32 + 3 * 32
    assert size(head) == doubling + 3 * 2 * 32 + (9 * 32 + 1) * 21 + 2 * 21
    assert [name for name, _ in head.named_parameters()] == [
        f"{layer}.{part}" for layer in (0, 1, 3, 4, 6, 7, 9, 10) for part in ("weight", "bias")
    ]


def test_legacy_updecoder_clips_and_stretches_the_same_map() -> None:
    corrected, legacy = made("updecoder").eval(), made("updecoder", legacy=True).eval()
    legacy.load_state_dict(corrected.state_dict())
    with torch.no_grad():
        y, clipped = corrected(features()), legacy(features())
    assert (y < 0).any() and (clipped >= 0).all()
    for _ in range(2):
        y = F.interpolate(y.relu(), scale_factor=2.0, mode="bilinear", align_corners=False)
    torch.testing.assert_close(clipped, y)


@pytest.mark.parametrize(
    ("spec", "data", "message"),
    [
        (ASPPHead, {"rates": [0]}, r"rates\.0: "),
        (SegFormerHead, {"width": 0}, "width: "),
        (SegFormerHead, {"dropout": 1.0}, "dropout: "),
        (UpDecoderHead, {"doublings": 0}, "doublings: "),
    ],
)
def test_bad_settings(spec: type[HeadSpec], data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decode(spec, data)
