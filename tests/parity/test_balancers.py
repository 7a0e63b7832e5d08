"""Directions and weights against exact references, LibMTL and torchjd; see golden/balancers/meta.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polytask.balancers import weights
from polytask.balancers.engine import GradientBalancer
from polytask.balancers.gramian import MoDo, SDMGrad
from polytask.balancers.rowwise import DBMTL, ExcessMTL, GradDrop, MoCo
from polytask.balancers.scalar import FAMO, DynamicAverage
from polytask.balancers.solvers import gradvac, pcgrad
from polytask.balancers.weighting import Problem, Rowwise

FILE = np.load(Path(__file__).parent / "golden" / "balancers" / "vectors.npz")
INDEX: dict[str, tuple[str, int, list[int]]] = json.loads(FILE["index"].tobytes())
CASES = sorted({key.partition("/")[0] for key in INDEX} - {"seq"})
SPECIAL = ("opposite", "pareto_stationary", "rank2", "all_zero")
NATIVE: dict[str, Any] = {"reduction": "native"}
EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "MGDA": ("mgda", {}),
    "CAGrad_rescale0": ("cagrad", {"c": 0.5, "rescale": 0}),
    "CAGrad_rescale1": ("cagrad", {"c": 0.5, "rescale": 1}),
    "AlphaFair_0.5": ("fairgrad", {"alpha": 0.5, "max_norm": 0}),
    "AlphaFair_1.0": ("nash", {"max_norm": 0}),
    "AlphaFair_2.0": ("fairgrad", {"alpha": 2, "max_norm": 0}),
    "UPGrad_noreg": ("upgrad", {}),
    "DualProj_noreg": ("dualproj", {}),
    "IMTLG": ("imtl", {"variant": "g"}),
    "Aligned_min": ("amtl", {}),
    "Aligned_median": ("amtl", {"scale": "median"}),
    "Aligned_rmse": ("amtl", {"scale": "rmse"}),
    "PCGrad_mean_over_orders": ("pcgrad", {"order": "expected"}),
}
FAIR = {"max_norm": 0}
ECOS = ("T2_P7_dup", "T2_P50_dup", "x1e-3", "x1e5", "zero_row")  # its tolerances are absolute
# weights of 0.001 at least, 250 steps at most
CLAMPED = ("T2_P7_ali", "T2_P50_ali", "T2_P7_dup", "T2_P50_dup", "T5", "zero_row")
# where the libraries are right: (method, settings, tolerance, cases left out)
LIBRARIES: dict[str, tuple[str, dict[str, Any], float, tuple[str, ...]]] = {
    "libmtl/EW": ("equal", {}, 1e-6, ()),
    "libmtl/GLS": ("geo", {}, 1e-6, ()),
    "libmtl/Aligned_MTL": ("amtl", {"reduction": "sum"}, 1e-4, SPECIAL),
    "libmtl/FairGrad": ("fairgrad", {"alpha": 1, **FAIR}, 1e-4, ("x1e-3",)),
    "libmtl/FairGrad@2": ("fairgrad", {"alpha": 2, **FAIR}, 1e-4, ("x1e-3",)),
    "libmtl/Nash_MTL": ("nash", FAIR, 1e-4, ECOS),
    "torchjd/NashMTL": ("nash", FAIR, 1e-4, ECOS),
    "libmtl/MGDA@l2": ("mgda", {"normalize": "l2"}, 1e-4, ("T3_P50_conflict_im", "T5_P50_dup", "zero_row")),
    "libmtl/MGDA@loss+": ("mgda", {"normalize": "loss+"}, 1e-4, CLAMPED),
    "libmtl/PCGrad": ("pcgrad", {}, 1e-5, ("T3", "T5")),  # their orders are random
    "libmtl/GradVac": ("gvac", {"beta": 0.5}, 1e-5, ("T3", "T5")),
    "torchjd/IMTLG": ("imtl", {"variant": "g"}, 1e-4, ()),
    "torchjd/AlignedMTL": ("amtl", {}, 1e-4, ("zero_row",)),
    "torchjd/AlignedMTL@median": ("amtl", {"scale": "median"}, 1e-4, ("zero_row",)),
    "torchjd/AlignedMTL@rmse": ("amtl", {"scale": "rmse"}, 1e-4, ("zero_row",)),
    "torchjd/FairGrad": ("fairgrad", {"alpha": 1, **FAIR}, 1e-4, ("x1e-3",)),
    "torchjd/FairGrad@2": ("fairgrad", {"alpha": 2, **FAIR}, 1e-4, ("x1e-3",)),
    "torchjd/UPGrad": ("upgrad", {"legacy": True}, 1e-6, ("zero_row",)),
    "torchjd/DualProj": ("dualproj", {"legacy": True}, 1e-6, ("zero_row",)),
    "torchjd/CAGrad": ("cagrad", {"c": 0.5, "rescale": 0}, 1e-4, ("x1e-3", "zero_row")),
    "torchjd/PCGrad": ("pcgrad", {}, 1e-6, ("T3", "T5")),
    "torchjd/GradVac": ("gvac", {"beta": 0.5}, 1e-6, ("T3", "T5")),
}


def array(key: str) -> Any:
    kind, start, shape = INDEX[key]
    return FILE[kind][start : start + int(np.prod(shape))].reshape(shape).astype(float)


def direction(case: str, name: str, settings: dict[str, Any]) -> Any:
    j = array(f"{case}/J")
    w, _ = weights(name, j @ j.T, losses=array(f"{case}/losses"), **{**NATIVE, **settings})
    return w @ j


def distance(mine: Any, theirs: Any) -> float:
    return float(np.linalg.norm(mine - theirs) / max(np.linalg.norm(theirs), 1e-300))


def rows(case: str) -> int:
    """Gradients that are not zero; a single one is left as it is, whatever the method."""
    return int(array(f"{case}/J").any(1).sum())


def regular(case: str) -> bool:
    return not any(word in case for word in SPECIAL)


UNIQUE = ("CAGrad", "Aligned", "PCGrad")
"""References that have an answer in special cases too."""


@pytest.mark.parametrize("reference", EXACT)
def test_exact(reference: str) -> None:
    checked = set()
    for case in CASES:
        for kind in ("ref", "ref_drop"):  # the latter without the zero row
            key = f"{case}/{kind}/{reference}/d"
            if key in INDEX and rows(case) > 1 and (regular(case) or reference.startswith(UNIQUE)):
                assert distance(direction(case, *EXACT[reference]), array(key)) < 1e-6, case
                checked.add(case)
    wanted = {case for case in CASES if rows(case) > 1 and (regular(case) or reference.startswith(UNIQUE))}
    assert {case for case in wanted - checked if "zero_row" not in case} == set()


@pytest.mark.parametrize("reference", EXACT)
def test_a_single_gradient_is_left_as_it_is(reference: str) -> None:
    for case in CASES:
        if rows(case) == 1:
            assert distance(direction(case, *EXACT[reference]), array(f"{case}/J").sum(0)) < 1e-12, case


@pytest.mark.parametrize("reference", EXACT)
def test_cases_without_unique_answer(reference: str) -> None:
    name, settings = EXACT[reference]
    for case in CASES:
        if not regular(case):
            j, d = array(f"{case}/J"), direction(case, name, settings)
            assert np.isfinite(d).all(), case
            if "all_zero" in case:
                assert not d.any()
            elif name in ("mgda", "upgrad", "dualproj"):
                assert np.linalg.norm(d) < 1e-9 * np.linalg.norm(j)
            elif name in ("nash", "fairgrad"):  # without solution; bounded by default
                assert np.linalg.norm(direction(case, name, {})) < 1 + 1e-9
            elif name == "cagrad":
                mean = np.linalg.norm(j.mean(0))
                assert np.linalg.norm(d * (1, 1.25)[settings["rescale"]] - j.mean(0)) <= 0.5 * mean * (
                    1 + 1e-9
                )
            else:  # aligned gradients, projections, equal projections
                assert np.linalg.norm(d) <= np.linalg.norm(j, axis=1).sum() * (1 + 1e-9)


@pytest.mark.parametrize("reference", LIBRARIES)
def test_libraries_where_they_are_right(reference: str) -> None:
    name, settings, tolerance, but = LIBRARIES[reference]
    compared = [
        case for case in filter(regular, CASES) if f"{case}/{reference}/d" in INDEX and rows(case) > 1
    ]
    for case in compared:
        if not any(word in case for word in but):
            key = f"{case}/{reference}/d"
            assert distance(direction(case, name, settings), array(key)) < tolerance, case
    assert len(compared) >= 41  # of 43; LibMTL's MGDA stops with an error in two


def test_sign_dropout_by_the_same_draw() -> None:
    for case in CASES:
        j = torch.tensor(array(f"{case}/J"), dtype=torch.float32)
        torch.manual_seed(0)
        draw, out = torch.rand(j.shape[1]), torch.zeros(j.shape[1])
        GradDrop().drop(j, draw, out)
        for library in ("libmtl/GradDrop", "torchjd/GradDrop@f32"):
            assert distance(out.numpy(), array(f"{case}/{library}/d")) < 1e-5, (case, library)


# --- five calls in a row -----------------------------------------------------------------------------

J, LOSSES = array("seq/J"), array("seq/losses")
NAMES = ("a", "b", "c")


def problem(step: int, losses: Any = None) -> Problem:
    values, gram = LOSSES[step] if losses is None else losses, J[step] @ J[step].T
    return Problem(values, np.arange(3), NAMES, gram, gram, step + 1)


@pytest.mark.parametrize(
    ("spec", "reference"),
    [
        (MoCo(legacy=True, reduction="native"), "MoCo"),
        (DBMTL(beta=0.9), "DB_MTL"),
        (ExcessMTL(eta=0.01), "ExcessMTL"),
    ],
)
def test_methods_that_remember_gradients(spec: Rowwise, reference: str) -> None:
    balancer = GradientBalancer(spec, NAMES)
    for step in range(5):
        if step == 3:  # through a file
            state, balancer = balancer.state_dict(), GradientBalancer(spec, NAMES)
            balancer.load_state_dict(state)
        out = torch.zeros(50, dtype=torch.float64)
        spec.direct(torch.tensor(J[step]), problem(step), balancer.memory, out)
        assert distance(out.numpy(), array(f"seq/libmtl/{reference}/d")[step]) < 1e-6


@pytest.mark.parametrize(
    ("spec", "reference"), [(MoDo(), "MoDoWeighting"), (SDMGrad(lr=5.0), "SDMGradWeighting")]
)
def test_weights_by_descent(spec: Any, reference: str) -> None:
    state: Any = {}
    for step in range(5):
        w = spec.solve(problem(step), state)
        assert w == pytest.approx(array(f"seq/torchjd/{reference}/w")[step], abs=1e-7)


def test_famo() -> None:
    spec, state = FAMO(), {}  # type: ignore[var-annotated]
    for step in range(5):
        w = spec.solve(problem(step), state)
        assert w == pytest.approx(array("seq/torchjd_scalar/FAMO/dloss")[step], abs=1e-6)
        if step < 4:  # the next losses are those after the update
            spec.look_back(problem(step, LOSSES[step + 1]), state)


def test_dynamic_average() -> None:
    spec, state = DynamicAverage(), {}  # type: ignore[var-annotated]
    for step in range(3):
        w = 3 * spec.solve(problem(step), state)
        assert w == pytest.approx(array("seq/torchjd_scalar/DWA/dloss")[step], abs=1e-6)
        spec.epoch_end(state)


def test_geometric_mean() -> None:
    for step in range(5):
        w, _ = weights("geo", J[step] @ J[step].T, losses=LOSSES[step], reduction="native")
        assert w == pytest.approx(array("seq/torchjd_scalar/GeometricMean/dloss")[step], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "reference", "slope"),
    [("uw", "UW", lambda w, x: 0.5 - w * x), ("imtl_l", "IMTLL", lambda w, x: w * x - 1)],
)
def test_learned_scales(name: str, reference: str, slope: Any) -> None:
    """Under plain descent with rate 0.1, as the vectors were made; the library itself uses Adam."""
    s = np.zeros(3)
    for step in range(5):
        w, _ = weights(name, np.eye(3), {"s": s}, losses=LOSSES[step])
        assert w == pytest.approx(array(f"seq/torchjd_scalar/{reference}/dloss")[step], abs=1e-6)
        s = s - 0.1 * slope(w, LOSSES[step])


def test_impartial_learning_with_its_scales() -> None:
    """As ``test_learned_scales``, in LibMTL."""
    s = np.zeros(3)
    for step in range(5):
        w, _ = weights("imtl", J[step] @ J[step].T, {"s": s}, losses=LOSSES[step], **NATIVE)
        assert distance(w @ J[step], array("seq/libmtl/IMTL/d")[step]) < 1e-6
        s = s - 0.1 * (np.exp(s) * LOSSES[step] - 1)


def test_uncertainty_from_another_start() -> None:
    s = np.full(3, -0.5)
    for step in range(5):
        w, _ = weights("uw", np.eye(3), {"s": s}, losses=LOSSES[step])
        assert w == pytest.approx(array("seq/libmtl/UW/w")[step], rel=1e-6)
        s = s - 0.1 * (0.5 - w * LOSSES[step])


def drawn_orders(n: int, draw: int) -> Any:
    """As torchjd draws them: a permutation of ``draw`` for each row, n of all or n - 1 of the others."""
    torch.manual_seed(0)
    drawn = [torch.randperm(draw).numpy() for _ in range(n)]
    others = [np.delete(np.arange(n), i) for i in range(n)]
    return np.stack([p[p != i] if draw == n else others[i][p] for i, p in enumerate(drawn)])


def test_projections_by_the_same_orders() -> None:
    for case in filter(regular, CASES):
        j = array(f"{case}/J")
        if rows(case) == len(j) > 1:
            w = pcgrad(j @ j.T, drawn_orders(len(j), len(j)))
            assert distance(w @ j, array(f"{case}/torchjd/PCGrad/d")) < 1e-6, case
            w, _ = gradvac(j @ j.T, np.zeros((len(j), len(j))), 0.5, drawn_orders(len(j), len(j) - 1))
            tolerance = 1e-2 if "x1e-3" in case else 1e-6  # torchjd's is absolute
            assert distance(w @ j, array(f"{case}/torchjd/GradVac/d")) < tolerance, case


def test_gradient_vaccine_remembers() -> None:
    target = np.zeros((3, 3))
    for step in range(5):
        w, target = gradvac(J[step] @ J[step].T, target, 0.5, drawn_orders(3, 2))
        assert w == pytest.approx(array("seq/torchjd/GradVac/w")[step], rel=1e-6)
