"""The training loop: phases, epochs, steps, evaluations and checkpoints."""

from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path

import timm
import torch

import polytask
from polytask import parallel
from polytask.adapters.recon import REPORT
from polytask.balancers.recon import ConflictMeter
from polytask.config import decode, encode
from polytask.data.base import BatchOrder, Samples, eval_loader
from polytask.engine import checkpoint
from polytask.engine.evaluator import Scores, evaluate
from polytask.engine.log import RunLog, check_trackers, make_trackers
from polytask.engine.phase import PhaseRun, Position
from polytask.errors import CheckpointError, ConfigError, PolytaskWarning
from polytask.files import differences, dump_yaml, load_yaml, make_folder, to_json, write_text
from polytask.meta import Learner
from polytask.model import MultiTaskModel
from polytask.phases import PhaseSpec
from polytask.recipe import Recipe
from polytask.seeding import seed_all

_HARMLESS = frozenset(
    {
        "data.root", "data.cache", "data.workers", "data.eval_batch_size", "run.device", "run.trackers",
        "run.checkpoint_every",
    }
)  # fmt: skip
"""What may differ when a run is resumed, since it changes no result."""


def check_folder(run: Path, recipe: Recipe, *, resume: bool) -> None:
    """Whether a recipe can be trained in a folder.

    Raises:
        ConfigError: the folder holds a run already, or (``resume``) one of another recipe.
        CheckpointError: there is nothing to resume.
    """
    file = run / "recipe.yaml"
    if not resume:
        if file.exists() or (run / "checkpoints").exists():
            hint = "use --resume or another --output"
            raise ConfigError("the folder holds a run already", where=str(run), hint=hint)
        return
    if not file.exists():
        raise CheckpointError("there is no run to resume", where=str(run), hint="leave out --resume")
    before = decode(Recipe, load_yaml(file), source=str(file))
    changed = [path for path in differences(encode(before), encode(recipe)) if path not in _HARMLESS]
    if changed:
        raise ConfigError(
            "the run was started with another recipe",
            where=str(file),
            got=f"other values of {', '.join(changed)}",
            hint="resume with the same recipe, or use another --output",
        )


def _warn_of_normalization(recipe: Recipe) -> None:
    """Pretrained weights expect the mean and standard deviation they were trained with."""
    backbone, pipeline = recipe.model.backbone, recipe.data.pipeline
    cfg = timm.get_pretrained_cfg(backbone.name) if backbone.pretrained or backbone.weights else None
    if cfg is None or (tuple(cfg.mean), tuple(cfg.std)) == (pipeline.mean, pipeline.std):
        return
    warnings.warn(
        f"the pretrained weights of {backbone.name} expect images of mean {list(cfg.mean)} and standard "
        f"deviation {list(cfg.std)}, the pipeline makes {list(pipeline.mean)} and {list(pipeline.std)}; "
        "set data.pipeline.mean and data.pipeline.std",
        PolytaskWarning, stacklevel=2,
    )  # fmt: skip


class Trainer:
    """Runs a recipe in a folder.

    All that can be refused is refused here, before the folder is written to.

    Args:
        recipe: what to do.
        run: folder for the results; must not hold another run unless ``resume``.
        resume: continue from ``checkpoints/last`` (or start, if the run died before the first one).

    Raises:
        ConfigError: see ``check_folder``; a package of a tracker is missing; an action matches nothing.
        CheckpointError: the checkpoint to resume from is damaged or does not fit.
        DatasetNotFoundError: see ``DatasetSpec.records``.
    """

    def __init__(self, recipe: Recipe, run: Path, *, resume: bool = False) -> None:
        self.recipe, self.run, self.resume = recipe, run, resume
        self.device = parallel.choose_device(recipe.run.device)
        parallel.first(lambda: check_folder(run, recipe, resume=resume))
        check_trackers(recipe.run.trackers)
        found = resume and os.path.lexists(run / "checkpoints" / "last")
        self.saved = checkpoint.read(run) if found else None
        self.tasks = recipe.task_set()
        self.bf16 = recipe.run.precision == "bf16"
        self.validation = self._open_data()
        seed_all(recipe.seed)
        with warnings.catch_warnings():
            if self.saved is not None:  # its weights replace random ones, which are warned of
                warnings.simplefilter("ignore", PolytaskWarning)
            model = recipe.model.build(self.tasks, recipe.data.image_size)
        self.model: MultiTaskModel = model.to(self.device)
        self.balancer = recipe.balancer.build(self.tasks).to(self.device)
        self.balancer.seed = recipe.seed
        if recipe.run.parallel == "fsdp":
            blocks = [name for name, _, _ in self.model.backbone.blocks()]
            parallel.shard(self.model.backbone.net, blocks, self.device)
        for action in (action for phase in recipe.phases for action in phase.actions):
            action.check(self.model)
        self.learner: Learner | None = None
        for phase in recipe.phases:
            self.build_learner(phase)
        self.changed: set[str] = set()
        """Parameters that no longer have the values the backbone was built with."""
        self.position = Position()
        _warn_of_normalization(recipe)
        self._rehearse()
        parallel.first(self._claim_folder)

    def build_learner(self, phase: PhaseSpec) -> Learner | None:
        """What makes the losses of a phase with ``meta``; raises as ``Meta.build``."""
        if phase.meta is None:
            return None
        factors = phase.objective.losses
        tasks = [name for name in self.recipe.phase_tasks(phase) if factors is None or name in factors]
        return phase.meta.build(self.model, tasks).to(self.device)

    @torch.no_grad()
    def _rehearse(self) -> None:
        """One forward pass and an order of samples: what they refuse is refused before writing."""
        data, image = self.recipe.data, torch.zeros(1, 3, *self.recipe.data.image_size, device=self.device)
        samples = len(data.records(self.recipe.run.train_split))
        BatchOrder(length=samples, batch_size=data.batch_size, seed=0, epoch=0, world=parallel.world())
        if parallel.world() > len(self.validation):
            raise ConfigError("fewer samples to evaluate than processes", where="run.eval_split")
        self.model.eval()(image)

    def fit(self) -> Scores:
        """Train through all phases; returns the last scores and writes ``scores.json``."""
        log = self._log() if parallel.rank() == 0 else None
        try:
            for index, phase in enumerate(self.recipe.phases):
                PhaseRun(self, index, phase, log).go()
        finally:
            if log is not None:
                log.close()
        if parallel.rank() == 0:
            self._write_scores()
        return self.position.scores

    def _open_data(self) -> Samples:
        """The evaluation samples; the training split is opened too, so that what is missing shows at once."""
        data, settings = self.recipe.data, self.recipe.run
        seen = data.open(settings.train_split, self.tasks, train=True).records
        samples = data.open(settings.eval_split, self.tasks, train=False)
        both = {record.id for record in seen} & {record.id for record in samples.records}
        if both and settings.train_split != settings.eval_split:
            warnings.warn(
                f"{len(both)} of {len(samples)} samples of run.eval_split {settings.eval_split!r} are "
                f"trained on too (run.train_split {settings.train_split!r}), so their scores flatter",
                PolytaskWarning, stacklevel=2,
            )  # fmt: skip
        if settings.max_eval_batches is None:
            return samples
        count = settings.max_eval_batches * data.eval_batch_size
        return Samples(data, samples.records[:count], self.tasks, train=False)

    def _claim_folder(self) -> None:
        make_folder(self.run, "--output")
        for name in ("last", "best"):
            checkpoint.sweep(self.run, name)
        file, text = self.run / "recipe.yaml", dump_yaml(encode(self.recipe))
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            write_text(file, text)

    def _log(self) -> RunLog:
        step = self.saved.manifest["step"] if self.saved is not None else 0
        trackers = make_trackers(self.recipe.run.trackers, self.run, encode(self.recipe))
        return RunLog(self.run / "metrics.jsonl", step, trackers)

    def _write_scores(self) -> None:
        result = {
            "name": self.recipe.name,
            "scores": self.position.scores,
            "tasks": {
                name: {"headline": task.headline, "higher_is_better": task.higher_is_better}
                for name, task in self.tasks.items()
            },
            "split": self.recipe.run.eval_split,
            "samples": len(self.validation),
            "step": self.position.global_step,
            "train_seconds": round(self.position.seconds, 2),
            "seed": self.recipe.seed,
            "polytask": polytask.__version__,
            "torch": torch.__version__,
        }
        if isinstance(self.balancer, ConflictMeter):
            write_text(self.run / REPORT, to_json(encode(self.balancer.conflicts())) + "\n")
        write_text(self.run / "scores.json", to_json(result) + "\n")

    # --- checkpoints -----------------------------------------------------------------------------

    def save(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint of the present position (the first process writes, all take part)."""
        weights, left_out = checkpoint.weights_to_save(self.model, self.changed)
        state = {
            "position": dataclasses.asdict(self.position),
            "optimizer": checkpoint.optimizer_state(optimizer),
            "balancer": {k: v.cpu() for k, v in self.balancer.state_dict().items()},
            "meta": {k: v.cpu() for k, v in self.learner.state_dict().items()} if self.learner else {},
        }
        manifest = {
            "step": self.position.global_step,
            "backbone": self.recipe.model.backbone.name,
            "base_digest": self.model.backbone.base_digest,
            "left_out": left_out,
            "tasks": list(self.tasks),
        }
        if parallel.rank() == 0:
            checkpoint.save(self.run, name, weights, state, manifest)

    def evaluate(self) -> Scores:
        """Scores on the evaluation split."""
        data = self.recipe.data
        batches = eval_loader(
            self.validation,
            batch_size=data.eval_batch_size,
            rank=parallel.rank(),
            world=parallel.world(),
            workers=data.workers,
        )
        return evaluate(self.model, self.tasks, batches, bf16=self.bf16)
