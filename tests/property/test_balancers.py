"""What must hold for any gradients: invariants of the methods on random Jacobians."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.balancers import solvers, weights
from polytask.balancers.rowwise import DBMTL, ExcessMTL, GradDrop, MoCo
from polytask.balancers.weighting import GradientWeighting, Problem, Scalarizer, Weighting
from polytask.config import registered

quick = settings(deadline=None, max_examples=30, derandomize=True)
WEIGHTINGS = {n: c for n, c in registered("balancer").items() if issubclass(c, Weighting)}
GRAM = sorted(n for n, c in WEIGHTINGS.items() if issubclass(c, GradientWeighting))
SCALAR = sorted(n for n, c in WEIGHTINGS.items() if issubclass(c, Scalarizer))
NATIVE: dict[str, Any] = {"reduction": "native"}
LIMITED = {"nash", "fairgrad", "pivrg"}
"""Their directions have a largest norm by default."""
ORDERED = {"pcgrad": {"order": "expected"}, "gvac": {"order": "fixed"}}
"""What leaves nothing to chance."""


@st.composite
def jacobians(draw: Any) -> Any:
    """Random rows, of sizes between 1e-2 and 1e2, more columns than rows."""
    n = draw(st.integers(2, 5))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return generator.standard_normal((n, n + 3)) * 10 ** generator.uniform(-2, 2, (n, 1))


def solve(name: str, j: Any, losses: Any = None, **more: Any) -> Any:
    return weights(name, j @ j.T, losses=losses, **{**ORDERED.get(name, {}), **more})[0]


def norm(x: Any) -> float:
    return float(np.linalg.norm(x))


def close(one: Any, other: Any, tolerance: float = 1e-6) -> bool:
    return norm(one - other) <= tolerance * max(norm(one), norm(other), 1e-300)


@pytest.mark.parametrize("name", sorted(WEIGHTINGS))
class TestEvery:
    @quick
    @given(jacobians(), st.randoms())
    def test_permuting_tasks_permutes_the_direction(self, name: str, j: Any, random: Any) -> None:
        if name in ("gvac", "rlw"):
            return  # pairs in some order; a draw per task
        order = list(range(len(j)))
        random.shuffle(order)
        losses = np.arange(1.0, len(j) + 1)
        more = {"gaps": {str(k): 5.0 * order.index(k) for k in order}} if name == "pivrg" else {}
        again = {"gaps": {str(k): 5.0 * order.index(order[k]) for k in order}} if name == "pivrg" else {}
        d, e = (
            solve(name, j, losses, **more) @ j,
            solve(name, j[order], losses[order], **again) @ j[order],
        )
        assert close(d, e)

    @quick
    @given(jacobians())
    def test_rotation_of_the_parameters_changes_nothing(self, name: str, j: Any) -> None:
        q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((j.shape[1],) * 2))
        assert close(solve(name, j @ q) @ j, solve(name, j) @ j)

    @quick
    @given(jacobians(), st.sampled_from([1e-6, 1e-3, 1e3, 1e6]))
    def test_scale_of_all_gradients(self, name: str, j: Any, c: float) -> None:
        more: dict[str, Any] = {"max_norm": 0} if name in LIMITED else {}
        power = {"nash": -1.0, "fairgrad": -2 * 2 / (2 + 1), "pivrg": -2 * 2 / (2 + 1)}.get(name, 0.0)
        if name == "modo":
            return  # a step whose length does depend on the scale
        assert close(solve(name, c * j, **more), c**power * solve(name, j, **more))

    @quick
    @given(jacobians())
    def test_no_state_is_changed_and_the_same_call_gives_the_same(self, name: str, j: Any) -> None:
        w, state = weights(name, j @ j.T)
        kept = {k: v.copy() for k, v in state.items()}
        one, other = (weights(name, j @ j.T, state, step=2) for _ in range(2))
        assert np.array_equal(one[0], other[0])
        assert all(np.array_equal(state[k], v, equal_nan=True) for k, v in kept.items())
        assert np.isfinite(w).all()

    @quick
    @given(jacobians(), st.integers(0, 4))
    def test_zero_row_is_left_out(self, name: str, j: Any, at: int) -> None:
        if name in SCALAR:
            return
        row = at % (len(j) + 1)
        with_zero = np.insert(j, row, 0.0, axis=0)
        w = solve(name, with_zero)
        assert w[row] == 0.0
        assert close(w @ with_zero, solve(name, j) @ j)

    def test_edges(self, name: str) -> None:
        assert weights(name, np.ones((1, 1)), losses=[3.0])[0] == pytest.approx([1.0])
        one = np.array([[3.0, 0.0, 4.0]])
        cases = (np.repeat(one, 3, 0), np.concatenate([one, -one]), np.zeros((3, 3)), 1e-30 * np.eye(3))
        for j in cases:
            w = solve(name, j)
            assert np.isfinite(w).all()
            if name not in SCALAR:
                bound = 1 + 1e-9 if name in LIMITED else 20 * norm(j)
                assert norm(w @ j) <= bound


@pytest.mark.parametrize("name", ["equal", "fixed", *GRAM])
def test_equal_gradients_are_summed(name: str) -> None:
    if name in LIMITED:
        return
    j = np.repeat(np.array([[3.0, 0.0, 4.0]]), 3, 0)
    expected = {"cagrad": 3 * (1 + 0.4) / (1 + 0.4**2)}.get(name, 3.0)
    assert solve(name, j) @ j == pytest.approx(expected * j[0], rel=1e-6)


@quick
@given(jacobians())
def test_mgda(j: Any) -> None:
    w = solve("mgda", j, **NATIVE)
    d = w @ j
    assert w.min() >= 0
    assert w.sum() == pytest.approx(1)
    assert (j @ d >= d @ d * (1 - 1e-9)).all()


@quick
@given(jacobians(), st.booleans())
def test_directions_that_oppose_no_task(j: Any, flat: bool) -> None:
    j = j[:, : max(1, len(j) - 1)] if flat else j  # dependent rows
    for name in ("upgrad", "dualproj"):
        d = solve(name, j) @ j
        rounding = 1e-12 * norm(j)  # of a direction that is nearly zero
        assert (j @ d >= -(1e-9 * norm(d) + rounding) * np.linalg.norm(j, axis=1)).all()


@quick
@given(jacobians(), st.floats(0.05, 0.95))
def test_cagrad(j: Any, c: float) -> None:
    mean = j.mean(0)
    d = solve("cagrad", j, c=c, rescale=0, **NATIVE) @ j
    assert norm(d - mean) == pytest.approx(c * norm(mean), rel=1e-6)
    g = np.random.default_rng(0).standard_normal((200, j.shape[1]))  # no other point of the ball is better
    others = mean + c * norm(mean) * g / np.linalg.norm(g, axis=1, keepdims=True)
    assert (j @ d).min() >= (others @ j.T).min(1).max() - 1e-9 * norm(mean) * norm(j)
    assert close(solve("cagrad", j, c=0, **NATIVE) @ j, mean)


@pytest.mark.parametrize("n", [3, 20])
def test_cagrad_soon_gives_up_where_some_mix_of_gradients_is_zero(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    j = np.random.default_rng(0).standard_normal((n, 50))
    j[1] = -j[0]
    rounds = []
    inner = solvers.min_norm
    monkeypatch.setattr(solvers, "min_norm", lambda gram: rounds.append(1) or inner(gram))
    assert solvers.cagrad(j @ j.T, 0.4) == pytest.approx(np.full(n, 1 / n))
    assert len(rounds) < 40


@quick
@given(jacobians())
def test_nash_is_fair_with_one(j: Any) -> None:
    w, gram = solve("nash", j, max_norm=0), j @ j.T
    assert w * (gram @ w) == pytest.approx(np.ones(len(j)), rel=1e-7)
    assert norm(w @ j) ** 2 == pytest.approx(len(j))
    assert close(w, solve("fairgrad", j, alpha=1, max_norm=0, **NATIVE))
    assert norm(solve("nash", j) @ j) <= 1 + 1e-9


@quick
@given(jacobians(), st.floats(0.3, 4))
def test_fair(j: Any, alpha: float) -> None:
    w = solve("fairgrad", j, alpha=alpha, max_norm=0, **NATIVE)
    assert (w > 0).all()
    assert j @ j.T @ w == pytest.approx(w ** (-1 / alpha), rel=1e-6)


@quick
@given(st.sampled_from([2, 10, 40]), st.integers(0, 2**32 - 1), st.sampled_from([0.5, 1, 2, 5]))
def test_fair_with_many_tasks_that_conflict(n: int, seed: int, alpha: float) -> None:
    generator = np.random.default_rng(seed)
    j = generator.standard_normal((n, n + 3))
    j -= 0.9 * j.mean(0)
    j *= 10 ** generator.uniform(-2, 2, (n, 1))
    w = solvers.alpha_fair(j @ j.T, alpha)
    assert j @ j.T @ w == pytest.approx(w ** (-1 / alpha), rel=1e-6)


@quick
@given(jacobians())
def test_equal_projections(j: Any) -> None:
    w = solve("imtl", j, variant="g", **NATIVE)
    projections = (j @ (w @ j)) / np.linalg.norm(j, axis=1)
    assert projections == pytest.approx(np.full(len(j), projections[0]), rel=1e-5)
    assert w.sum() == pytest.approx(1)


@quick
@given(jacobians())
def test_aligned(j: Any) -> None:
    gram = j @ j.T
    columns = [solvers.aligned(gram, e, tolerance=1e-12) for e in np.eye(len(j))]
    values = np.linalg.svd(np.stack(columns) @ j, compute_uv=False)
    assert values == pytest.approx(np.full(len(j), values[0]), rel=1e-4)


@quick
@given(jacobians())
def test_projections(j: Any) -> None:
    n = len(j)
    orders = np.stack([np.delete(np.arange(n), i) for i in range(n)])
    assert solvers.pcgrad(np.abs(j @ j.T), orders) == pytest.approx(np.ones(n))  # nothing conflicts
    gram = j @ j.T
    zero, _ = solvers.gradvac(gram, np.zeros((n, n)), 0.0, orders)
    assert zero == pytest.approx(solvers.pcgrad(gram, orders), rel=1e-6)
    never, _ = solvers.gradvac(gram, np.full((n, n), -1.0), 0.0, orders)
    assert never == pytest.approx(np.ones(n), rel=1e-3)


@pytest.mark.parametrize("scale", [1e-24, 1.0, 1e24])
def test_simplex_at_any_scale(scale: float) -> None:
    w = solvers.project_simplex(scale * np.array([-1.0, -3.0, -2.0]))
    assert w.sum() == pytest.approx(1)
    assert w.min() >= 0
    assert w[0] == w.max()


def test_gradnorm_pulls_norms_together() -> None:
    state: Any = {}
    j, shares = np.diag([1.0, 10.0, 0.1]), []
    for _ in range(400):
        w, state = weights("gn", j @ j.T, state, losses=np.ones(3), alpha=1.5)
        shares.append(w * np.diag(j))
    assert w.sum() == pytest.approx(3)
    assert shares[-1].max() / shares[-1].min() < 0.1 * shares[0].max() / shares[0].min()


@quick
@given(jacobians(), st.floats(0, 3))
def test_gradnorm_descends_its_objective(j: Any, alpha: float) -> None:
    """Against Adam on ``sum |w_i n_i - goal_i|`` by autograd, as the paper writes it."""
    norms, w = torch.tensor(np.linalg.norm(j, axis=1)), torch.ones(len(j), dtype=torch.float64)
    optimizer = torch.optim.Adam([w.requires_grad_()], lr=0.025)
    generator, state = np.random.default_rng(len(j)), None
    for step in range(4):
        losses = np.ones(len(j)) if step == 0 else generator.uniform(0.1, 2, len(j))
        mine, state = weights("gn", j @ j.T, state, losses=losses, alpha=alpha)
        assert mine == pytest.approx(w.detach().numpy(), rel=1e-6)
        ratio = torch.tensor(losses)
        goal = ((w * norms).mean() * (ratio / ratio.mean()) ** alpha).detach()
        optimizer.zero_grad()
        (w * norms - goal).abs().sum().backward()
        optimizer.step()
        with torch.no_grad():
            w.clamp_(min=1e-3)
            w.mul_(len(j) / w.sum())


def test_uncertainty_learns_to_weigh_down_what_is_large() -> None:
    state: Any = {}
    for _ in range(3000):
        w, state = weights("uw", np.eye(3), state, losses=[0.5, 1.0, 4.0])
    assert w == pytest.approx([1.0, 0.5, 0.125], rel=1e-2)  # 1 / (2 L)
    for _ in range(5000):
        w, state = weights("uw", np.eye(3), state, losses=[0.0, -1.0, 1.0])
    assert w.max() <= 0.5 * np.exp(10) * 1.001


def test_smoothing_and_native_weights() -> None:
    j, state = np.eye(2), {"smooth": np.array([3.0, 1.0])}
    assert weights("mgda", j, state, smoothing=0.9)[0] == pytest.approx([2.8, 1.0])
    assert weights("mgda", j, **NATIVE)[0] == pytest.approx([0.5, 0.5])
    for name in ("geo", "famo", "dwa", "mgda", "upgrad", "imtl", "amtl"):  # equal losses: the plain sum
        assert weights(name, j)[0] == pytest.approx(np.ones(2))


def test_groups_of_equal_risk() -> None:
    losses = np.array([1.0, 1.1, 5.0, 5.2, 1.05])
    w, _ = weights("go4align", np.eye(5), losses=losses)
    assert len(set(w.tolist())) == 2
    assert w[0] == w[1] == w[4] > w[2] == w[3]
    assert len(set(weights("go4align", np.eye(5), losses=losses, groups=1)[0].tolist())) == 1


def test_warm_up_and_reference_of_the_smooth_maximum() -> None:
    from polytask.balancers.scalar import SmoothTchebycheff

    spec, state = SmoothTchebycheff(warmup_epochs=1, mu=0.1), {}  # type: ignore[var-annotated]
    problem = Problem(np.array([1.0, 4.0]), np.arange(2), ("a", "b"))
    assert spec.solve(problem, state) == pytest.approx([1.0, 0.25])
    spec.epoch_end(state)
    assert spec.solve(problem, state) == pytest.approx([1.0, 0.25])  # at the reference: equal shares
    worse = Problem(np.array([1.0, 8.0]), np.arange(2), ("a", "b"))
    assert spec.solve(worse, state) * worse.losses == pytest.approx([0.002, 1.998], abs=1e-3)


# --- methods that see the gradients themselves -------------------------------------------------------


def direct(spec: Any, j: Any, memory: Any = None, rows: Any = None) -> tuple[Any, Any]:
    n = len(j) if rows is None else 3
    rows = np.arange(n) if rows is None else rows
    problem = Problem(np.arange(1.0, len(j) + 1), rows, tuple(map(str, range(n))), j @ j.T, step=1, seed=3)
    out = torch.zeros(j.shape[1], dtype=torch.float64)
    w = spec.direct(torch.tensor(j), problem, {} if memory is None else memory, out)
    return out.numpy(), w


@quick
@given(jacobians())
def test_sign_dropout(j: Any) -> None:
    assert close(direct(GradDrop(leak=1.0), j)[0], j.sum(0))
    assert close(direct(GradDrop(), np.abs(j))[0], np.abs(j).sum(0))  # unanimous
    d = direct(GradDrop(), j)[0]
    up, down = j.clip(min=0).sum(0), j.clip(max=0).sum(0)
    assert np.isclose(d, up).all() or all(
        np.isclose(x, a) or np.isclose(x, b) for x, a, b in zip(d, up, down, strict=True)
    )


def test_signs_are_kept_as_often_as_they_are_pure() -> None:
    j = np.repeat([[2.0], [1.0], [-1.0]], 200_000, 1)
    d, _ = direct(GradDrop(), j)
    assert {*d} == {3.0, -1.0}
    assert (d == 3).mean() == pytest.approx(0.75, abs=0.005)
    halves = (d == 3).reshape(2, -1)
    assert (halves[0] == halves[1]).mean() == pytest.approx(0.75**2 + 0.25**2, abs=0.01)  # independent


@quick
@given(jacobians())
def test_largest_norm(j: Any) -> None:
    d, w = direct(DBMTL(beta=0.0), j)
    logs = j / np.arange(1.0, len(j) + 1)[:, None]
    norms = np.linalg.norm(logs, axis=1)
    assert close(d, (norms.max() / norms) @ logs)
    assert w.min() == pytest.approx(1)


@pytest.mark.parametrize("spec", [MoCo(), MoCo(legacy=True), DBMTL(), ExcessMTL()])
def test_absent_tasks_keep_what_is_remembered(spec: Any) -> None:
    j = np.random.default_rng(0).standard_normal((3, 6))
    memory: Any = {}
    direct(spec, j, memory)
    before = {k: v.clone() for k, v in memory.items()}
    d, w = direct(spec, j[[0, 2]], memory, np.array([0, 2]))
    assert np.isfinite(d).all()
    assert len(w) == 2
    for name, value in memory.items():
        assert torch.equal(value[1], before[name][1]), name
    assert any(not torch.equal(value[0], before[name][0]) for name, value in memory.items())
