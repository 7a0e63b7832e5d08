from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from polytask.backbones.networks import create
from polytask.engine.adapter_sets import AdapterSets, save_adapters
from polytask.engine.checkpoint import Saved, load_weights
from polytask.errors import CheckpointError, ConfigError, PolytaskError, TaskMismatchError
from polytask.model import MultiTaskModel
from polytask.tasks import TaskSet
from tests.helpers import SIZE, SWIN, TASKS, backbone_spec, build, image, model_spec, shake

ADAPTERS: dict[str, dict[str, Any]] = {
    "branches": {"type": "mtlora", "rank": 2, "task_rank": 2},
    "lora": {"type": "lora", "rank": 2},
    "per_task": {"type": "lora", "rank": 2, "per_task": True},
    "bitfit": {"type": "bitfit"},
}
Maker = Callable[..., MultiTaskModel]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Models on one pretrained trunk, with what they train shaken by ``noise``."""
    file = tmp_path_factory.mktemp("weights") / "trunk.safetensors"
    torch.manual_seed(0)
    save_file(create(backbone_spec(SWIN), SIZE).state_dict(), file)

    def maker(noise: int = 0, tasks: TaskSet = TASKS, weights: Path = file, **adapter: Any) -> MultiTaskModel:
        adapter = adapter or ADAPTERS["branches"]
        model = build(model_spec({**SWIN, "weights": str(weights)}, adapter=adapter), tasks)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        if noise:
            shake(model, 0.3, lambda name: name in trained, seed=noise)
            with torch.no_grad():
                model.train()(image(seed=noise))  # running statistics of the heads
        return model.eval()

    return maker


@torch.no_grad()
def predict(model: MultiTaskModel) -> dict[str, Tensor]:
    return model(image()).logits


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[task], other[task]) for task in TASKS)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_sets_answer_exactly_as_the_models_they_come_from(make: Maker, tmp_path: Path, adapter: str) -> None:
    trained = {f"set{noise}": make(noise, **ADAPTERS[adapter]) for noise in (1, 2)}
    sets = AdapterSets(make(**ADAPTERS[adapter]))
    plain = predict(sets.model)
    for name, model in trained.items():
        save_adapters(model, tmp_path / f"{name}.safetensors")
        sets.add(name, tmp_path / f"{name}.safetensors")
    assert equal(predict(sets.model), plain), "adding switches nothing"
    assert not equal(predict(trained["set1"]), predict(trained["set2"]))
    for name in ("set1", "set2", "set2", "set1"):
        sets.use(name)
        assert sets.active == name
        assert equal(predict(sets.model), predict(trained[name]))
    sets.use("default")
    assert equal(predict(sets.model), plain)
    assert sets.names == ["default", "set1", "set2"]


def test_there_is_one_trunk_and_switching_copies_nothing(make: Maker, tmp_path: Path) -> None:
    save_adapters(make(1), tmp_path / "one")
    sets = AdapterSets(make())
    named = dict(sets.model.named_parameters())
    frozen = {n: p.data_ptr() for n, p in named.items() if not p.requires_grad}
    trained = {n: p.data_ptr() for n, p in named.items() if p.requires_grad}
    sets.add("one", tmp_path / "one")
    assert not frozen.keys() & load_file(tmp_path / "one").keys()
    sets.use("one")
    after = dict(sets.model.named_parameters())
    assert all(after[n] is named[n] for n in named)
    assert all(after[n].data_ptr() == pointer for n, pointer in frozen.items())
    assert all(after[n].data_ptr() != pointer for n, pointer in trained.items())
    sets.use("default")
    assert {n: named[n].data_ptr() for n in trained} == trained


def test_what_is_trained_stays_with_its_set(make: Maker, tmp_path: Path) -> None:
    save_adapters(make(1), tmp_path / "one")
    sets = AdapterSets(make())
    sets.add("one", tmp_path / "one")
    sets.use("one")
    optimizer = torch.optim.SGD([p for _, p in sets.model.partition().trainable()], lr=0.1)
    sum(x.square().mean() for x in sets.model(image()).logits.values()).backward()
    optimizer.step()
    trained = predict(sets.model)
    sets.use("default")
    sets.use("one")
    assert equal(predict(sets.model), trained)


def test_what_a_phase_trained_besides_is_in_the_file(make: Maker, tmp_path: Path) -> None:
    name = "backbone.net.layers.0.blocks.0.block.mlp.fc1.base.weight"
    model = make()
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad and n.startswith("backbone.net.")}
    left_out = sorted(frozen - {name})
    weights = {n: value + 0 for n, value in model.state_dict().items() if n not in left_out}
    manifest = {"base_digest": model.backbone.base_digest, "left_out": left_out}
    other = make()
    load_weights(other, Saved(weights, {}, manifest), "run")
    save_adapters(other, tmp_path / "more")
    assert name in load_file(tmp_path / "more")
    sets = AdapterSets(make())
    with pytest.raises(CheckpointError, match=r"1 tensors do not fit this model, first .*fc1\.base\.weight"):
        sets.add("more", tmp_path / "more")
    assert sets.names == ["default"]


def test_other_origins_are_refused(make: Maker, tmp_path: Path) -> None:
    file = tmp_path / "set"
    save_adapters(make(1), file)
    other = tmp_path / "other.safetensors"
    torch.manual_seed(5)
    save_file(create(backbone_spec(SWIN), SIZE).state_dict(), other)
    ranks = {**ADAPTERS["branches"], "rank": [2, 2, 2, 3], "task_scale": 2.0}
    cases: list[tuple[MultiTaskModel, type[PolytaskError], str]] = [
        (make(weights=other), CheckpointError, "the adapters were trained on other pretrained weights"),
        (make(**ranks), CheckpointError, "other values of model.adapter.rank, model.adapter.task_scale"),
        (make(type="bitfit"), CheckpointError, "other values of model.adapter.type"),
        (make(tasks=TASKS.subset(["depth"], "")), TaskMismatchError, "for other tasks, expected depth"),
        (make().merged(), CheckpointError, "tensors do not fit this model"),
    ]
    for model, kind, words in cases:
        sets = AdapterSets(model)
        with pytest.raises(kind) as caught:
            sets.add("set", file)
        assert words in str(caught.value)
        assert str(caught.value).count("\n") == 0
        assert sets.names == ["default"]


def test_names(make: Maker, tmp_path: Path) -> None:
    save_adapters(make(1), tmp_path / "set")
    sets = AdapterSets(make())
    sets.add("night", tmp_path / "set")
    with pytest.raises(ConfigError, match="no set 'nigth'; did you mean 'night'"):
        sets.use("nigth")
    for name in ("night", "default"):
        with pytest.raises(ConfigError, match=f"there is a set '{name}' already"):
            sets.add(name, tmp_path / "set")


def damaged(file: Path, kind: str) -> None:
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-9])
    elif kind == "missing":
        file.unlink()
    elif kind == "altered":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif kind == "foreign":
        save_file({"x": torch.ones(1)}, file)
    else:
        with safe_open(file, "pt") as opened:
            header = json.loads(opened.metadata()["adapters"])
        save_file(load_file(file), file, {"adapters": json.dumps(header | {"format": 2})})


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("truncated", "adapters cannot be read"), ("missing", "adapters cannot be read"),
        ("altered", "the file is altered; save it again"), ("foreign", "this is no file of adapters"),
        ("newer", "written by a newer polytask"),
    ],
)  # fmt: skip
def test_damaged_files(make: Maker, tmp_path: Path, kind: str, words: str) -> None:
    save_adapters(make(1), tmp_path / "set")
    damaged(tmp_path / "set", kind)
    with pytest.raises(CheckpointError) as caught:
        AdapterSets(make()).add("set", tmp_path / "set")
    assert words in str(caught.value) and str(caught.value).count("\n") == 0


def test_a_random_trunk_has_no_sets(tmp_path: Path) -> None:
    model = build(model_spec(SWIN, adapter="bitfit"))
    with pytest.raises(ConfigError, match="adapters need a trunk that can be loaded again"):
        AdapterSets(model)
    with pytest.raises(ConfigError, match="adapters need a trunk that can be loaded again"):
        save_adapters(model, tmp_path / "set")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(make: Maker, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the file cannot be written"):
        save_adapters(make(), tmp_path / "nowhere" / "set")
