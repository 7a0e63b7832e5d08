"""Scores of a model on a split."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from polytask.data.base import eval_loader
from polytask.engine.evaluator import evaluate, headlines, plain_errors
from polytask.errors import DataError
from polytask.runs import Run
from polytask.types import Sample
from tests.conftest import Make, train_quietly


def test_scores_do_not_depend_on_the_batch_size(trained: Path) -> None:
    run = Run(trained)
    model, samples = run.model(), run.recipe.data.open("val", run.tasks, train=False)
    results = [evaluate(model, run.tasks, eval_loader(samples, batch_size=size)) for size in (1, 5, 32)]
    for other in results[1:]:
        for task, metrics in results[0].items():
            assert other[task] == pytest.approx(metrics, rel=1e-6)


def test_shares_of_two_processes_add_up(trained: Path) -> None:
    run = Run(trained)
    samples = run.recipe.data.open("val", run.tasks, train=False)
    model = run.model()
    whole = evaluate(model, run.tasks, eval_loader(samples, batch_size=8))
    both = [batch for rank in (0, 1) for batch in eval_loader(samples, batch_size=8, rank=rank, world=2)]
    assert sum(len(batch["id"]) for batch in both) == len(samples)
    halves = evaluate(model, run.tasks, both)
    for task, metrics in whole.items():
        assert halves[task] == pytest.approx(metrics, rel=1e-6)


def test_mode_and_parameters_are_left_alone(trained: Path) -> None:
    run = Run(trained)
    model, samples = run.model(), run.recipe.data.open("val", run.tasks, train=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for mode in (True, False):
        model.train(mode)
        modes = {name: module.training for name, module in model.named_modules()}
        scores = evaluate(model, run.tasks, eval_loader(samples, batch_size=16))
        assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(headlines(scores, run.tasks)) == ["semseg", "depth", "scene"]
    assert headlines(scores, run.tasks)["semseg"] == scores["semseg"]["mIoU"]


class Broken(Dataset[Sample]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Sample:
        raise DataError("image cannot be read", where="a/b.jpg", hint="delete it")


@pytest.mark.parametrize("workers", [0, 1])
def test_error_of_a_loader_process_is_one_sentence(workers: int) -> None:
    loader = DataLoader(Broken(), num_workers=workers)
    with pytest.raises(DataError) as caught:
        list(plain_errors(loader))
    assert str(caught.value) == "a/b.jpg: image cannot be read; delete it"


def test_other_errors_pass() -> None:
    def batches() -> Iterator[Sample]:
        yield {}
        raise RuntimeError("bug")

    with pytest.raises(RuntimeError, match="bug"):
        list(plain_errors(batches()))


def test_limit_counts_what_was_scored(small: Make, rooms: Path, tmp_path: Path) -> None:
    train_quietly(small("run.max_eval_batches=2", "data.eval_batch_size=5"), tmp_path / "run")
    assert Run(tmp_path / "run").scores["samples"] == 10
