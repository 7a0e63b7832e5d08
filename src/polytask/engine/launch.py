"""From a recipe to a finished run folder: in this process, under torchrun, or as a SLURM job."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from polytask import parallel
from polytask.allocator import keep_freed_memory
from polytask.cost import CostReport, cost, profile
from polytask.engine.evaluator import Scores
from polytask.engine.trainer import Trainer
from polytask.errors import ConfigError, MissingDependencyError
from polytask.files import to_json, write_text
from polytask.progress import set_quiet
from polytask.recipe import Recipe

DAY = 24 * 60


def train(recipe: Recipe, run: Path, *, resume: bool = False) -> Scores:
    """Train a recipe in a folder and write its scores and costs; joins torchrun's group if there is one.

    Args:
        recipe: a checked recipe.
        run: folder of the run.
        resume: continue an interrupted run; implied when torchrun or SLURM restarts the command.

    Raises:
        PolytaskError: of the kind that fits, see ``Trainer`` and ``train_step``.
    """
    device = parallel.choose_device(recipe.run.device)
    if device.type == "cpu":
        keep_freed_memory()
    created = parallel.start(device)
    is_first = parallel.rank() == 0
    resume = resume or (restarted() and (run / "recipe.yaml").exists())
    if not is_first:
        set_quiet(True)
    try:
        trainer = Trainer(recipe, run, resume=resume)
        scores = trainer.fit()
    finally:
        if created:
            dist.destroy_process_group()
    if is_first and not (run / "cost.json").exists():  # else a complete run was resumed
        write_text(run / "cost.json", to_json(_measure(trainer).as_dict()) + "\n")
    return scores


def restarted() -> bool:
    """Whether torchrun (elastic) or SLURM (requeue) started this same command again after a failure."""
    return any(
        int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    )


def _measure(trainer: Trainer) -> CostReport:
    """Cost of the trained model, in this process alone."""
    recipe = trainer.recipe
    if recipe.run.parallel == "fsdp":  # its parameters are spread over processes
        return profile(recipe)
    return cost(trainer.model, trainer.tasks, recipe.data.image_size, memory=parallel.world() == 1)


def submit(arguments: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> str:
    """Submit ``polytask ARGUMENTS`` under torchrun as a SLURM job; returns the job's id.

    Args:
        arguments: the command line without ``--slurm``.
        folder: where submitit keeps its files.
        settings: submitit parameters (``slurm_partition``, ``nodes``, ``gpus_per_node``, ``timeout_min``…);
            ``cluster=local`` runs the job on this machine, ``processes`` sets processes per node;
            ``timeout_min`` is a day unless given.

    Raises:
        MissingDependencyError: submitit is not installed.
        ConfigError: a parameter it does not know.
    """
    try:
        import submitit
    except ImportError:
        raise MissingDependencyError("--slurm needs submitit", hint="pip install 'polytask[slurm]'") from None
    options = dict(settings)
    cluster, processes = options.pop("cluster", "slurm"), options.pop("processes", None)
    try:
        executor = submitit.AutoExecutor(folder=str(folder), cluster=cluster)
        nodes = int(options.setdefault("nodes", 1))
        options.setdefault("timeout_min", DAY)  # submitit's default is five minutes
        per_node = int(processes or options.get("gpus_per_node") or 1)
        executor.update_parameters(tasks_per_node=1, **options)
    except RuntimeError as error:
        hint = "run this where sbatch is, or use cluster=local for a job on this machine"
        raise ConfigError(
            f"there is no such cluster ({error})", where="--slurm", got=cluster, hint=hint
        ) from None
    except (NameError, TypeError, ValueError) as error:
        raise ConfigError(f"submitit refuses a parameter ({error})", where="--slurm") from None
    job = executor.submit(run_node, list(arguments), nodes, per_node)
    return str(job.job_id)


def run_node(arguments: list[str], nodes: int, processes: int) -> int:
    """Body of the job on each node: torchrun with the first node as meeting point."""
    import subprocess

    import submitit

    host = submitit.helpers.TorchDistributedEnvironment().master_addr if nodes > 1 else "localhost"
    meeting = ["--standalone"] if nodes == 1 else ["--rdzv-backend=c10d", f"--rdzv-endpoint={host}:29400"]
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={processes}",
        *meeting, "-m", "polytask", *arguments,
    ]  # fmt: skip
    environment = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    return subprocess.run(command, check=True, env=environment).returncode
