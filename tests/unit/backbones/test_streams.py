"""Streams: copies of the token batch that ride through unmodified blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polytask.adapters.base import adapt
from polytask.adapters.mtlora import MTLoRA
from polytask.backbones.streams import (
    Fork,
    LinearMap,
    MergePoint,
    StreamPlan,
    Streams,
    composable_weight,
    select,
)
from polytask.backbones.timm import Backbone
from polytask.types import Factored, materialize
from tests.helpers import MERGED_SWIN, SIZE, backbone_spec, gap, image, shake

TASKS = ("a", "b")


def streams(*active: str) -> Streams:
    built = Streams()
    built.begin(active, skip_final_shared=False)
    return built


@pytest.mark.parametrize("batch", [1, 2])
def test_repeat_and_split(batch: int) -> None:
    carrier, x = streams(*TASKS), torch.randn(batch, 5, 3)
    y = carrier.repeat(x)
    assert carrier.count == 3 and y.shape == (3 * batch, 5, 3)
    shared, tasks = carrier.split(y)
    assert len(tasks) == 2 and all(torch.equal(stream, x) for stream in (shared, *tasks))
    alone, none = streams().split(x)
    assert torch.equal(alone, x) and none == []


def test_begin_forgets_the_last_pass() -> None:
    carrier = streams(*TASKS)
    carrier.kept[0], carrier.merged[0] = [torch.zeros(1)], torch.zeros(1)
    carrier.begin(("a",), skip_final_shared=True)
    assert carrier.active == ("a",) and carrier.skip_final_shared
    assert not carrier.kept and not carrier.merged


def test_select() -> None:
    plan = StreamPlan("stage_end", ("a", "b", "c"))
    assert select(("c", "a", "x"), plan) == ("a", "c")
    assert select((), plan) == ()
    together = StreamPlan("stage_end", ("a", "b", "c"), all_or_none=True)
    assert select(("b",), together) == ("a", "b", "c")
    assert select(("x",), together) == ()


class AddStreamNumber(nn.Module):
    """Makes every stream differ: 0 for the shared one, 1 for the first task…"""

    def __init__(self, carrier: Streams) -> None:
        super().__init__()
        self.carrier = carrier

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part + number for number, part in enumerate(x.chunk(self.carrier.count))])


@pytest.mark.parametrize("recompute", [False, True])
def test_fork_keeps_task_streams_and_hands_the_shared_one_on(recompute: bool) -> None:
    carrier, x = streams(*TASKS), torch.randn(2, 4, 3, requires_grad=True)
    fork = Fork(AddStreamNumber(carrier), carrier, stage=1, carry=False, recompute=recompute)
    assert torch.equal(fork(x), x)
    assert [torch.equal(kept, x + number) for number, kept in enumerate(carrier.kept[1], 1)] == [True, True]
    sum(kept.sum() for kept in carrier.kept[1]).backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))


def test_fork_may_carry_the_task_streams_on() -> None:
    carrier, x = streams(*TASKS), torch.randn(2, 4, 3)
    fork = Fork(AddStreamNumber(carrier), carrier, stage=0, carry=True, recompute=False)
    assert torch.equal(fork(x), torch.cat([x, x + 1, x + 2]))
    assert carrier.kept == {}


def test_fork_without_active_tasks_is_the_block() -> None:
    carrier, x = streams(), torch.randn(2, 4, 3)
    fork = Fork(AddStreamNumber(carrier), carrier, stage=0, carry=False, recompute=False)
    assert torch.equal(fork(x), x) and carrier.kept == {}


@pytest.mark.parametrize("bias", [False, True])
def test_merge_point(bias: bool) -> None:
    carrier, layer = streams(*TASKS), nn.Linear(6, 4, bias=bias)
    point, x = MergePoint(layer, carrier, stage=2), torch.randn(3 * 2, 5, 7, 6)
    with torch.no_grad():
        shared, wanted = point(x), layer(x).chunk(3)
    torch.testing.assert_close(shared, wanted[0])
    torch.testing.assert_close(materialize(carrier.merged[2]), wanted[0].permute(0, 3, 1, 2))
    assert [isinstance(kept, Factored) for kept in carrier.kept[2]] == [not bias] * 2
    for kept, own in zip(carrier.kept[2], wanted[1:], strict=True):
        tokens = kept if isinstance(kept, Tensor) else kept.materialize().permute(0, 2, 3, 1)
        torch.testing.assert_close(tokens, own)


def test_what_can_be_composed() -> None:
    plain = nn.Linear(2, 3, bias=False)
    assert composable_weight(plain) is plain.weight
    assert composable_weight(nn.Linear(2, 3)) is None
    assert composable_weight(nn.Identity()) is None
    assert composable_weight(LinearMap()) is None


# --- in a backbone ---------------------------------------------------------------------------------


def forked(**changes: Any) -> Backbone:
    torch.manual_seed(0)
    backbone = backbone_spec(MERGED_SWIN, **changes).build(SIZE)
    adapt(backbone, MTLoRA(rank=2, task_rank=2, dropout=0.0), TASKS)
    shake(backbone, 0.1, lambda name: name.endswith(".B"))
    return backbone


def total(backbone: Backbone, tasks: tuple[str, ...]) -> Tensor:
    pyramids = backbone(image(), tasks)
    return sum(
        (materialize(level).square().mean() for task in tasks for level in pyramids.of(task)), torch.zeros(())
    )


def gradients(loss: Tensor, backbone: Backbone) -> dict[str, Tensor]:
    backbone.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}


def test_nothing_outlives_a_pass() -> None:
    backbone = forked()
    total(backbone, TASKS)
    assert backbone.streams.kept == {} and backbone.streams.merged == {} and backbone.streams.origin is None


def test_a_pass_between_forward_and_backward_does_no_harm() -> None:
    backbone = forked()
    wanted = gradients(total(backbone, ("a",)), backbone)
    loss = total(backbone, ("a",))
    total(backbone, ("b",))
    assert gap(gradients(loss, backbone), wanted) == 0.0


def test_recompute_survives_a_pass_in_between() -> None:
    backbone = forked(recompute=(0,))
    wanted = gradients(total(backbone, ("a",)), backbone)
    loss = total(backbone, ("a",))
    total(backbone, ("b",))
    assert gap(gradients(loss, backbone), wanted) == 0.0


def test_a_failed_pass_leaves_nothing_behind() -> None:
    backbone = forked().eval()
    wanted = [level.detach() for level in backbone(image()).shared]
    block = backbone.net.layers[0].blocks[0].block

    def fail(*_: object) -> None:
        raise KeyError("injected")

    hook = block.mlp.fc1.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="injected"):
        backbone(image(seed=1), TASKS)
    hook.remove()
    assert gap([level.detach() for level in backbone(image()).shared], wanted) == 0.0


def test_the_final_shared_stream_may_be_skipped() -> None:
    backbone = forked().eval()
    with torch.no_grad():
        full = backbone(image(), TASKS)
        backbone.own_streams_only = True
        short = backbone(image(), TASKS)
        shared_reader = backbone(image(), (*TASKS, "without stream"))
    for task in TASKS:
        assert gap([materialize(x) for x in full.of(task)], [materialize(x) for x in short.of(task)]) == 0.0
    assert torch.equal(shared_reader.shared[-1], full.shared[-1])
