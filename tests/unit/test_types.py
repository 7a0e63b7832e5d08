"""The records that travel between the parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polytask.types import (
    Drainable,
    Factored,
    PerTask,
    Pyramids,
    count,
    drain,
    materialize,
    partition,
    to_device,
)


def test_a_factored_level_is_its_product() -> None:
    level = Factored(torch.randn(2, 3, 4, 5), torch.randn(6, 5))
    whole = materialize(level)
    assert whole.shape == (2, 6, 3, 4)
    assert materialize(whole) is whole
    weight = torch.randn(7, 6)
    torch.testing.assert_close(level.project(weight), torch.einsum("oc,bchw->bohw", weight, whole))


def test_gradients_reach_both_factors() -> None:
    source, inner = torch.randn(1, 2, 2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    outer = torch.randn(5, 4, requires_grad=True)
    level = Factored(source, inner)
    composed = torch.autograd.grad(level.project(outer).square().sum(), [source, inner, outer])
    plain = torch.einsum("oc,bchw->bohw", outer, level.materialize())
    for ours, reference in zip(
        composed, torch.autograd.grad(plain.square().sum(), [source, inner, outer]), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


def test_tasks_without_a_stream_read_the_shared_pyramid() -> None:
    shared, own = [torch.zeros(1)], [torch.ones(1)]
    pyramids = Pyramids([*shared], {"a": [*own]})
    assert pyramids.of("a")[0] is own[0]
    assert pyramids.of("b") is pyramids.shared


class Recorder(Drainable):
    def forward(self, x: Tensor) -> Tensor:
        self.recorded_penalties["budget"] = x.sum()
        self.recorded_stats["keep"] = x.mean().detach()
        return x


def test_drain_sums_and_forgets() -> None:
    model = nn.Sequential(Recorder(), nn.Identity(), Recorder())
    x = torch.tensor([1.0, 3.0], requires_grad=True)
    model(x)
    penalties, stats = drain(model)
    assert penalties["budget"] == 8 and stats["keep"] == 4
    penalties["budget"].backward()
    assert torch.equal(x.grad, torch.tensor([2.0, 2.0]))
    assert drain(model) == ({}, {})


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        both = nn.Linear(2, 2, bias=False)
        self.trunk = nn.Linear(1, 1)
        self.heads = PerTask(
            {"a": nn.Linear(2, 3), "b": nn.Sequential(PerTask({"b": nn.Linear(1, 1, bias=False)}))}
        )
        self.tied = PerTask({"a": both, "b": both})
        self.trunk.bias.requires_grad_(False)


def test_partition() -> None:
    part = partition(Nested(), ("a", "b", "c"))
    assert set(part.shared) == {"trunk.weight", "tied.a.weight"}  # two tasks own the second
    assert set(part.frozen) == {"trunk.bias"}
    assert {task: set(own) for task, own in part.per_task.items()} == {
        "a": {"heads.a.weight", "heads.a.bias"},
        "b": {"heads.b.0.b.weight"},
        "c": set(),
    }
    assert [name for name, _ in part.trainable()] == [
        "trunk.weight", "tied.a.weight", "heads.a.weight", "heads.a.bias", "heads.b.0.b.weight",
    ]  # fmt: skip
    assert count(part.per_task["a"]) == 9
    assert count({}) == 0


def test_to_device_moves_tensors_and_keeps_the_rest() -> None:
    batch = {"image": torch.zeros(1), "id": ["x"]}
    moved = to_device(batch, torch.device("meta"))
    assert moved["image"].is_meta and moved["id"] is batch["id"]
    assert not batch["image"].is_meta
