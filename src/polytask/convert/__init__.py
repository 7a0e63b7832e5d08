"""Checkpoints and settings of the official codes, in and out; one module per system."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polytask.model import MultiTaskModel
    from polytask.recipe import Recipe

SYSTEMS = {"mtlora": "polytask.convert.mtlora", "mlore": "polytask.convert.mlore"}
"""Names on the command line, and the modules that know the official files."""


def load_official(system: str, file: Path | str, recipe: Recipe | Path | str) -> MultiTaskModel:
    """The model of a recipe with the weights of an official checkpoint, in eval mode.

    Args:
        system: one of ``SYSTEMS``.
        file: what the official code saved, pickled or as safetensors; nothing in it is run.
        recipe: a recipe, its file or the name of a shipped one. Its dataset need not be there.

    Raises:
        ConfigError: no such system or recipe, or settings that do not fit each other.
        CheckpointError: a file that is damaged, refused, or of another variant than the recipe.
        TaskMismatchError: the file has other tasks than the recipe.
    """
    from polytask.convert.official import load

    return load(system, Path(file), recipe)
