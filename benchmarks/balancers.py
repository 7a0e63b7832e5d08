"""Balancers: a step of every method, ours and torchjd's, against the passes that it cannot do without.

A convolutional trunk (five stages of two 3x3 convolutions with batch norm and ReLU, the first of stride 2,
then the global mean) on 16 images of 64x64; per task a linear head and a cross-entropy of ten classes; SGD.
Ours is used in a loop of one's own, through `polytask.balancers.balancer`. torchjd goes task by task
(`parallel_chunk_size=1`, its fast way on CPU) and does not join the Jacobian where it need not
(`optimize_gramian_computation`); its CAGrad and NashMTL want cvxpy with CLARABEL and ECOS.

The floor of T tasks is one forward and T backward passes of the trunk, the heads forward and backward once,
and SGD's update, each timed next to the steps in the same round. Where both sides do the same arithmetic,
their gradients are compared before anything is timed.

    python benchmarks/balancers.py [--quick] [--json] [--sizes 1M 10M] [--tasks 3 10 40] [--plot FILE]
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torchjd.aggregation as jd
import torchjd.scalarization as js
from balancers_plot import plot
from common import interleave, options, report
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torchjd.autojac import jac_to_grad, mtl_backward

from polytask.allocator import keep_freed_memory
from polytask.balancers import balancer
from polytask.progress import track

WIDTHS = {"1M": (24, 48, 96, 144, 208), "10M": (32, 64, 128, 256, 864)}
"""1,133,416 and 9,885,792 parameters."""
AGAINST = {
    "exact": "floor", "sketch": "floor + backward", "three batches": "3 floors", "features": "equal",
    "last layer": "floor", "losses": "equal", "famo": "equal + forward",
}  # fmt: skip
TARGETS = {
    "exact": 1.15,
    "sketch": 1.15,
    "three batches": 1.15,
    "last layer": 1.15,
    "features": 1.2,
    "losses": 1.15,
    "famo": 1.15,
}
"""Largest ratios that are wanted; `equal` is a step of the plain sum of the losses, without a balancer."""
NATIVE = {"reduction": "native"}
Step = Callable[[], object]


def alone(kind: Callable[..., Any], **settings: Any) -> Callable[[int], Any]:
    """What makes an object of torchjd that need not know the number of tasks."""
    return lambda _: kind(**settings)


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        name: of ours.
        kind: see ``AGAINST``.
        theirs: torchjd's, for T tasks.
        settings: of ours.
        alike: settings in which ours does the same arithmetic as theirs; None if there are none.
        tolerance: of the relative difference then.
        most: tasks of that comparison at most; with more, draws differ.
    """

    name: str
    kind: str
    theirs: Callable[[int], Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    alike: Mapping[str, Any] | None = None
    tolerance: float = 1e-4
    most: int = 3

    @property
    def label(self) -> str:
        """With its mode."""
        return " ".join([self.name, *self.settings.values()])


METHODS = (
    Method("mgda", "exact", alone(jd.MGDA), alike=NATIVE, tolerance=2e-2),  # they stop early
    Method("cagrad", "exact", alone(jd.CAGrad, c=0.4), alike={**NATIVE, "rescale": 0}, tolerance=1e-3),
    Method("nash", "exact", jd.NashMTL, alike={}, tolerance=1e-2),
    Method("fairgrad", "exact", alone(jd.FairGrad, alpha=2.0), alike={**NATIVE, "max_norm": 0}),
    Method("pivrg", "exact"),
    Method("pcgrad", "exact", alone(jd.PCGrad), alike={}, most=2),
    Method("gvac", "exact", alone(jd.GradVac), alike={"beta": 0.5}, most=2),
    Method("imtl", "exact", alone(jd.IMTLG), alike={**NATIVE, "variant": "g"}),
    Method("amtl", "exact", alone(jd.AlignedMTL), alike=NATIVE),
    Method("upgrad", "exact", alone(jd.UPGrad), alike=NATIVE, tolerance=2e-2),  # theirs is regularized
    Method("dualproj", "exact", alone(jd.DualProj), alike=NATIVE, tolerance=2e-2),
    Method("gsd", "exact", alone(jd.GradDrop)),
    Method("moco", "exact"),
    Method("db_mtl", "exact"),
    Method("excessmtl", "exact", alone(jd.ExcessMTL)),
    Method("modo", "three batches"),
    Method("sdmgrad", "three batches"),
    Method("upgrad", "sketch", settings={"mode": "sketch:256"}),
    Method("mgda", "features", settings={"mode": "features"}),
    Method("imtl", "features", settings={"mode": "features"}),
    Method("amtl", "features", settings={"mode": "features"}),
    Method("gn", "last layer"),
    Method("equal", "losses", alone(js.Sum), alike={}),
    Method("si", "losses"),
    Method("geo", "losses", alone(js.GeometricMean), alike=NATIVE),
    Method("rlw", "losses", alone(js.Random)),
    Method("uw", "losses", js.UW, alike={}),
    Method("imtl_l", "losses", js.IMTLL, alike={}),
    Method("dwa", "losses", alone(js.DWA), alike={}),
    Method("stch", "losses", alone(js.STCH, mu=1.0)),
    Method("go4align", "losses"),
    Method("famo", "famo", js.FAMO, alike=NATIVE),
)


def passes(tasks: int) -> int:
    """Backward passes that are timed at a time: more where the floor has many."""
    return max(3, tasks // 4)


class Setting:
    """A trunk with its heads, optimizer and three batches."""

    def __init__(self, size: str, tasks: int) -> None:
        torch.manual_seed(0)
        channels, layers = 3, []
        for width, stride in product(WIDTHS[size], (2, 1)):
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.heads = nn.ModuleDict({f"task{i}": nn.Linear(channels, 10) for i in range(tasks)})
        self.shared, self.n, self.passes = list(self.trunk.parameters()), tasks, passes(tasks)
        self.optimizer = torch.optim.SGD([*self.shared, *self.heads.parameters()], lr=1e-3)
        self.images, self.labels = torch.randn(3, 16, 3, 64, 64), torch.randint(10, (3, tasks, 16))

    def losses(self, z: Tensor, batch: int = 0) -> dict[str, Tensor]:
        """One per task."""
        rows = zip(self.heads.items(), self.labels[batch], strict=True)
        return {name: F.cross_entropy(head(z), y) for (name, head), y in rows}

    def update(self) -> None:
        """By what ``.grad`` holds."""
        self.optimizer.step()

    def equal(self) -> None:
        """A step of the plain sum."""
        self.optimizer.zero_grad()
        torch.stack([*self.losses(self.trunk(self.images[0])).values()]).sum().backward()
        self.update()

    def parts(self) -> dict[str, Step]:
        """What a floor consists of; several backward passes."""
        kept: dict[str, Tensor] = {}

        def forward() -> None:
            kept["z"] = self.trunk(self.images[0])

        def backward() -> None:
            for _ in range(self.passes):
                torch.autograd.grad(kept["z"], self.shared, torch.ones_like(kept["z"]), retain_graph=True)

        def heads() -> None:
            z = kept["z"].detach().requires_grad_()
            torch.stack([*self.losses(z).values()]).sum().backward()

        return {"forward": forward, "backward": backward, "heads": heads, "update": self.update}

    def ours(self, method: Method, settings: Mapping[str, Any]) -> tuple[Step, Step]:
        """What fills ``.grad``, and what follows the update."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # cheap modes warn of angles
            side = balancer(method.name, self.heads, **settings)

        def fill() -> None:
            first, *more = (self.trunk(self.images[i]) for i in range(side.batches))
            parts = [self.losses(z, i) for i, z in enumerate(more, 1)]
            ends = first if side.mode == "features" else ()
            side.step(self.losses(first), shared=self.trunk, features=ends, parts=parts)

        @torch.no_grad()
        def look_back() -> None:
            if side.looks_back:
                side.after_step(self.losses(self.trunk(self.images[0])))

        return fill, look_back

    def theirs(self, method: Method) -> tuple[Step, Step] | None:
        """The same by torchjd; None if it, or the solver that it wants, is not there."""
        try:
            side = method.theirs and method.theirs(self.n)
        except ImportError:
            side = None
        if side is None:
            return None
        if isinstance(side, jd.Aggregator):
            return partial(self._aggregate, side), lambda: None
        return self._scalarize(side)

    def _aggregate(self, side: Any) -> None:
        z = self.trunk(self.images[0])
        own = [list(head.parameters()) for head in self.heads.values()]
        losses = list(self.losses(z).values())
        mtl_backward(losses, z, tasks_params=own, shared_params=self.shared, parallel_chunk_size=1)
        fast = isinstance(side, jd.GramianWeightedAggregator)
        jac_to_grad(self.shared, side, **({"optimize_gramian_computation": True} if fast else {}))

    def _scalarize(self, side: Any) -> tuple[Step, Step]:
        learns = [p for p in side.parameters() if not isinstance(side, js.FAMO)]
        optimizer = torch.optim.Adam(learns, lr=0.01) if learns else None

        def fill() -> None:
            if optimizer:
                optimizer.zero_grad()
            side(torch.stack([*self.losses(self.trunk(self.images[0])).values()])).backward()

        @torch.no_grad()
        def follow() -> None:
            if optimizer:
                optimizer.step()
            if isinstance(side, js.FAMO):
                side.update(torch.stack([*self.losses(self.trunk(self.images[0])).values()]))

        return fill, follow

    def step(self, fill: Step, follow: Step) -> None:
        """A whole one."""
        self.optimizer.zero_grad()
        fill()
        self.update()
        follow()


def check(size: str) -> dict[str, float]:
    """Relative differences of the trunk's gradients between both sides, where they do the same arithmetic.

    Raises:
        AssertionError: they do not.
    """
    found = {}
    for method in METHODS:
        setting = Setting(size, method.most)
        theirs = setting.theirs(method) if method.alike is not None else None
        if theirs is None:
            continue
        with torch.no_grad():  # the first two tasks oppose each other
            one, two = (setting.heads[f"task{i}"].weight for i in range(2))
            two.copy_(-one)
        gradients = []
        for fill, _ in (setting.ours(method, method.alike or {}), theirs):
            setting.optimizer.zero_grad()
            fill()
            gradients.append(torch.cat([p.grad.flatten() for p in setting.shared]))
        difference = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
        assert difference < method.tolerance, (method.name, difference)
        found[method.name] = difference
    return found


def time(setting: Setting, method: Method, rounds: int) -> dict[str, list[float]]:
    """Seconds of each part and of both sides, round by round."""
    sides: dict[str, Step] = {**setting.parts(), "equal": setting.equal}
    if AGAINST[method.kind].startswith("equal"):
        del sides["backward"], sides["heads"], sides["update"]
    sides["ours"] = partial(setting.step, *setting.ours(method, method.settings))
    if theirs := setting.theirs(method):
        sides["torchjd"] = partial(setting.step, *theirs)
    return interleave(sides, rounds)


def reference(kind: str, tasks: int, seconds: Mapping[str, list[float]], number: int) -> float:
    """What a step of that kind cannot do without, in seconds of one round."""
    part = {name: values[number] for name, values in seconds.items()}
    if AGAINST[kind].startswith("equal"):
        return part["equal"] + (part["forward"] if kind == "famo" else 0.0)
    found = part["forward"] + (tasks + (kind == "sketch")) * part["backward"] / passes(tasks) + part["heads"]
    return (3 if kind == "three batches" else 1) * found + part["update"]


def rounds(parameters: int, method: Method, tasks: int, quick: bool) -> int:
    """Fewer where steps are long; many where differences are small."""
    single, work = AGAINST[method.kind].startswith("equal"), parameters * tasks
    return 3 if quick else 21 if single else 7 if work < 2e7 else 4 if work < 6e7 else 2 if work < 2e8 else 1


def show(ratios: Mapping[str, float], chosen: Sequence[Method], columns: Sequence[tuple[str, int]]) -> None:
    """A table for people, in Markdown."""
    table = Table("method", "against", box=MARKDOWN)
    for size, tasks in columns:
        table.add_column(f"{size}, T = {tasks}", justify="right", no_wrap=True)
    for method in chosen:
        pairs = [pair(ratios, method, *column) for column in columns]
        cells = [" / ".join(f"{x:.2f}" for x in found if x) for found in pairs]
        table.add_row(method.label, AGAINST[method.kind], *cells)
    Console(width=160).print(table)


def key(method: Method, size: str, tasks: int, side: str) -> str:
    """Name of a ratio."""
    return f"{size}, {tasks} tasks, {method.label}, {side}"


def pair(ratios: Mapping[str, float], method: Method, size: str, tasks: int) -> tuple[float | None, ...]:
    """Ours and torchjd's, None where there is none."""
    return tuple(ratios.get(key(method, size, tasks, side)) for side in ("ours", "torchjd"))


def misses(ratios: Mapping[str, float], columns: Sequence[tuple[str, int]]) -> str:
    """What is above its target or slower than torchjd."""
    high, slow = [], []
    for method, column in product(METHODS, columns):
        mine, other = pair(ratios, method, *column)
        if mine and mine > TARGETS.get(method.kind, mine):
            high.append(f"{method.label} {column[0]} T={column[1]} {mine:.2f}")
        if mine and other and mine > other:
            slow.append(f"{method.label} {column[0]} T={column[1]} {mine / other:.2f}")
    return f"above target: {', '.join(high) or 'none'}\nslower than torchjd: {', '.join(slow) or 'none'}"


def main() -> None:
    """Compare, then time."""
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=WIDTHS, help="of the trunk; default: all, quick: 1M")
    parser.add_argument("--tasks", nargs="+", type=int, help="default: 3 10 40, quick: 3 10")
    parser.add_argument(
        "--methods", nargs="+", choices=sorted({m.name for m in METHODS}), help="default: all"
    )
    parser.add_argument("--plot", type=Path, help="SVG to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="You are solving a parameterized")  # torchjd's NashMTL
    keep_freed_memory()  # as `polytask train` does; for both sides
    sizes = args.sizes or (["1M"] if args.quick else [*WIDTHS])
    columns = [*product(sizes, args.tasks or ([3, 10] if args.quick else [3, 10, 40]))]
    chosen = [m for m in METHODS if not args.methods or m.name in args.methods]
    differences = check(sizes[0])
    ratios, counts, milliseconds = {}, {}, {}
    for (size, tasks), method in track([*product(columns, chosen)], "steps"):
        setting = Setting(size, tasks)
        count = rounds(sum(p.numel() for p in setting.shared), method, tasks, args.quick)
        seconds = time(setting, method, count)
        floors = [reference(method.kind, tasks, seconds, i) for i in range(count)]
        for side in ("ours", "torchjd"):
            if side in seconds:
                found = statistics.median(x / y for x, y in zip(seconds[side], floors, strict=True))
                ratios[key(method, size, tasks, side)] = found
        counts.setdefault(f"{size}, {tasks} tasks, {method.kind}", count)
        milliseconds.setdefault(f"{size}, {tasks} tasks, {method.kind}", []).append(1e3 * min(floors))
    settings = {
        "rounds": counts, "unit": "CPU seconds of one thread, median over the rounds of step / reference",
        "least reference in ms": {name: round(min(values), 1) for name, values in milliseconds.items()},
        "relative differences": differences,
    }  # fmt: skip
    if args.plot:
        shown = [m for m in chosen if m.kind in ("exact", "three batches")]
        panels = {
            f"{size} shared parameters, {tasks} tasks": {m.label: pair(ratios, m, size, tasks) for m in shown}
            for size, tasks in columns
        }
        plot(args.plot, panels, len(columns) // len(sizes), TARGETS["exact"])
    if not args.json:
        show(ratios, chosen, columns)
    report(args, settings, ratios if args.json else {}, misses(ratios, columns))


if __name__ == "__main__":
    main()
