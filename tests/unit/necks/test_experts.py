"""The neck of low-rank experts: all its forms are one function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.balancers import balancer
from polytask.cost import cost
from polytask.errors import ConfigError, ConfigErrors, PolytaskWarning, UnsupportedBackboneError
from polytask.necks.merged_experts import MergedModule
from polytask.necks.mlore import ExpertModule, MLoRE, TaskPath
from polytask.necks.routing import convolve_each
from polytask.types import count
from tests.helpers import SWIN, TASKS, VIT, build, gap, image, model_spec, shake

PLAIN_VIT: dict[str, Any] = {
    **VIT, "options": {**VIT["options"], "class_token": False, "global_pool": ""}, "final_norm": True,
}  # fmt: skip
NECK: dict[str, Any] = {
    "type": "mlore", "gates": "softmax_first", "width": 8, "ranks": [1, 2, 3, 4], "task_rank": 2, "chosen": 2,
}  # fmt: skip
BACKBONES: dict[str, dict[str, Any]] = {
    "vit": PLAIN_VIT,
    "swin": SWIN,
    "convnext": {"name": "convnext_atto", "options": {"depths": [1, 1, 1, 1], "dims": [4, 8, 8, 16]}},
}
LORA = {"type": "mtlora", "rank": 2, "task_rank": 2, "dropout": 0.0}


def spec_of(backbone: dict[str, Any] = PLAIN_VIT, adapter: Any = None, **changes: Any) -> Any:
    return model_spec(backbone, adapter=adapter, neck=NECK | changes, head="upsampled")


def randomized(model: nn.Module) -> nn.Module:
    """With statistics that a fold could miss."""
    shake(model, 0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return model.eval()


def plain(module: ExpertModule, maps: dict[str, Tensor]) -> dict[str, Tensor]:
    """As it is written down: every expert for every task."""
    found = {}
    for task, x in maps.items():
        path = module.tasks[task]
        assert isinstance(path, TaskPath)
        u = path.enter(x)
        gates, factor = path.router(u)
        outputs = torch.stack([expert(u) for expert in module.experts], 1)
        summed = path.expert_norm((outputs * gates[..., None, None, None]).sum(1))
        together = summed + factor[:, None, None, None] * path.own(u) + module.common(u.detach())
        found[task] = path.leave(F.gelu(path.norm(together)))
    return found


def module_of(width: int, order: str, grid: tuple[int, int]) -> ExpertModule:
    torch.manual_seed(0)
    spec = MLoRE(gates=order, width=width, ranks=(1, 2, 3, 4, 5), task_rank=2, chosen=3)  # type: ignore[arg-type]
    return randomized(ExpertModule(spec, ("a", "b"), grid).double())  # type: ignore[return-value]


@pytest.mark.parametrize("order", ["softmax_first", "top_first"])
@pytest.mark.parametrize(
    ("width", "grid", "batch"), [(12, (3, 5), 1), (16, (4, 4), 2), (20, (1, 7), 3), (32, (5, 2), 2)]
)
@pytest.mark.parametrize("training", [False, True])
def test_mixed_kernels_equal_single_experts(
    width: int, grid: tuple[int, int], batch: int, order: str, training: bool
) -> None:
    module = module_of(width, order, grid).train(training)
    found = []
    for forward in (lambda maps: module(maps)[0], lambda maps: plain(module, maps)):
        inputs = {
            t: torch.randn(
                batch, width, *grid, dtype=torch.float64, generator=torch.Generator().manual_seed(k)
            )
            for k, t in enumerate("ab")
        }
        for x in inputs.values():
            x.requires_grad_()
        module.zero_grad()
        torch.manual_seed(3)  # noise on the gates
        outputs = forward(inputs)
        sum(y.square().sum() for y in outputs.values()).backward()  # type: ignore[union-attr]
        gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        found.append((outputs, gradients | {t: x.grad for t, x in inputs.items()}))
    assert gap(found[0][0], found[1][0]) < 1e-10
    for name, value in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], value, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("memory", ["bank", "on_the_fly"])
@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_merged_equals_unmerged(backbone: str, memory: str) -> None:
    model = randomized(build(spec_of(BACKBONES[backbone], memory=memory)))
    for batch in (1, 3):
        merged = model.merged()  # type: ignore[operator]
        assert gap(merged(image(batch)).logits, model(image(batch)).logits) < 1e-5
    assert isinstance(merged.neck.first[0], MergedModule)
    one = merged(image(2), ("depth",)).logits
    torch.testing.assert_close(one["depth"], model(image(2)).logits["depth"], rtol=1e-4, atol=1e-5)
    names = {name for name, _ in merged.neck.named_buffers() if "bank" in name}
    assert any("kernels" in name for name in names) == (memory == "bank")
    assert gap(merged.merged()(image()).logits, merged(image()).logits) < 1e-6
    assert model(image(), ()).logits == merged(image(), ()).logits == {}


@pytest.mark.parametrize("memory", ["bank", "on_the_fly"])
def test_merged_gives_gradients_of_the_image(memory: str) -> None:
    """True ones: unlike in training, the common convolution has its share."""
    merged = randomized(build(spec_of(memory=memory)).double()).merged()  # type: ignore[operator]
    start, step = image(2).double(), 1e-5 * image(2, seed=1).double()

    def total(x: Tensor) -> Tensor:
        return torch.stack([y.square().mean() for y in merged(x).logits.values()]).sum()

    x = start.clone().requires_grad_()
    total(x).backward()
    assert x.grad is not None
    with torch.no_grad():
        change = (total(start + step) - total(start - step)) / 2
    torch.testing.assert_close((x.grad * step).sum(), change, rtol=1e-5, atol=0)


@torch.no_grad()
def test_behind_task_streams() -> None:
    """The neck reads each task's pyramid, whoever made it."""
    model = randomized(build(spec_of({**SWIN, "feature_point": "after_merge"}, adapter=LORA)))
    seen: list[Any] = []
    model.neck.first[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[index,union-attr]
    output = model(image())
    assert not torch.equal(seen[0]["semseg"], seen[0]["depth"])
    assert gap(model.merged()(image()).logits, output.logits) < 1e-5  # type: ignore[operator]


def test_tasks_asked_cost_only_themselves() -> None:
    model = build(spec_of())
    alone = build(spec_of(), TASKS.subset(["depth"]))
    one, all_ = (cost(m, TASKS.subset(list(t)), (64, 64)) for m, t in ((alone, ["depth"]), (model, TASKS)))
    from polytask.cost import count_macs

    assert count_macs(model, image(1), ("depth",)) == one.macs_executed < all_.macs_executed


def test_memory_of_the_merged_model() -> None:
    """A bank keeps N + T dense kernels for each of eight modules, the factors are far smaller."""
    wide = {"width": 32, "ranks": [1, 2, 3, 4, 5, 6]}
    bank, fly = (
        cost(build(spec_of(memory=memory, **wide)), TASKS, (64, 64)) for memory in ("bank", "on_the_fly")
    )
    ranks = 1 + 2 + 3 + 4 + 5 + 6
    kernels, factors = 4 * 6 * 9 * 32 * 32, ranks * (4 * (9 * 32 + 32) + 8)  # and an index per rank
    own = len(TASKS) * 4 * (9 * 32 * 32 - 2 * (9 * 32 + 32))
    assert bank.merged_bytes - fly.merged_bytes == 8 * (kernels - factors + own)
    assert bank.adapter == 0


def test_what_is_shared() -> None:
    part = build(spec_of()).partition()
    assert any(".experts." in name for name in part.shared)
    for task, own in part.per_task.items():
        assert any(f"tasks.{task}.router" in name for name in own)
        assert any(name.startswith(f"neck.mix.{task}") for name in own)
    assert count(part.frozen) == 0


def test_no_features_are_shared() -> None:
    """Shared experts lie behind tasks' own layers, so there is no place where shared computation ends."""
    model = build(spec_of()).train()
    output, part = model(image()), model.partition()
    assert not output.frontier
    losses = {task: y.square().mean() for task, y in output.logits.items()}
    method = balancer("gradnorm", tuple(TASKS), mode="features")
    with pytest.raises(ConfigError, match="needs tensors that all tasks share"):
        method.backward(losses, part, output.frontier)


def test_penalty_and_usage() -> None:
    model = build(spec_of()).train()
    output = model(image())
    usage = model.neck.usage()  # type: ignore[operator]
    assert len(usage) == 8
    assert all(set(panel) == set(TASKS) for panel in usage.values())
    importance = torch.stack([torch.stack([*panel.values()]).mean(0) for panel in usage.values()])
    expected = (importance.std(1) / importance.mean(1)).square().sum()
    torch.testing.assert_close(output.penalties["expert_balance"].detach(), expected)
    output.penalties["expert_balance"].backward()
    router = model.neck.second[3].tasks["depth"].router  # type: ignore[index,union-attr]
    assert router.gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("any_size", [False, True])
def test_another_size(any_size: bool) -> None:
    options = {**PLAIN_VIT["options"], "dynamic_img_size": True}
    model = randomized(build(spec_of({**PLAIN_VIT, "options": options}, any_size=any_size)))
    if not any_size:
        with pytest.raises(
            ConfigError, match=r"for another image size, expected a finest level of 4x4, got '2x6'"
        ):
            model(image(1, (32, 96)))
        return
    with pytest.warns(PolytaskWarning, match="published figures are for one size"):
        logits = model(image(1, (32, 96))).logits
    assert logits["depth"].shape == (1, 1, 32, 96)
    with pytest.warns(PolytaskWarning, match="another size"):
        assert gap(model.merged()(image(1, (32, 96))).logits, logits) < 1e-5  # type: ignore[operator]


@torch.no_grad()
def test_another_size_on_the_same_grid() -> None:
    """An image a little larger, whose coarser levels have the grid's size when rounded."""
    model = randomized(build(spec_of(BACKBONES["convnext"])))
    with pytest.raises(ConfigError, match="the routers were made for another image size"):
        model(image(1, (72, 64)))


@torch.no_grad()
def test_merged_models_are_for_inference() -> None:
    merged = randomized(build(spec_of())).merged().train()  # type: ignore[operator]
    assert gap(merged(image()).logits, merged(image()).logits) == 0


def test_kernels_of_each_image() -> None:
    for channels in (12, 16):
        g = torch.Generator().manual_seed(0)
        x, kernels = (
            torch.randn(3, channels, 4, 5, generator=g),
            torch.randn(3, channels, 9 * channels, generator=g),
        )
        biases = torch.randn(3, channels, generator=g)
        single = [
            F.conv2d(x[k : k + 1], kernels[k].view(channels, channels, 3, 3), biases[k], padding=1)
            for k in range(3)
        ]
        torch.testing.assert_close(convolve_each(x, kernels, biases), torch.cat(single), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"width": 10}, "multiple of 4"),
        ({"chosen": 5}, "more experts than there are, expected at most the 4 of `ranks`, got 5"),
        ({"stride": 48}, r"the grid of stride 48 does not cover it, expected multiples of 48, got '64x64'"),
        ({"ranks": [3]}, "at least 2"),
        ({"gates": None}, "gates"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises((ConfigError, ConfigErrors), match=sentence):
        build(spec_of(**changes))


def test_number_of_levels() -> None:
    with pytest.raises(ConfigError, match=r"the neck takes four levels, got 3"):
        build(spec_of({**PLAIN_VIT, "out_indices": [0, 1, 2]}))


def test_order_of_the_gates_must_be_said() -> None:
    with pytest.raises(ConfigErrors, match="gates: required key is missing"):
        model_spec(PLAIN_VIT, neck={"type": "mlore"})


def test_final_norm() -> None:
    model = build(spec_of())
    levels = model.backbone(image()).shared
    assert levels[3].mean(1).abs().max() < 1e-5 < levels[2].mean(1).abs().max()
    with pytest.raises(UnsupportedBackboneError, match="no final norm of tokens"):
        build(spec_of({**BACKBONES["convnext"], "final_norm": True}))
