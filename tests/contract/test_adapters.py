"""What every registered adapter promises, on a Swin and on a plain transformer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from polytask.adapters.base import Adapter, adapt
from polytask.backbones.timm import ROLES
from polytask.config import decode, encode, registered
from polytask.cost import count_macs
from polytask.errors import ConfigError, UnsupportedBackboneError
from polytask.model import MultiTaskModel
from polytask.types import materialize
from tests.helpers import (
    MERGED_SWIN,
    SIZE,
    SWIN,
    TASKS,
    VIT,
    backbone_spec,
    build,
    gap,
    image,
    model_spec,
    shake,
)

BACKBONES: dict[str, dict[str, Any]] = {"swin": SWIN, "swin_merged": MERGED_SWIN, "vit": VIT}
VARIANTS: dict[str, dict[str, Any]] = {
    "mtlora": {"type": "mtlora", "rank": 2, "task_rank": 2},
    "mtlora_everywhere": {
        "type": "mtlora", "rank": [2], "task_rank": 2, "layers": [*ROLES.values(), "reduction"],
    },
    "mtlora_second": {"type": "mtlora", "rank": [1, 2, 3, 2], "task_rank": 2, "mode": "matrixv2"},
    "mtlora_sum": {"type": "mtlora", "rank": 2, "task_rank": 2, "mode": "addition"},
    "mtlora_shared": {"type": "mtlora", "rank": 2, "mode": "lora_only", "train_biases": True},
    "mtlora_ragged": {
        "type": "mtlora", "rank": 0, "task_rank": {"semseg": 1, "normals": [2], "depth": [0, 1, 2, 3]},
        "task_scale": {"semseg": 1.0, "normals": [2.0], "depth": 0.5}, "layers": ["fc1", "fc2"],
    },
    "mtlora_scales": {
        "type": "mtlora", "rank": 2, "task_rank": {"semseg": 1, "normals": 2, "depth": 3},
        "train_scale": True, "train_task_scale": True, "layers": [*ROLES.values(), "reduction"],
    },
    "mtlora_last": {
        "type": "mtlora", "rank": 2, "task_rank": 2, "blocks": "last", "dropout": [0.1, 0.0, 0.2, 0.0],
    },
    "recon": {"type": "recon", "layers": ["*s.2.*mlp.fc1", "*s.3.*norm2"]},
    "lora": {"type": "lora", "rank": 2, "alpha": 3.0, "train": ["norm"]},
    "lora_everywhere": {"type": "lora", "rank": 2, "layers": [*ROLES.values(), "reduction"]},
    "lora_per_task": {"type": "lora", "rank": 2, "per_task": True},
    "bitfit": {"type": "bitfit"},
}  # fmt: skip
NAMES = tuple(TASKS)
PAIRS = [
    *((variant, "swin_merged") for variant in VARIANTS),
    *(("mtlora", "swin"), ("mtlora", "vit"), ("mtlora_sum", "vit"), ("mtlora_ragged", "vit")),
    *(("recon", "swin"), ("recon", "vit")),
    *(("lora_everywhere", "swin"), ("lora", "vit"), ("lora_per_task", "vit"), ("bitfit", "vit")),
]
each_with_branches = pytest.mark.parametrize(
    ("variant", "backbone"), [pair for pair in PAIRS if pair[0] not in ("recon", "bitfit")]
)
each = pytest.mark.parametrize(("variant", "backbone"), PAIRS)
each_but_sum = pytest.mark.parametrize(
    ("variant", "backbone"), [pair for pair in PAIRS if pair[0] != "mtlora_sum"]
)
"""Where streams are summed nothing starts at zero, and every task reaches all."""


def make(variant: str, backbone: str, *, branches: float = 0.1, **changes: Any) -> MultiTaskModel:
    """A model whose branches hold noise of this size (0: as built)."""
    model = build(model_spec(BACKBONES[backbone], adapter={**VARIANTS[variant], **changes}))
    if branches:
        shake(model.backbone, branches, lambda name: name.endswith((".B", ".weight")) and ".tasks." in name)
        trained = (".shared.B", "scale", ".branch.B.weight")
        shake(model.backbone, branches, lambda name: name.endswith(trained))
        shake(model.backbone, branches, lambda name: variant == "bitfit" and name.endswith("bias"))
    return model.eval()


def predict(model: MultiTaskModel, tasks: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    with torch.no_grad():
        return model(image(), tasks).logits


def bare(name: str) -> str:
    """A parameter's name without the wrappers around its layer."""
    for wrapper in ("block", "layer", "base"):
        name = name.replace(f".{wrapper}.", ".")
    return name


def step(model: MultiTaskModel, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    sum(x.square().mean() for x in model(image()).logits.values()).backward()
    optimizer.step()


def test_every_adapter_is_covered() -> None:
    assert {settings["type"] for settings in VARIANTS.values()} == set(registered("adapter"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_spec(variant: str) -> None:
    spec = decode(registered("adapter")[VARIANTS[variant]["type"]], VARIANTS[variant])
    assert isinstance(spec, Adapter)
    assert decode(type(spec), encode(spec)) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


@each_but_sum
def test_before_training_every_task_sees_the_plain_backbone(variant: str, backbone: str) -> None:
    model = make(variant, backbone, branches=0)
    model.backbone.own_streams_only = False
    plain = build(model_spec(BACKBONES[backbone])).eval()
    with torch.no_grad():
        own, wanted = model.backbone(image(), NAMES), plain.backbone(image()).shared
        for task in NAMES:
            levels = [materialize(level) for level in own.of(task)]
            assert gap(levels, [materialize(level) for level in wanted]) == 0.0


@each
def test_merged_equals_unmerged(variant: str, backbone: str) -> None:
    model = make(variant, backbone)
    merged = model.merged()
    assert gap(predict(merged), predict(model)) < 1e-5
    assert not any(p.requires_grad for p in merged.parameters())
    assert count_macs(merged, image(1), NAMES) <= count_macs(model, image(1), NAMES)
    assert gap(predict(merged.merged()), predict(model)) < 1e-5


@each
def test_merging_leaves_the_model_alone(variant: str, backbone: str) -> None:
    model = make(variant, backbone).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.merged()
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any(p.requires_grad for p in model.backbone.parameters())


@each
def test_inactive_tasks_do_not_change_active_ones(variant: str, backbone: str) -> None:
    model = make(variant, backbone)
    everything = predict(model)
    for tasks in [("semseg",), ("depth", "semseg"), ("normals",)]:
        some = predict(model, tasks)
        assert tuple(some) == tasks
        assert gap(some, {task: everything[task] for task in tasks}) < 1e-5


@each
def test_one_task_costs_no_more_than_all(variant: str, backbone: str) -> None:
    model = make(variant, backbone)
    costs = [count_macs(model, image(1), NAMES[:count]) for count in (1, 2, 3)]
    assert costs == sorted(costs) and costs[0] < costs[2]


@each_but_sum
@pytest.mark.parametrize("folded", [False, True])
def test_one_task_of_many_costs_what_a_model_of_that_task_costs(
    variant: str, backbone: str, folded: bool
) -> None:
    settings = {**VARIANTS[variant]}
    for field in ("task_rank", "task_scale"):
        if isinstance(settings.get(field), dict):
            settings[field] = {"normals": settings[field]["normals"]}
    alone = build(
        model_spec(BACKBONES[backbone], adapter=settings), TASKS.subset(["normals"], "tasks")
    ).eval()
    many = make(variant, backbone)
    if folded:
        alone, many = alone.merged(), many.merged()
    assert count_macs(many, image(1), ("normals",)) == count_macs(alone, image(1), ("normals",))


@each_with_branches
def test_frozen_weights_stay_and_trained_ones_move(variant: str, backbone: str) -> None:
    model = make(variant, backbone, branches=0).train()
    part = model.partition()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for _, p in part.trainable()], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        step(model, optimizer)
    after = dict(model.named_parameters())
    assert part.frozen and all(p.grad is None for p in part.frozen.values())
    assert all(torch.equal(after[name], before[name]) for name in part.frozen)
    branches = [name for name in after if name.endswith((".B", ".B.weight"))]
    assert any(not torch.equal(after[name], before[name]) for name in branches)
    plain = {bare(name): value for name, value in build(model_spec(BACKBONES[backbone])).state_dict().items()}
    assert all(torch.equal(plain[bare(name)], after[name]) for name in part.frozen)


@each
def test_partition_is_disjoint_and_complete(variant: str, backbone: str) -> None:
    model = make(variant, backbone)
    part = model.partition()
    groups = [part.shared, *part.per_task.values(), part.frozen]
    names = [name for group in groups for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert tuple(part.per_task) == NAMES
    for task, own in part.per_task.items():
        assert own and all(f".{task}." in name for name in own)
    for name, parameter in part.frozen.items():
        assert not parameter.requires_grad, name


@each_but_sum
def test_a_task_reaches_only_shared_and_own_parameters(variant: str, backbone: str) -> None:
    model = make(variant, backbone)
    part = model.partition()
    model(image(), ("normals",)).logits["normals"].sum().backward()
    others = {name for task in NAMES if task != "normals" for name in part.per_task[task]}
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached and not reached & others


@each
def test_state_dict_round_trip(variant: str, backbone: str) -> None:
    model, other = make(variant, backbone), make(variant, backbone, branches=0.3)
    assert gap(predict(model), predict(other)) > 1e-4
    other.load_state_dict(model.state_dict(), strict=True)
    assert gap(predict(model), predict(other)) == 0.0


@each
def test_copies_are_independent(variant: str, backbone: str) -> None:
    model = make(variant, backbone)
    wanted = predict(model)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        assert gap(predict(twin), wanted) == 0.0
        predict(twin, ("depth",))  # its streams are its own
        shake(twin, 0.5)
    assert gap(predict(model), wanted) == 0.0
    assert gap(predict(twins[0], ("depth",)), predict(model, ("depth",))) > 1e-3


@each_with_branches
def test_training_and_inference_agree_without_dropout(variant: str, backbone: str) -> None:
    model = make(variant, backbone, dropout=0.0)
    quiet = predict(model)
    model.backbone.train()
    assert gap(predict(model), quiet) < 1e-5


def test_dropout_acts_in_training_only() -> None:
    model = make("mtlora", "swin", dropout=0.5)
    wanted = predict(model)
    assert gap(predict(model), wanted) == 0.0
    model.backbone.train()
    torch.manual_seed(0)
    first = predict(model)
    assert gap(first, wanted) > 1e-4
    torch.manual_seed(0)
    assert gap(predict(model), first) == 0.0


# --- settings that do not fit ----------------------------------------------------------------------

MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"task_rank": {"semseg": 2, "normals": 2}}, r"model\.adapter\.task_rank: no value for task 'depth'"),
    (
        {"task_rank": {"semseg": 2, "normals": 2, "depth": 2, "dept": 2}},
        r"model\.adapter\.task_rank: 'dept' is not a task of this run; did you mean 'depth'\?",
    ),
    ({"task_scale": {"semseg": 1.0}}, r"model\.adapter\.task_scale: no value for task"),
    ({"rank": [2, 2]}, r"model\.adapter\.rank: one value, or one per stage, expected 4 values, got \[2, 2\]"),
    ({"task_rank": [1, 2, 3, 4, 5]}, r"model\.adapter\.task_rank: .*expected 4 values"),
    (
        {"task_rank": {"semseg": 1, "normals": [1, 2], "depth": 1}},
        r"task_rank: .*expected 4 values, got \[1, 2\]",
    ),
    ({"scale": [1.0, 2.0, 3.0]}, r"model\.adapter\.scale: .*expected 4 values"),
    ({"rank": -1}, r"rank: .*a rank is at least 0, got -1"),
    ({"task_rank": {"semseg": [1, -2]}}, r"task_rank: .*a rank is at least 0"),
    ({"layers": []}, r"model\.adapter\.layers"),
    ({"layers": ["fc3"]}, r"adapter\.layers\.0: .*got 'fc3'; did you mean 'fc"),
    ({"dropout": 1.0}, r"adapter\.dropout: a probability .* below 1"),
    (
        {"mode": "lora_only", "train_task_scale": True},
        r"model\.adapter\.train_task_scale: there is no branch whose scale could train",
    ),
    ({"rank": 0, "train_scale": True}, r"model\.adapter\.train_scale: there is no branch whose scale"),
    ({"train": "everything"}, r"adapter\.train: .*'all'"),
    ({"train_biases": "lora_only"}, r"adapter\.train_biases: .*'adapted'"),
    ({"intermediate_specialization": True}, r"adapter\.intermediate_specialization: unknown key"),
    ({"rnak": 2}, r"adapter\.rnak: unknown key; did you mean 'rank'\?"),
]


@pytest.mark.parametrize(("settings", "message"), MISFITS)
def test_misfits_are_one_clear_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(model_spec(SWIN, adapter={"type": "mtlora", **settings}))
    assert len(str(caught.value).splitlines()) == 1


def test_layers_that_match_nothing() -> None:
    with pytest.raises(ConfigError, match="the backbone has no 'reduction'"):
        build(model_spec(VIT, adapter={"type": "mtlora", "layers": ["reduction"]}))


def test_defaults_that_a_backbone_lacks_pass_also_when_written_out() -> None:
    """As in the recipe of a run folder; a ViT has no position tables."""
    spec = model_spec(VIT, adapter={"type": "mtlora"})
    build(decode(type(spec), encode(spec)))


def test_all_ranks_zero() -> None:
    with pytest.raises(ConfigError, match="matched no layer"):
        build(model_spec(SWIN, adapter={"type": "mtlora", "rank": 0, "mode": "lora_only"}))


def test_a_zero_shared_rank_keeps_the_task_branches() -> None:
    model = make("mtlora", "swin", rank=0)
    names = [name for name, _ in model.backbone.named_parameters()]
    assert not any(".shared." in name for name in names)
    assert sum(name.endswith(".tasks.depth.B") for name in names) == 3 * 4


def test_a_failing_wrap_leaves_the_backbone_unchanged() -> None:
    backbone = backbone_spec(SWIN).build(SIZE)
    before = [(name, type(module)) for name, module in backbone.named_modules()]
    training = {name: p.requires_grad for name, p in backbone.named_parameters()}
    spec = decode(registered("adapter")["mtlora"], {"task_rank": {"a": [1, 2, 3], "b": 1}})
    assert isinstance(spec, Adapter)
    with pytest.raises(ConfigError, match="expected 4 values"):
        adapt(backbone, spec, ("a", "b"))
    assert [(name, type(module)) for name, module in backbone.named_modules()] == before
    assert {name: p.requires_grad for name, p in backbone.named_parameters()} == training


def test_a_refused_fork_leaves_the_backbone_unchanged() -> None:
    backbone = backbone_spec(
        {"name": "xcit_nano_12_p16_224", "options": {"embed_dim": 16, "depth": 4}}
    ).build(SIZE)
    before = [name for name, _ in backbone.named_modules()]
    spec = decode(registered("adapter")["mtlora"], {})
    assert isinstance(spec, Adapter)
    with pytest.raises(UnsupportedBackboneError):
        adapt(backbone, spec, ("a", "b"))
    assert [name for name, _ in backbone.named_modules()] == before


def test_a_second_adapter_is_refused() -> None:
    model = make("mtlora", "swin")
    spec = decode(registered("adapter")["mtlora"], {})
    assert isinstance(spec, Adapter)
    with pytest.raises(ConfigError, match="TaskLinear"):
        adapt(model.backbone, spec, NAMES)


@pytest.mark.parametrize(
    ("backbone", "settings", "words"),
    [
        ({}, {"train": ["nrom"]}, "'nrom' is part of no parameter's name; did you mean 'n"),
        ({"recompute": [9]}, {}, "model.backbone.recompute: nothing to recompute there"),
        ({"recompute": [0]}, {"mode": "lora_only"}, "expected an adapter with task streams"),
    ],
)  # fmt: skip
def test_names_that_match_nothing(backbone: dict[str, Any], settings: dict[str, Any], words: str) -> None:
    spec = model_spec({**SWIN, **backbone}, adapter={"type": "mtlora", **settings})
    with pytest.raises(ConfigError) as caught:
        build(spec)
    assert words in str(caught.value)
