"""The demonstration: single-task models, hard sharing and MTLoRA on the rooms, and a page about them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from polytask.engine.launch import train
from polytask.engine.trainer import check_folder
from polytask.recipe import load_recipe, recipe_folder
from polytask.report import Comparison, write_report

FOLDER = "rooms/demo"


def run_demo(output: Path, say: Callable[[str], None]) -> tuple[Comparison, Path]:
    """Train every recipe of ``recipes/rooms/demo`` below ``output`` and write ``report.html`` there.

    Runs that are complete are kept, an interrupted one is resumed.

    Raises:
        ConfigError: a folder there holds a run of another recipe.

    Returns:
        the comparison and the path of the page.
    """
    names = sorted(file.stem for file in (recipe_folder() / FOLDER).glob("[!_]*.yaml"))
    runs = []
    for number, name in enumerate(names, 1):
        recipe = load_recipe(Path(f"{FOLDER}/{name}"))
        run = output / recipe.name
        runs.append(run)
        resume = (run / "recipe.yaml").exists()
        if resume:
            check_folder(run, recipe, resume=True)
        if (run / "cost.json").exists():
            say(f"[{number}/{len(names)}] {recipe.name}: already done")
            continue
        started = time.monotonic()
        train(recipe, run, resume=resume)
        say(f"[{number}/{len(names)}] {recipe.name}: {time.monotonic() - started:.0f} s")
    page = output / "report.html"
    comparison = write_report(runs, page, title="polytask demo: multi-task learning on rooms")
    return comparison, page
