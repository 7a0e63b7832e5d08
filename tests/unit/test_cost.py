"""Parameters, MACs, time and memory."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from polytask.cost import branch_parameters, cost, count_macs, latency, profile, unfused_attention
from polytask.recipe import load_recipe
from tests.conftest import Make
from tests.helpers import SIZE, TASKS, build, model_spec


class Tiny(nn.Module):
    """3x3 convolution of stride 2, then a linear map per pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.linear = nn.Linear(4, 5)

    def forward(self, image: torch.Tensor, _: object) -> torch.Tensor:
        return self.linear(self.conv(image).permute(0, 2, 3, 1))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Attention over 6 tokens of width 8 in 2 heads, fused or not."""

    def __init__(self) -> None:
        super().__init__()
        self.fused_attn = True

    def forward(self, x: torch.Tensor, _: object) -> torch.Tensor:
        q = x.view(1, 6, 2, 4).transpose(1, 2)
        if self.fused_attn:
            return nn.functional.scaled_dot_product_attention(q, q, q)
        return (q @ q.transpose(-2, -1)).softmax(-1) @ q


def test_macs_by_hand() -> None:
    macs = count_macs(Tiny(), torch.zeros(1, 3, 8, 10), ())
    assert macs == 4 * 5 * (4 * 3 * 9) + 4 * 5 * (4 * 5)


def test_products_added_in_place_are_counted() -> None:
    class Added(nn.Module):
        def forward(self, *_: object) -> torch.Tensor:
            return torch.zeros(2, 5).addmm_(torch.ones(2, 3), torch.ones(3, 5))

    assert count_macs(Added(), torch.zeros(1), ()) == 2 * 3 * 5


def test_attention_is_counted_and_stays_fused() -> None:
    net = Attention()
    assert count_macs(net, torch.zeros(1, 6, 8), ()) == 2 * (2 * 6 * 6 * 4)
    assert net.fused_attn
    with unfused_attention(net):
        assert not net.fused_attn


def test_parameters_add_up() -> None:
    spec = model_spec(adapter={"type": "mtlora", "rank": 3, "task_rank": 2})
    model = build(spec)
    report = cost(model, TASKS, SIZE, repeats=1)
    assert report.total == sum(p.numel() for p in model.parameters())
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.trainable == report.trainable_shared + sum(report.trainable_per_task.values())
    heads = [p.numel() for name, p in model.named_parameters() if name.startswith(("neck.", "heads."))]
    assert report.decoder == sum(heads)
    branches = [p.numel() for name, p in model.named_parameters() if name.endswith((".A", ".B"))]
    assert report.adapter == sum(branches)
    assert report.stored_bytes == sum(v.numel() * v.element_size() for v in model.state_dict().values())
    assert 0 < report.macs_merged <= report.macs_executed
    assert report.latency_ms is not None
    assert report.latency_ms > 0
    assert report.activation_bytes is not None
    assert report.activation_bytes > 4 * 3 * 64 * 64


def test_norm_of_a_wrapper_belongs_to_the_adapter() -> None:
    model = build(model_spec(adapter={"type": "mtlora", "rank": 3, "task_rank": 2, "mode": "addition"}))
    names = branch_parameters(model)
    assert any(name.endswith(".norm.weight") for name in names)
    assert not any(".base." in name for name in names)


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = build(model_spec(adapter={"type": "mtlora", "rank": 3, "task_rank": 2}))
    model.train()
    model.heads["depth"].eval()
    before = copy.deepcopy(model.state_dict())
    modes = {name: module.training for name, module in model.named_modules()}
    random = torch.random.get_rng_state()
    cost(model, TASKS, SIZE, repeats=0)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_what_is_not_asked_for_is_not_measured() -> None:
    report = cost(build(model_spec()), TASKS, SIZE, repeats=0, memory=False)
    assert report.latency_ms is None
    assert report.activation_bytes is None
    assert latency(Tiny(), torch.zeros(1, 3, 8, 8), (), 1) > 0


def test_profile_needs_neither_data_nor_weights(small: Make, tmp_path: Path) -> None:
    plain = profile(small(), repeats=0)
    absent = small(f"data.cache={tmp_path / 'nowhere'}", "model.backbone.weights=nowhere.pth")
    report = profile(absent, repeats=0)
    assert not (tmp_path / "nowhere").exists()
    assert (report.total, report.macs_executed) == (plain.total, plain.macs_executed)
    assert report.stored_bytes < plain.stored_bytes  # what the weight file gives back need not be stored
    assert profile(small("model.backbone.pretrained=true"), repeats=0).stored_bytes == report.stored_bytes


def test_fewer_tasks_cost_less(small: Make) -> None:
    assert profile(small("tasks=[depth]"), repeats=0).macs_merged < profile(small(), repeats=0).macs_merged


@pytest.mark.slow
def test_published_parameter_counts() -> None:
    file = Path("pascal/mtlora_r64")
    report = profile(load_recipe(file), repeats=0)
    assert (report.total, report.trainable) == (34_262_906, 8_344_634)
