"""Actions, patterns and objectives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from polytask.errors import CheckpointError, ConfigError
from polytask.phases import Freeze, Load, Objective, PhaseSpec, Unfreeze, matching


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"backbone": nn.Linear(2, 2), "neck": nn.Linear(2, 2)})


def trains(net: nn.Module) -> list[str]:
    return [name for name, p in net.named_parameters() if p.requires_grad]


def test_freeze_and_unfreeze(net: nn.Module) -> None:
    Freeze(patterns=("backbone.*", "neck.bias")).apply(net)
    assert trains(net) == ["neck.weight"]
    Unfreeze(patterns=("*.bias",)).apply(net)
    assert trains(net) == ["backbone.bias", "neck.weight", "neck.bias"]


@pytest.mark.parametrize("kind", [Freeze, Unfreeze])
def test_pattern_that_matches_nothing(net: nn.Module, kind: type[Freeze]) -> None:
    action = kind(patterns=("neck.*", "bakbone.*"))
    for call in (action.check, action.apply):
        with pytest.raises(
            ConfigError, match=r"'bakbone\.\*' matches no parameter; did you mean 'backbone\.\*'"
        ):
            call(net)
    assert len(trains(net)) == 4


def test_check_changes_nothing(net: nn.Module) -> None:
    Freeze(patterns=("*",)).check(net)
    assert len(trains(net)) == 4
    assert list(matching(net, ("neck.*",))) == ["neck.weight", "neck.bias"]


def test_load(net: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file({"backbone.weight": torch.full((2, 2), 7.0), "neck.bias": torch.ones(2)}, file)
    before = net["neck"].bias.clone()  # type: ignore[index]
    action = Load(path=file, prefix="backbone.")
    action.check(net)
    assert not (net["backbone"].weight == 7).any()  # type: ignore[index]
    action.apply(net)
    assert (net["backbone"].weight == 7).all()  # type: ignore[index]
    assert torch.equal(net["neck"].bias, before)  # type: ignore[index]


def test_load_of_what_does_not_fit(net: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read"):
        Load(path=file).check(net)
    file.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Load(path=file).check(net)
    save_file({"backbone.weight": torch.ones(3, 3), "extra": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match=r"2 tensors do not fit the model, first backbone\.weight"):
        Load(path=file).check(net)
    with pytest.raises(CheckpointError, match=r"no tensor begins with 'neck\.', got '2 tensors'"):
        Load(path=file, prefix="neck.").check(net)


def test_objective_default_is_every_loss_and_no_penalty() -> None:
    losses, penalties = {"a": torch.tensor(2.0), "b": torch.tensor(3.0)}, {"p": torch.tensor(5.0)}
    chosen, extra = Objective().select(losses, penalties)
    assert chosen == losses
    assert extra == {}
    chosen, extra = Objective(losses={"b": 2.0}, penalties={"p": 0.1}).select(losses, penalties)
    assert list(chosen) == ["b"]
    assert float(chosen["b"]) == 6
    assert float(extra["p"]) == pytest.approx(0.5)


def test_factor_of_a_task_without_labels_in_this_batch() -> None:
    assert Objective(losses={"a": 1.0, "b": 2.0}).select({"b": torch.tensor(1.0)}, {})[0].keys() == {"b"}


def test_penalty_nobody_emits() -> None:
    with pytest.raises(
        ConfigError, match=r"no part of the model emits penalty 'budgt'; did you mean 'budget'"
    ):
        Objective(penalties={"budgt": 1.0}).select({}, {"budget": torch.tensor(1.0)})


@pytest.mark.parametrize("settings", [{}, {"epochs": 1, "steps": 1}])
def test_length_is_given_once(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="either `epochs` or `steps`"):
        PhaseSpec(**settings)  # type: ignore[arg-type]
