"""What the benchmark scripts share: interleaved timing in CPU seconds of one thread, and their output."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def options(description: str) -> argparse.ArgumentParser:
    """``--quick`` and ``--json``, as every script takes them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="smaller and fewer; ends within two minutes")
    parser.add_argument(
        "--json", action="store_true", help="print one object with machine, settings and ratios"
    )
    return parser


def parse(description: str) -> argparse.Namespace:
    """For a script without options of its own."""
    return options(description).parse_args()


def interleave(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each side, sides taking turns, after one warm-up each."""
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    return seconds


def median_ratio(seconds: Mapping[str, list[float]], side: str, reference: str) -> float:
    """Median over the rounds of side / reference."""
    return statistics.median(a / b for a, b in zip(seconds[side], seconds[reference], strict=True))


def report(
    args: argparse.Namespace, settings: Mapping[str, Any], ratios: Mapping[str, float], notes: str = ""
) -> None:
    """Print the result: JSON for programs, lines for people."""
    machine = {
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if args.json:
        json.dump(
            {"machine": machine, "settings": dict(settings), "ratios": dict(ratios)}, sys.stdout, indent=1
        )
        sys.stdout.write("\n")
        return
    lines = [f"{name:42s} {value:7.3f}" for name, value in ratios.items()]
    sys.stdout.write("\n".join([f"machine {machine}", f"settings {dict(settings)}", *lines, notes]) + "\n")
