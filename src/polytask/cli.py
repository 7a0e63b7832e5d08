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

from polytask.errors import ConfigError, PolytaskError, PolytaskWarning
from polytask.parser import parser

if TYPE_CHECKING:
    from polytask.recipe import Recipe
    from polytask.study import Study


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (see ``polytask --help``)."""
    args = parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = _warn_once()
        warnings.simplefilter("always", PolytaskWarning)
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    try:
        return VERBS[args.verb](args)
    except PolytaskError as error:
        for line in str(error).splitlines():
            say(f"error: {line}")
        return error.exit_code
    except KeyboardInterrupt:
        hints = {"train": "; continue with --resume"} | dict.fromkeys(
            ("study", "demo"), "; the same command continues"
        )
        say(f"interrupted{hints.get(args.verb, '')}")
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


def _warn_once() -> Callable[..., None]:
    """Shows each warning once: what a recipe warns of when it is checked, it would repeat when it runs."""
    shown = set()

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        new = issubclass(category, PolytaskWarning) and str(message) not in shown
        if new and os.environ.get("RANK", "0") == "0":
            shown.add(str(message))
            say(f"warning: {message}")

    return show


def _done(args: argparse.Namespace, result: object) -> int:
    if args.json:
        emit(result)
    return 0


def _load(args: argparse.Namespace) -> Recipe:
    from polytask.errors import ConfigError
    from polytask.recipe import load_recipe

    if (args.recipe is None) == (args.cfg is None):
        raise ConfigError("name one recipe", where="RECIPE or --cfg", hint="see: polytask list recipes")
    if len(args.opts) % 2:
        raise ConfigError("--opts takes pairs of key and value", got=" ".join(args.opts))
    pairs = zip(args.opts[::2], args.opts[1::2], strict=True)
    return load_recipe(args.recipe or args.cfg, [*args.sets, *(f"{key}={value}" for key, value in pairs)])


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
    from polytask.comparison import compare
    from polytask.report import write_report
    from polytask.tables import print_comparison

    comparison = write_report(args.runs, args.report) if args.report else compare(args.runs)
    print_comparison(comparison)
    if args.report:
        say(f"report: {args.report}")
    return _done(args, comparison.as_dict())


def _convert(args: argparse.Namespace) -> int:
    from polytask.convert import official

    if args.to_official:
        count = official.export_run(args.system, args.file, args.to_official, args.checkpoint)
        say(f"official checkpoint: {args.to_official}, {count} tensors")
        return _done(args, {"file": str(args.to_official), "tensors": count})
    settings = args.file.suffix in (".yaml", ".yml")
    for option, given, fits in (("--tasks", args.tasks, settings), ("--config", args.config, not settings)):
        if given and not fits:
            kind = "checkpoint, which has its own tasks" if option == "--tasks" else "settings file"
            raise ConfigError(f"is of no use with a {kind}", where=option, got=str(given))
    if settings:
        tasks = [name.strip() for name in args.tasks.split(",")] if args.tasks else None
        kind, output = "recipe", args.output or Path(f"{args.file.stem}.recipe.yaml")
        draft = official.convert_settings(args.system, args.file, output, tasks=tasks, changes=args.sets)
    else:
        kind, output = "run", args.output or Path("runs") / args.file.stem
        draft = official.convert_checkpoint(
            args.system, args.file, output, settings=args.config, changes=args.sets
        )
    say(f"{kind}: {output}")
    return _done(args, {kind: str(output), "notes": list(draft.notes)})


def _delta_m(args: argparse.Namespace) -> int:
    from polytask.deltam import history, write_csv
    from polytask.tables import print_history

    tasks = [name for text in args.tasks for name in text.split(",") if name]
    found = history([*args.logs, *args.log_file], given=args.baseline, file=args.baselines,
                    paper=args.paper, tasks=tasks)  # fmt: skip
    if args.csv:
        write_csv(found, args.csv)
    print_history(found)
    return _done(args, found.as_dict())


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
    from polytask.catalog import chosen

    return chosen(args.name, args.root, args.sets, args.tasks)


def _data_verify(args: argparse.Namespace) -> int:
    from polytask.data.verification import verify
    from polytask.tables import print_verification

    spec, tasks = _dataset(args)
    report = verify(spec, [args.split] if args.split else None, tasks)
    print_verification(report, tasks)
    return _problems(args, vars(report))


def _data_prepare(args: argparse.Namespace) -> int:
    from polytask.data.cache import prepare

    spec, tasks = _dataset(args)
    result = prepare(spec, [args.split] if args.split else None, args.workers, tasks)
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

    spec, tasks = _dataset(args)
    save_picture(contact_sheet(spec, args.split, args.count, tasks), args.output)
    say(f"preview: {args.output}")
    return _done(args, {"preview": str(args.output)})


def _data_export(args: argparse.Namespace) -> int:
    from polytask.data.export import export

    return _written(args, export(args.layout, args.out, args.sets, split=args.split, count=args.count))


def _data_pack(args: argparse.Namespace) -> int:
    from polytask.data.packed import pack

    (spec, tasks), splits = _dataset(args), [args.split] if args.split else ()
    return _written(args, pack(spec, args.out, splits, tasks=tasks, per_shard=args.count or 256))


def _written(args: argparse.Namespace, counts: dict[str, int]) -> int:
    say(f"{args.out}: {', '.join(f'{split} {count}' for split, count in counts.items())}")
    return _done(args, {"folder": str(args.out), "counts": counts})


def _study(args: argparse.Namespace) -> int:
    from polytask.study import run_study

    folder, output = args.folder, args.output or Path("runs") / args.folder.resolve().name
    return _studied(args, output, run_study(folder, output, say, seeds=args.seeds, overrides=args.sets))


def _demo(args: argparse.Namespace) -> int:
    from polytask.study import run_study

    title = "polytask demo: multi-task learning on rooms"
    return _studied(args, args.output, run_study("rooms/demo", args.output, say, title=title))


def _studied(args: argparse.Namespace, output: Path, study: Study) -> int:
    from polytask.tables import print_comparison

    result: dict[str, object] = {"tasks": {}, "rows": []}
    if study.comparison is not None:
        print_comparison(study.comparison)
        say(f"report: {output / 'report.html'}")
        result = study.comparison.as_dict()
    for run, error in study.failed.items():
        say(f"error: {run.name} failed: {error}")
    _done(args, result | {"failed": {str(run): str(error) for run, error in study.failed.items()}})
    return next((error.exit_code for error in study.failed.values()), 0)


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train, "eval": _eval, "predict": _predict, "profile": _profile, "compare": _compare,
    "convert": _convert, "delta-m": _delta_m, "study": _study, "demo": _demo, "list": _list, "show": _show,
    "data verify": _data_verify, "data preview": _data_preview, "data prepare": _data_prepare,
    "data export": _data_export, "data pack": _data_pack,
}  # fmt: skip
