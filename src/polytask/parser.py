"""The command line: verbs and their options. Imports nothing heavy."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from polytask import __version__
from polytask.convert import SYSTEMS


def parser() -> argparse.ArgumentParser:
    """All verbs and their options; the name of the verb comes out as ``verb``."""
    codes = "0 done, 1 bug, 2 configuration or usage, 3 data missing or malformed, 4 checkpoint does not fit"
    root = argparse.ArgumentParser(prog="polytask", description="Efficient multi-task learning in vision.",
                                   epilog=f"exit codes: {codes}, 5 training diverged")  # fmt: skip
    root.add_argument("--version", action="version", version=f"polytask {__version__}")
    verbs = root.add_subparsers(required=True, metavar="VERB")
    train = _verb(verbs, "train", "train a recipe", "polytask train rooms/mtlora --set optim.lr=1e-3")
    _recipe_options(train)
    train.add_argument("--output", type=Path, help="run folder (default: runs/<name of the recipe>)")
    train.add_argument("--resume", action="store_true", help="continue an interrupted run")
    train.add_argument("--slurm", nargs="*", metavar="K=V", help="submit as a job, with submitit settings")
    evaluate = _verb(verbs, "eval", "score a trained run", "polytask eval runs/mtlora --split test")
    evaluate.add_argument("--split", help="default: the split evaluated in training")
    evaluate.add_argument("--set", action="append", default=[], metavar="A.B=V", dest="sets", help="settings")
    evaluate.add_argument("--quick", action="store_true", help="leave out scores that take long (odsF)")
    predict = _verb(verbs, "predict", "predict for own images",
                    "polytask predict runs/mtlora photo.jpg")  # fmt: skip
    for verb in (evaluate, predict):
        verb.add_argument("run", type=Path)
        verb.add_argument("--checkpoint", default="last", choices=("last", "best"))
    predict.add_argument("images", type=Path, nargs="+")
    predict.add_argument("--output", type=Path, help="folder for the pictures (default: RUN/predictions)")
    predict.add_argument("--tasks", help="comma-separated subset")
    predict.add_argument("--raw", action="store_true", help="also write the values as .npy")
    profile = _verb(verbs, "profile", "parameters, MACs, time and memory of a recipe or run",
                    "polytask profile recipes/pascal/mtlora_r64.yaml --json")  # fmt: skip
    _recipe_options(profile)
    profile.add_argument("--repeats", type=_count, default=5, help="timed passes; 0 for none")
    _comparing_verbs(verbs)
    _convert_verb(verbs)
    listing = _verb(verbs, "list", "what there is", "polytask list tasks")
    kinds = "tasks datasets backbones adapters necks heads balancers pipelines actions meta recipes"
    listing.add_argument("what", choices=kinds.split())
    listing.add_argument("pattern", nargs="?", default="*", help="for backbones, e.g. '*swin*'")
    show = _verb(verbs, "show", "the fully resolved recipe", "polytask show rooms/mtlora")
    _recipe_options(show)
    show.add_argument("--schema", action="store_true", help="print the JSON schema of recipes instead")
    _data_verbs(verbs)
    return root


def _verb(verbs: Any, name: str, text: str, example: str) -> argparse.ArgumentParser:
    texts = {"help": text, "description": text, "epilog": f"example: {example}"}
    added: argparse.ArgumentParser = verbs.add_parser(name, **texts)
    added.set_defaults(verb=added.prog.removeprefix("polytask "))
    added.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    return added


def _count(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"a whole number from {least} on is needed, got {text!r}")
    return int(text)


def _recipe_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe", type=Path, nargs="?", help="YAML file, or name of a shipped recipe")
    verb.add_argument("--cfg", type=Path, help="same as RECIPE")
    verb.add_argument("--set", action="append", default=[], metavar="A.B=V", dest="sets", help="a change")
    verb.add_argument("--opts", nargs="+", default=[], metavar="K V", help="same as --set, in pairs")


def _convert_verb(verbs: Any) -> None:
    example = f"polytask convert {next(iter(SYSTEMS))} ckpt_epoch_299.pth --output runs/official"
    text = "official checkpoints and settings to runs and recipes, and back"
    convert = _verb(verbs, "convert", text, example)
    convert.add_argument("system", choices=SYSTEMS)
    convert.add_argument("file", type=Path, help="checkpoint, settings (.yaml), or run with --to-official")
    convert.add_argument("--config", type=Path, help="official settings of a checkpoint, in place of its own")
    convert.add_argument(
        "--output", type=Path, help="default: runs/<name> or, for settings, <name>.recipe.yaml"
    )
    convert.add_argument("--tasks", help="comma-separated official names, for settings (default: the usual)")
    convert.add_argument("--set", action="append", default=[], metavar="A.B=V", dest="sets",
                         help="a change of the recipe")  # fmt: skip
    convert.add_argument("--to-official", type=Path, metavar="FILE", help="write a run's weights there")
    convert.add_argument("--checkpoint", default="last", choices=("last", "best"), help="of the run")


def _comparing_verbs(verbs: Any) -> None:
    compare = _verb(verbs, "compare", "table and page about runs", "polytask compare runs/*")
    compare.add_argument("runs", type=Path, nargs="+", help="run folders, or folders that hold some")
    compare.add_argument("--report", type=Path, help="also write a self-contained HTML page here")
    study = _verb(verbs, "study", "train all recipes of a folder with several seeds, and compare them",
                  "polytask study rooms/balancers --seeds 0 1 2")  # fmt: skip
    study.add_argument("folder", type=Path, help="with recipes, or name of a shipped one")
    study.add_argument(
        "--seeds", type=_count, nargs="+", default=(0, 1, 2), metavar="N", help="default: 0 1 2"
    )
    study.add_argument("--output", type=Path, help="default: runs/<name of the folder>")
    study.add_argument("--set", action="append", default=[], metavar="A.B=V", dest="sets",
                       help="a change of every recipe")  # fmt: skip
    _delta_m_verb(verbs)
    demo = _verb(verbs, "demo", "train and compare on the embedded rooms", "polytask demo")
    demo.add_argument("--output", type=Path, default=Path("runs/demo"))


def _delta_m_verb(verbs: Any) -> None:
    """With the spellings of the script that comes with a fork of the official code."""
    gains = _verb(verbs, "delta-m", "gain over single-task models at every evaluation of training logs",
                  "polytask delta-m train.log --baseline semseg=67.21 normals=17.97")  # fmt: skip
    gains.add_argument("logs", type=Path, nargs="*", metavar="LOG", help="run folder, or printed log")
    gains.add_argument("--log-file", type=Path, action="append", default=[], help="same as LOG")
    gains.add_argument("--baseline", nargs="+", action="extend", default=[], metavar="TASK=SCORE",
                       help="scores of the single-task models")  # fmt: skip
    for name in ("semseg", "human", "saliency", "normals", "depth", "edge"):
        gains.add_argument(f"--{name}-st", type=f"{name}={{}}".format, dest="baseline", action="append",
                           metavar="SCORE", help=f"same as --baseline {name}=SCORE")  # fmt: skip
    gains.add_argument("--baselines", "--st-json", type=Path, metavar="FILE", help="the same as JSON")
    gains.add_argument("--paper", "--use-paper-st", action="store_true", help="baselines of the paper")
    gains.add_argument("--tasks", nargs="+", default=[], help="default: those with a baseline")
    gains.add_argument("--csv", "--csv-out", type=Path, metavar="FILE", help="also write the history here")


def _data_verbs(verbs: Any) -> None:
    group = verbs.add_parser("data", help="look at a dataset", description="look at a dataset",
                             epilog="example: polytask data verify pascal_context DIR")  # fmt: skip
    data = group.add_subparsers(required=True, metavar="VERB")
    check = _verb(data, "verify", "check every file; exit 3 with a list of problems",
                  "polytask data verify own.yaml")  # fmt: skip
    look = _verb(data, "preview", "contact sheet of samples with all labels",
                 "polytask data preview rooms --output rooms.png")  # fmt: skip
    look.add_argument("--output", type=Path, default=Path("preview.png"))
    look.add_argument("--count", type=lambda text: _count(text, 1), default=6, help="how many samples")
    keep = _verb(data, "prepare", "decode slow labels once and keep them in the cache",
                 "polytask data prepare pascal_context DIR")  # fmt: skip
    keep.add_argument("--workers", type=_count, default=os.cpu_count(), help="processes that share the work")
    export = _verb(data, "export", "rooms, faces or pets in the layout of a public archive",
                   "polytask data export NYUD_MT DIR --set preset=nano")  # fmt: skip
    export.add_argument("layout", help="such as PASCAL_MT; a wrong one lists all")
    pack = _verb(data, "pack", "tar files (WebDataset) out of a dataset",
                 "polytask data pack pascal_context DIR OUT")  # fmt: skip
    for verb in (check, look, keep, pack):
        verb.add_argument("name", help="dataset (see `polytask list datasets`), or recipe (--set data.A=V)")
        verb.add_argument("root", nargs="?", help="folder of the dataset")
        verb.add_argument("--tasks", help="comma-separated subset")
    for verb in (export, pack):
        verb.add_argument("out", type=Path, help="folder to make")
        verb.add_argument("--count", type=lambda text: _count(text, 1), help="most samples per split or tar")
    for verb in (check, look, keep, export, pack):
        verb.add_argument("--set", action="append", default=[], metavar="A=V", dest="sets", help="a setting")
        verb.add_argument("--split", help="default: all, or the first (preview)")
