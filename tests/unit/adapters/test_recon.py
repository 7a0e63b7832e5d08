"""Choosing layers by measured conflicts, and what the adapter refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from polytask.adapters.recon import REPORT, Conflicts, Measured, Recon, rank_agreement
from polytask.config import decode, encode, json_schema
from polytask.errors import ConfigError
from polytask.model import ModelSpec
from tests.helpers import SWIN, TASKS, build, model_spec

CONFLICTS = Conflicts(
    tasks=("a", "b", "c"),
    steps=10,
    layers={  # size, then cosines in [-1, -0.5), [-0.5, 0), [0, 0.5), [0.5, 1]
        "backbone.net.layers.0.blocks.0.mlp.fc1": (100, 3, 5, 2, 0),
        "backbone.net.layers.1.blocks.0.mlp.fc1": (1000, 9, 0, 1, 0),
        "backbone.net.layers.1.blocks.0.norm1": (10, 0, 6, 4, 0),
        "backbone.net.layers.2.blocks.0.norm1": (10, 0, 0, 9, 1),
        "neck.shared": (50, 10, 0, 0, 0),
    },
)
FC1, WIDE, NORM = (
    "layers.0.blocks.0.mlp.fc1", "layers.1.blocks.0.mlp.fc1", "layers.1.blocks.0.norm1"
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / REPORT).write_text(json.dumps(encode(CONFLICTS)))
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, (WIDE, FC1, NORM)),  # neither what never conflicts nor what is outside the backbone
        ({"top": 2}, (WIDE, FC1)),
        ({"threshold": -0.5}, (WIDE, FC1)),
        ({"min_size": 11}, (WIDE, FC1)),
        ({"budget": 0.2}, (NORM, FC1)),  # two copies more of 110 parameters, of 1170
        ({"budget": 2.0}, (NORM, FC1, WIDE)),
        ({"budget": 2.0, "top": 1}, (NORM,)),
    ],
)
def test_choice(run: Path, settings: dict[str, Any], wanted: tuple[str, ...]) -> None:
    spec = decode(Recon, {"layers": {"run": str(run), **settings}})
    assert spec.layers == wanted
    assert decode(Recon, encode(spec)) == spec and str(run) not in str(encode(spec))


def test_rank_agreement() -> None:
    generator = np.random.default_rng(0)

    def random() -> Conflicts:
        layers = {f"x{k}": (1, *generator.integers(0, 4, 4).tolist()) for k in range(20)}
        return Conflicts(tasks=("a", "b"), steps=1, layers=layers)

    one, other = random(), random()
    scores = [[x.ranking()[f"x{k}"] for k in range(20)] for x in (one, other)]
    assert rank_agreement(one, other) == pytest.approx(spearmanr(*scores).statistic)
    assert rank_agreement(one, one) == pytest.approx(1.0)


def test_schema_offers_names_and_a_run() -> None:
    assert "run" in json.dumps(json_schema(ModelSpec)["$defs"]["Measured"]["properties"])
    assert Measured(run=Path("x"), top=1).choose(CONFLICTS) == [f"backbone.net.{WIDE}"]


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (None, {}, r"layers: .*No such file.*conflicts\.json.*a finished run with `balancer: recon`"),
        ("{", {}, r"layers: .*Expecting property name"),
        ('{"tasks": []}', {}, r"layers: conflicts\.json: .*required key is missing"),
        (json.dumps(encode(CONFLICTS)), {"treshold": 0}, r"unknown key; did you mean 'threshold'"),
        (json.dumps(encode(CONFLICTS)), {"threshold": 0.5}, r"threshold: .*less than or equal to 0"),
        (json.dumps(encode(CONFLICTS)), {"budget": 1e-9}, r"layers: no measured layer .*raise .*`budget`"),
        (json.dumps(encode(CONFLICTS)), {"min_size": 9999}, r"layers: no measured layer .*lower `min_size`"),
    ],
)
def test_measured_conflicts_that_cannot_be_read(
    tmp_path: Path, content: str | None, settings: dict[str, Any], message: str
) -> None:
    if content is not None:
        (tmp_path / REPORT).write_text(content)
    with pytest.raises(ConfigError, match=message):
        decode(Recon, {"layers": {"run": str(tmp_path), **settings}})


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["layers.0.blocks.0.mlp.fc3"], r"layers: 'layers\.0.*fc3' is no layer .*did you mean 'layers.*fc"),
        (["layers.0.blocks.0.attn"], "'layers.0.blocks.0.attn' is no layer with parameters"),  # has parts
        (["patch_embed.*", "stages.*"], r"'stages\.\*' is no layer"),
    ],
)
def test_names_that_match_nothing(layers: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(model_spec(SWIN, adapter={"type": "recon", "layers": layers}))


def test_patterns() -> None:
    model = build(
        model_spec(SWIN, adapter={"type": "recon", "layers": ["layers.3.*.fc1", "layers.3.*norm?"]})
    )
    owned = {name.partition(".tasks.")[0] for name in model.partition().per_task["depth"] if "net." in name}
    below = "backbone.net.layers.3"
    assert owned == {f"{below}.blocks.0.{x}" for x in ("mlp.fc1", "norm1", "norm2")}
    assert tuple(model.partition().per_task) == tuple(TASKS)
