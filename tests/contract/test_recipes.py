"""Every recipe in the tree decodes, says what it is, and, made small, takes a step."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from polytask.config import decode, encode, registered
from polytask.data.base import train_loader
from polytask.engine.step import StepSetup, train_step
from polytask.files import dump_yaml, load_yaml, parse_yaml
from polytask.recipe import Recipe, load_recipe, shipped_recipes
from tests.contract.test_datasets import CASES

RECIPES = {
    name: path
    for name, path in shipped_recipes().items()
    if load_yaml(path)["data"]["type"] in registered("data")
}
SMALL_SWIN = {
    "patch_size": 2, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2], "window_size": 4,
}  # fmt: skip
SMALL = {
    "swin": SMALL_SWIN,
    "vit": {"patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2},
    "hiera": {"embed_dim": 16, "stages": [1, 1, 1, 1]},
}


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return load_recipe(Path(request.param))


@pytest.mark.parametrize("name", RECIPES)
def test_says_what_it_is(name: str) -> None:
    first = RECIPES[name].read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 12


def test_round_trip(recipe: Recipe) -> None:
    assert decode(Recipe, encode(recipe)) == recipe
    assert decode(Recipe, parse_yaml(dump_yaml(encode(recipe)), "shown")) == recipe


def test_names_are_told_apart_within_a_folder() -> None:
    names = [(name.rpartition("/")[0], load_recipe(Path(name)).name) for name in RECIPES]
    assert len(set(names)) == len(names)


def shrunk(recipe: Recipe, folder: Path) -> Recipe:
    """The same kind of data, techniques and tasks in their smallest form."""
    data: dict[str, Any] = copy.deepcopy(encode(recipe))
    kind, changes = data["data"]["type"], {"batch_size": 2, "image_size": [32, 32], "workers": 0}
    if kind == "rooms":
        changes |= {"preset": "nano", "image_size": [32, 48], "pretrain_size": 6}
    else:
        changes |= {"root": CASES[kind](folder)["root"]}
    data["data"] |= changes
    backbone = data["model"]["backbone"]
    backbone |= {"pretrained": False, "weights": None}
    for family, options in SMALL.items():
        if family in backbone["name"]:
            backbone["options"] = backbone["options"] | options
    if backbone["name"] in ("unet", "segnet"):
        backbone["options"] = {"width": 4}
    neck = data["model"]["neck"]
    if neck["type"] == "mlore":
        neck |= {"width": 8, "ranks": [1] * len(neck["ranks"]), "task_rank": 2}
    adapter = data["model"]["adapter"]
    if adapter is not None and adapter["type"] == "mtlora":
        adapter |= {"rank": 2, "task_rank": 2}
    elif adapter is not None and adapter["type"] == "recon" and "swin" in backbone["name"]:
        adapter["layers"] = ["layers.2.*.fc2"]
    return decode(Recipe, data)


@pytest.mark.filterwarnings("ignore::polytask.errors.PolytaskWarning")
def test_shrunk_recipe_takes_a_step(recipe: Recipe, rooms: Path, tmp_path: Path) -> None:
    small = shrunk(recipe, tmp_path)
    small.check()
    torch.manual_seed(0)
    tasks = small.phase_tasks(small.phases[0])
    model = small.model.build(small.task_set(), small.data.image_size).train()
    for action in small.phases[0].actions:
        action.apply(model)
    learned = [p.meta.build(model, tuple(small.phase_tasks(p))) for p in small.phases if p.meta is not None]
    balancer = small.balancer.build(small.task_set())
    optim = small.phases[0].optim or small.optim
    optimizer = optim.optimizer(model, list(balancer.parameters()), 2)
    samples = small.data.open(small.run.train_split, tasks, train=True, seed=0)
    size = 2 * balancer.batches
    batch = next(iter(train_loader(samples, batch_size=size, epoch=0, seed=0)))
    setup = StepSetup(
        tasks=tasks,
        balancer=balancer,
        optimizer=optimizer,
        objective=small.phases[0].objective,
        partition=model.partition(),
        clip_norm=optim.clip_norm,
    )
    for each in (setup, *(dataclasses.replace(setup, learner=learner) for learner in learned)):
        log = train_step(model, batch, each)
        assert log.losses
        assert log.gradient_norm > 0
