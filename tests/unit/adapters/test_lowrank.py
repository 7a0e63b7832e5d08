"""The fused branched linear map against its reference made of ordinary operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from polytask.adapters.lowrank import Layout, branched_linear, draw_dropped
from polytask.adapters.mtlora import Branches, TaskLinear
from polytask.backbones.streams import Streams

RANKS = {"a": 2, "b": 3}
SCALES = {"a": 1.5, "b": 0.5}


def layer(
    *, mode: str, narrow: bool, rank: int = 4, dropout: float = 0.0, train_scales: bool = False
) -> TaskLinear:
    torch.manual_seed(0)
    base = nn.Linear(6, 5).double().requires_grad_(False)
    streams = Streams()
    streams.begin(("a", "b"), skip_final_shared=False)
    trained = (train_scales, train_scales)
    branches = Branches(rank, 2.0, RANKS, SCALES, dropout, mode, *trained)  # type: ignore[arg-type]
    made = TaskLinear(base, branches, streams, narrow=narrow, is_last=False)
    for name, parameter in made.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter)
    return made


def gradients(made: TaskLinear, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    weights = torch.arange(y.numel(), dtype=y.dtype).view_as(y).sin()
    named = {name: p for name, p in made.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((y * weights).sum(), [x, *named.values()])
    return dict(zip(["x", *named], found, strict=True))


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("mode", ["matrix", "matrixv2"])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("train_scales", [False, True])
def test_fused_equals_composed(mode: str, narrow: bool, rank: int, train_scales: bool) -> None:
    made = layer(mode=mode, narrow=narrow, rank=rank, train_scales=train_scales)
    x = torch.randn(2 if narrow else 6, 7, 6, dtype=torch.float64, requires_grad=True)
    fused, composed = made._fused(x, ["a", "b"]), made._composed(x, ["a", "b"])
    torch.testing.assert_close(fused, composed)
    ours, reference = gradients(made, x, fused), gradients(made, x, composed)
    for name, gradient in reference.items():
        torch.testing.assert_close(ours[name], gradient)
    scales = {name for name in reference if name.endswith("scale")}
    assert len(scales) == train_scales * (2 + (rank > 0))
    assert all(reference[name].shape == (1,) and reference[name].any() for name in scales)


@pytest.mark.parametrize("mode", ["matrix", "matrixv2"])
def test_trained_scales_are_merged(mode: str) -> None:
    made = layer(mode=mode, narrow=True, train_scales=True).eval()
    assert made.shared is not None
    with torch.no_grad():
        made.shared.scale.fill_(-0.7)  # type: ignore[union-attr]
        made.tasks["a"].scale.fill_(3.0)  # type: ignore[union-attr,operator]
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    with torch.no_grad():
        wanted = made(x)
        shared, a, _ = wanted.chunk(3)
        branch = made.shared
        low = -0.7 * x @ branch.A.T @ branch.B.T
        torch.testing.assert_close(shared, made.base(x) + low)
        task = made.tasks["a"]
        own = 3.0 * x @ task.A.T @ task.B.T  # type: ignore[operator,union-attr]
        torch.testing.assert_close(a, made.base(x) + own + (low if mode == "matrixv2" else 0))
        torch.testing.assert_close(made.merged()(x), wanted)
    assert (made.shared is None) == (mode == "matrixv2")


def test_a_branch_of_rank_zero_has_no_scale_to_train() -> None:
    branches = Branches(2, 1.0, {"a": 0, "b": 1}, SCALES, 0.0, "matrix", True, True)
    made = TaskLinear(nn.Linear(6, 5), branches, Streams(), narrow=True, is_last=False)
    scales = [name for name, _ in made.named_parameters() if name.endswith("scale")]
    assert scales == ["shared.scale", "tasks.b.scale"]


def test_without_streams_only_the_shared_branch_runs() -> None:
    made = layer(mode="matrix", narrow=True)
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    fused, composed = made._fused(x, []), made._composed(x, [])
    torch.testing.assert_close(fused, composed)
    assert made.shared is not None
    named = [x, made.shared.A, made.shared.B]
    for ours, reference in zip(
        torch.autograd.grad(fused.square().sum(), named),
        torch.autograd.grad(composed.square().sum(), named),
        strict=True,
    ):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("places", [False, True])
def test_gradients_with_dropout_are_those_of_the_function(narrow: bool, places: bool) -> None:
    torch.manual_seed(0)
    rows, streams = 3, 3
    x = torch.randn(rows if narrow else rows * streams, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    factors = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 4), (5, 2), (2, 3, 4), (2, 5, 3))
    ]
    drop = torch.rand(rows, 4) < 0.4
    drop = drop.flatten().nonzero()[:, 0] if places else drop

    def run(x: Tensor, a: Tensor, b: Tensor, task_a: Tensor, task_b: Tensor) -> Tensor:
        layout = Layout(streams, narrow, False)
        return branched_linear(x, weight, bias, (a, b), (task_a, task_b), drop, layout)

    assert torch.autograd.gradcheck(run, (x, *factors))


def test_dropped_inputs_reach_no_branch() -> None:
    made = layer(mode="matrix", narrow=True, dropout=0.5).train()
    x = torch.ones(1, 200, 6, dtype=torch.float64)
    torch.manual_seed(1)
    y = made(x)
    base = made.base(x)
    assert (y[0] != base[0]).any()
    assert len(y[0].unique(dim=0)) > 1  # rows differ by their masks alone


def test_every_place_drops_alone_with_the_probability() -> None:
    torch.manual_seed(0)
    dropped = torch.zeros(200, 5000)
    for row in dropped:
        places = draw_dropped(row, 0.05)
        assert (places.diff() > 0).all() and places[0] >= 0 and places[-1] < len(row)
        row[places] = 1.0
    assert abs(dropped.mean() - 0.05) < 0.001
    for end in (dropped[:, :200], dropped[:, -200:]):  # no end of the tensor differs
        assert abs(end.mean() - 0.05) < 0.005
    next_to_it = dropped[:, 1:][dropped[:, :-1] == 1]
    assert abs(next_to_it.mean() - 0.05) < 0.005


@pytest.mark.parametrize("probability", [0.001, 0.5, 0.99])
def test_small_and_large_probabilities(probability: float) -> None:
    torch.manual_seed(0)
    counts = [len(draw_dropped(torch.empty(40, 25), probability)) for _ in range(400)]
    deviation = (1000 * probability * (1 - probability) / 400) ** 0.5
    assert abs(sum(counts) / 400 - 1000 * probability) < 4 * deviation


def test_draws_follow_the_generator() -> None:
    torch.manual_seed(3)
    one = draw_dropped(torch.empty(7, 5), 0.3)
    torch.manual_seed(3)
    assert torch.equal(one, draw_dropped(torch.empty(7, 5), 0.3))


def test_bfloat16_autocast() -> None:
    made = layer(mode="matrix", narrow=False).float()
    x = torch.randn(6, 7, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
