"""The command line: verbs to functions, exit codes, and the only place that prints.

Nothing heavy is imported before a verb runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polytask import __version__
from polytask.errors import PolytaskError, PolytaskWarning

if TYPE_CHECKING:
    from polytask.recipe import Recipe

Verb = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (see ``polytask --help``)."""
    args = parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("always", PolytaskWarning)
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    verb: Verb = args.verb
    try:
        return verb(args)
    except PolytaskError as error:
        for line in str(error).splitlines():
            say(f"error: {line}")
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted; continue with --resume" if verb is _train else "interrupted")
        return 130
    except BrokenPipeError:  # the reader of stdout has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def say(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


def emit(value: object) -> None:
    """A result for programs, on stdout."""
    from polytask.files import to_json

    print(to_json(value), flush=True)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, PolytaskWarning) and os.environ.get("RANK", "0") == "0":
        say(f"warning: {message}")


# --- parser ----------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    codes = "0 done, 1 bug, 2 configuration or usage, 3 data missing or malformed, 4 checkpoint does not fit"
    root = argparse.ArgumentParser(prog="polytask", description="Efficient multi-task learning in vision.",
                                   epilog=f"exit codes: {codes}, 5 training diverged")  # fmt: skip
    root.add_argument("--version", action="version", version=f"polytask {__version__}")
    verbs = root.add_subparsers(required=True, metavar="VERB")
    train = _verb(verbs, "train", _train, "train a recipe", "polytask train rooms/mtlora --set optim.lr=1e-3")
    _recipe_options(train)
    train.add_argument("--output", type=Path, help="run folder (default: runs/<name of the recipe>)")
    train.add_argument("--resume", action="store_true", help="continue an interrupted run")
    train.add_argument("--slurm", nargs="*", metavar="K=V", help="submit as a job, with submitit settings")
    evaluate = _verb(verbs, "eval", _eval, "score a trained run", "polytask eval runs/mtlora --split test")
    evaluate.add_argument("--split", help="default: the split evaluated in training")
    evaluate.add_argument("--set", action="append", default=[], metavar="A.B=V", dest="sets", help="settings")
    evaluate.add_argument("--quick", action="store_true", help="leave out scores that take long (odsF)")
    predict = _verb(verbs, "predict", _predict, "predict for images", "polytask predict runs/mtlora x.jpg")
    for verb in (evaluate, predict):
        verb.add_argument("run", type=Path)
        verb.add_argument("--checkpoint", default="last", choices=("last", "best"))
    predict.add_argument("images", type=Path, nargs="+")
    predict.add_argument("--output", type=Path, help="folder for the pictures (default: RUN/predictions)")
    predict.add_argument("--tasks", help="comma-separated subset")
    predict.add_argument("--raw", action="store_true", help="also write the values as .npy")
    profile = _verb(verbs, "profile", _profile, "parameters, MACs, time and memory of a recipe or run",
                    "polytask profile recipes/pascal/mtlora_r64.yaml --json")  # fmt: skip
    _recipe_options(profile)
    profile.add_argument("--repeats", type=_count, default=5, help="timed passes; 0 for none")
    compare = _verb(verbs, "compare", _compare, "table and page about runs", "polytask compare runs/*")
    compare.add_argument("runs", type=Path, nargs="+")
    compare.add_argument("--report", type=Path, help="also write a self-contained HTML page here")
    listing = _verb(verbs, "list", _list, "what there is", "polytask list tasks")
    kinds = "tasks datasets backbones adapters necks heads balancers pipelines actions recipes"
    listing.add_argument("what", choices=kinds.split())
    listing.add_argument("pattern", nargs="?", default="*", help="for backbones, e.g. '*swin*'")
    show = _verb(verbs, "show", _show, "the fully resolved recipe", "polytask show rooms/mtlora")
    _recipe_options(show)
    show.add_argument("--schema", action="store_true", help="print the JSON schema of recipes instead")
    _data_verbs(verbs)
    demo = _verb(verbs, "demo", _demo, "train and compare on the embedded rooms", "polytask demo")
    demo.add_argument("--output", type=Path, default=Path("runs/demo"))
    return root


def _verb(verbs: Any, name: str, run: Verb, text: str, example: str) -> argparse.ArgumentParser:
    texts = {"help": text, "description": text, "epilog": f"example: {example}"}
    added: argparse.ArgumentParser = verbs.add_parser(name, **texts)
    added.set_defaults(verb=run)
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


def _data_verbs(verbs: Any) -> None:
    group = verbs.add_parser("data", help="look at a dataset", description="look at a dataset",
                             epilog="example: polytask data verify rooms")  # fmt: skip
    data = group.add_subparsers(required=True, metavar="VERB")
    check = _verb(data, "verify", _data_verify, "check every file; exit 3 with a list of problems",
                  "polytask data verify pascal_context DIR")  # fmt: skip
    look = _verb(data, "preview", _data_preview, "contact sheet of samples with all labels",
                 "polytask data preview rooms --output rooms.png")  # fmt: skip
    look.add_argument("--output", type=Path, default=Path("preview.png"))
    look.add_argument("--count", type=lambda text: _count(text, 1), default=6, help="how many samples")
    keep = _verb(data, "prepare", _data_prepare, "decode slow labels once and keep them in the cache",
                 "polytask data prepare pascal_context DIR")  # fmt: skip
    keep.add_argument("--workers", type=_count, default=os.cpu_count(), help="processes that share the work")
    export = _verb(data, "export", _data_export, "rooms, faces or pets in the layout of a public archive",
                   "polytask data export NYUD_MT DIR --set preset=nano")  # fmt: skip
    export.add_argument("layout", help="such as PASCAL_MT; a wrong one lists all")
    pack = _verb(data, "pack", _data_pack, "tar files (WebDataset) out of a dataset",
                 "polytask data pack pascal_context DIR OUT")  # fmt: skip
    for verb in (check, look, keep, pack):
        verb.add_argument("name", help="see `polytask list datasets`")
        verb.add_argument("root", nargs="?", help="folder of the dataset")
    for verb in (export, pack):
        verb.add_argument("out", type=Path, help="folder to make")
        verb.add_argument("--count", type=lambda text: _count(text, 1), help="most samples per split or tar")
    for verb in (check, look, keep, export, pack):
        verb.add_argument("--set", action="append", default=[], metavar="A=V", dest="sets", help="a setting")
        verb.add_argument("--split", help="default: all, or the first (preview)")


# --- verbs -----------------------------------------------------------------------------------------


def _done(args: argparse.Namespace, result: object) -> int:
    if args.json:
        emit(result)
    return 0


def _load(args: argparse.Namespace) -> Recipe:
    from polytask.errors import ConfigError
    from polytask.recipe import load_recipe

    if (args.recipe is None) == (args.cfg is None):
        raise ConfigError("name one recipe", where="RECIPE or --cfg", hint="see: polytask list recipes")
    path = args.recipe or args.cfg
    if len(args.opts) % 2:
        raise ConfigError("--opts takes pairs of key and value", got=" ".join(args.opts))
    pairs = zip(args.opts[::2], args.opts[1::2], strict=True)
    return load_recipe(path, [*args.sets, *(f"{key}={value}" for key, value in pairs)])


def _train(args: argparse.Namespace) -> int:
    recipe = _load(args)
    resumed = args.resume and args.recipe is not None and (args.recipe / "recipe.yaml").is_file()
    run = args.output or (args.recipe if resumed else Path("runs") / recipe.name)
    if args.slurm is not None:
        return _submit(args, recipe, run)
    from polytask import parallel
    from polytask.engine.launch import train
    from polytask.tables import print_scores

    scores = train(recipe, run, resume=args.resume)
    if not parallel.is_first():
        return 0
    say(f"run: {run}")
    print_scores(scores)
    return _done(args, {"run": str(run), "scores": scores})


def _submit(args: argparse.Namespace, recipe: Recipe, run: Path) -> int:
    from polytask.engine.launch import submit
    from polytask.engine.trainer import check_folder
    from polytask.errors import ConfigError
    from polytask.files import parse_yaml

    check_folder(run, recipe, resume=args.resume)
    for text in args.slurm:
        if "=" not in text:
            raise ConfigError("settings look like KEY=VALUE", where="--slurm", got=text)
    settings = {k: parse_yaml(v, "--slurm") for k, _, v in (text.partition("=") for text in args.slurm)}
    words = ["train", str(args.recipe or args.cfg), "--output", str(run), *["--resume"] * args.resume]
    words += [word for text in args.sets for word in ("--set", text)]
    words += ["--opts", *args.opts] if args.opts else []
    job = submit(words, run / "slurm", settings)
    say(f"submitted job {job}; its output goes to {run / 'slurm'}")
    return _done(args, {"job": job, "run": str(run)})


def _eval(args: argparse.Namespace) -> int:
    from polytask.runs import Run, score
    from polytask.tables import print_scores

    options = {"checkpoint": args.checkpoint, "split": args.split, "final": not args.quick}
    scores = score(Run(args.run, tuple(args.sets)), **options)
    print_scores(scores)
    return _done(args, {"run": str(args.run), "scores": scores})


def _predict(args: argparse.Namespace) -> int:
    from polytask.predict import predict_files
    from polytask.runs import Run

    run, output = Run(args.run), args.output or args.run / "predictions"
    tasks = [name.strip() for name in args.tasks.split(",")] if args.tasks else None
    results = predict_files(run, args.images, output, tasks=tasks, checkpoint=args.checkpoint, raw=args.raw)
    for result in results:
        say("  ".join(f"{key}: {value}" for key, value in result.items()))
    return _done(args, results)


def _profile(args: argparse.Namespace) -> int:
    from polytask.cost import profile
    from polytask.tables import print_cost

    report = profile(_load(args), repeats=args.repeats)
    print_cost(report.as_dict())
    return _done(args, report.as_dict())


def _compare(args: argparse.Namespace) -> int:
    from polytask.report import compare, write_report
    from polytask.tables import print_comparison

    comparison = write_report(args.runs, args.report) if args.report else compare(args.runs)
    print_comparison(comparison)
    if args.report:
        say(f"report: {args.report}")
    return _done(args, comparison.as_dict())


def _list(args: argparse.Namespace) -> int:
    from polytask.catalog import catalog
    from polytask.tables import table

    rows = catalog(args.what, args.pattern)
    table(args.what, ["name", "what it is"], rows)
    return _done(args, [{"name": name, "description": text} for name, text in rows])


def _show(args: argparse.Namespace) -> int:
    from polytask.config import encode
    from polytask.files import dump_yaml
    from polytask.recipe import recipe_schema

    if args.schema or args.json:
        emit(recipe_schema() if args.schema else encode(_load(args)))
    else:
        print(dump_yaml(encode(_load(args))), end="")
    return 0


def _dataset(args: argparse.Namespace) -> Any:
    from polytask.catalog import dataset

    return dataset(args.name, args.root, args.sets)


def _data_verify(args: argparse.Namespace) -> int:
    from polytask.data.base import verify
    from polytask.tables import print_verification

    report = verify(_dataset(args), [args.split] if args.split else None)
    print_verification(report)
    return _problems(args, vars(report))


def _data_prepare(args: argparse.Namespace) -> int:
    from polytask.data.cache import prepare

    result = prepare(_dataset(args), [args.split] if args.split else None, args.workers)
    say(f"{result['folder']} keeps {', '.join(result['labels']) or 'nothing: no label is slow'}")
    return _problems(args, result)


def _problems(args: argparse.Namespace, result: dict[str, Any]) -> int:
    for problem in result["problems"]:
        say(f"problem: {problem}")
    count = len(result["problems"])
    say("no problems" if not count else "1 problem" if count == 1 else f"{count} problems")
    return _done(args, result) or 3 * bool(count)


def _data_preview(args: argparse.Namespace) -> int:
    from polytask.viz import contact_sheet, save_picture

    save_picture(contact_sheet(_dataset(args), args.split, args.count), args.output)
    say(f"preview: {args.output}")
    return _done(args, {"preview": str(args.output)})


def _data_export(args: argparse.Namespace) -> int:
    from polytask.data.export import export

    return _written(args, export(args.layout, args.out, args.sets, split=args.split, count=args.count))


def _data_pack(args: argparse.Namespace) -> int:
    from polytask.data.packed import pack

    splits, size = [args.split] if args.split else (), args.count or 256
    return _written(args, pack(_dataset(args), args.out, splits, per_shard=size))


def _written(args: argparse.Namespace, counts: dict[str, int]) -> int:
    say(f"{args.out}: {', '.join(f'{split} {count}' for split, count in counts.items())}")
    return _done(args, {"folder": str(args.out), "counts": counts})


def _demo(args: argparse.Namespace) -> int:
    from polytask.demo import run_demo
    from polytask.tables import print_comparison

    comparison, page = run_demo(args.output, say)
    print_comparison(comparison)
    say(f"report: {page}")
    return _done(args, comparison.as_dict())
