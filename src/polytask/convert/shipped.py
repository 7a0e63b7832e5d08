"""A finished pretraining run -> the shipped weights: ``python -m polytask.convert.shipped RUN``."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import safetensors.torch
import timm
import torch

from polytask.backbones.shipped import WEIGHTS
from polytask.config import encode
from polytask.engine.checkpoint import file_hash
from polytask.files import write_text
from polytask.runs import Run


def export(run: Run, target: Path = WEIGHTS) -> str:
    """Write the run's backbone as half-precision safetensors, with its record and log beside it.

    Args:
        run: a finished run of ``recipes/rooms/pretrain.yaml``.
        target: weight file to write.

    Returns:
        SHA-256 of the weight file.

    Raises:
        CheckpointError: the run is not finished or damaged.
    """
    scores = run.scores
    net = timm.create_model(run.recipe.model.backbone.name)  # with the final norm that features do not need
    net.load_state_dict(net.state_dict() | run.model().backbone.net.state_dict())
    state = {name: value.half().contiguous() for name, value in net.state_dict().items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(state, target)
    record = {
        "sha256": file_hash(target),
        "parameters": sum(value.numel() for value in state.values()),
        "dtype": "float16",
        "scores": scores["scores"],
        "steps": scores["step"],
        "torch": scores["torch"],
        "threads": torch.get_num_threads(),
        "recipe": encode(run.recipe),
    }
    write_text(target.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    shutil.copyfile(run.path / "metrics.jsonl", target.with_suffix(".log.jsonl"))
    return str(record["sha256"])


if __name__ == "__main__":
    sys.stdout.write(export(Run(Path(sys.argv[1]))) + "\n")
