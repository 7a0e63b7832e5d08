"""Parameter counts that the page about baselines tells."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from polytask.errors import PolytaskWarning
from polytask.recipe import load_recipe
from polytask.types import count

PAGE = Path(__file__).parents[2] / "docs" / "systems" / "baselines.md"
ROWS = re.findall(
    r"^\| `(pascal/\w+)` ((?:\| [\d,]+ ){4})\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
)


def test_all_rows_are_read() -> None:
    assert len(ROWS) == 7


@pytest.mark.parametrize(("name", "cells"), ROWS)
def test_parameters(name: str, cells: str) -> None:
    recipe = load_recipe(Path(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PolytaskWarning)
        model = recipe.model.build(recipe.task_set(), recipe.data.image_size)
    trainable = dict(model.partition().trainable())
    backbone = {n: p for n, p in trainable.items() if n.startswith("backbone.")}
    total, parts = sum(p.numel() for p in model.parameters()), (count(trainable), count(backbone))
    found = [total, *parts, parts[0] - parts[1]]
    assert found == [int(cell.replace(",", "")) for cell in cells.strip("| ").split(" | ")]
    rank = getattr(recipe.model.adapter, "rank", 0)
    if rank:  # 70,656 scalars per unit of rank in Swin-T's qkv, proj, fc1 and fc2
        assert parts[1] == 70_656 * rank * (4 if "per_task" in name else 1)
