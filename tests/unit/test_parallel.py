"""What the helpers for several processes do in a single one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from polytask import parallel
from polytask.parallel import (
    BatchNorm2d,
    gather,
    gradient_norm,
    rank,
    scale_gradients,
    start,
    sum_gradients,
    total,
    world,
)


def parameters(*gradients: list[float] | None) -> list[nn.Parameter]:
    built = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.zeros(2))
        parameter.grad = None if gradient is None else torch.tensor(gradient)
        built.append(parameter)
    return built


def test_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (world(), rank()) == (1, 0)
    assert start(torch.device("cpu")) is False
    x = torch.randn(3)
    assert total(x) is x
    assert gather(x) is x


def test_gradients_of_one_process_stay_as_they_are() -> None:
    first, second = parameters([1.0, 2.0], None)
    sum_gradients([first, second])
    assert first.grad.tolist() == [1.0, 2.0] and second.grad is None


def test_gradient_norm() -> None:
    assert float(gradient_norm(parameters([3.0, 0.0], None, [0.0, 4.0]))) == pytest.approx(5.0)
    assert float(gradient_norm(parameters(None))) == 0.0
    assert float(gradient_norm([])) == 0.0
    assert not torch.isfinite(gradient_norm(parameters([float("nan"), 0.0])))


@pytest.mark.parametrize(("factor", "expected"), [(0.5, [1.5, -2.0]), (1.0, [3.0, -4.0]), (7.0, [3.0, -4.0])])
def test_gradients_are_only_ever_shrunk(factor: float, expected: list[float]) -> None:
    first, second = parameters([3.0, -4.0], None)
    scale_gradients([first, second], torch.tensor(factor))
    assert first.grad.tolist() == expected and second.grad is None
    scale_gradients([second], torch.tensor(factor))


def test_clipping_as_torch_does_it() -> None:
    ours, theirs = parameters([3.0, -4.0], [1.0, 1.0]), parameters([3.0, -4.0], [1.0, 1.0])
    nn.utils.clip_grad_norm_(theirs, 2.0)
    scale_gradients(ours, 2.0 / (gradient_norm(ours) + 1e-6))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize(
    "settings", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}]
)
def test_batch_norm_is_the_plain_layer(settings: dict[str, object]) -> None:
    ours, plain = BatchNorm2d(3, **settings), nn.BatchNorm2d(3, **settings)  # type: ignore[arg-type]
    for seed in range(3):
        x = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(seed)) * 2 + 1
        mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        assert torch.equal(ours(mine), plain(other))
        ours(mine).square().sum().backward()
        plain(other).square().sum().backward()
        assert torch.equal(mine.grad, other.grad)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in ours.state_dict().items())
    assert torch.equal(ours.eval()(x), plain.eval()(x))
    assert isinstance(ours, nn.BatchNorm2d)


def test_group_for_cuda_also_carries_counts_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, object] = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(parallel, "rendezvous", lambda _: iter([(dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: made.update(backend=backend))
    assert start(torch.device("cuda", 0))
    assert made == {"backend": "cpu:gloo,cuda:nccl"}
