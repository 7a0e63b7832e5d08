"""Exact solvers in as many dimensions as there are tasks, on the Gramian of the task gradients.

``gram`` is ``J Jᵀ``, float64 ``[T, T]``, of rows that are finite and not zero; results are weights ``[T]`` of
the rows, so that the direction is ``Jᵀ w``. All tolerances are relative: multiplying ``J`` by a constant
changes nothing but what a method's own law says. NumPy only, so that any framework can use them.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

TINY = 1e-12
"""Relative size below which a number counts as zero."""


def unit_diagonal(gram: Array) -> tuple[Array, Array]:
    """The matrix of cosines and the inverse norms ``s``, so that ``cosines = diag(s) gram diag(s)``."""
    s = 1 / np.sqrt(np.diag(gram))
    return gram * np.outer(s, s), s


def project_simplex(v: Array) -> Array:
    """Nearest point (Euclidean) with non-negative entries that sum to 1 (Held, Wolfe, Crowder, 1974)."""
    v = v - v.max()  # moves nothing, and large entries would swallow the 1
    ordered = np.sort(v)[::-1]
    thresholds = (np.cumsum(ordered) - 1) / np.arange(1, len(v) + 1)
    return np.asarray(np.maximum(v - thresholds[ordered > thresholds][-1], 0.0))


def min_norm(gram: Array) -> Array:
    """Simplex weights with the smallest ``wᵀ G w``: MGDA, by Wolfe's finite active-set method (1976)."""
    gram = gram / max(np.trace(gram), np.finfo(float).tiny)
    w = _affine_minimizer(gram)
    if w.min() > TINY and _gain(gram, w).max() <= 0:  # inside the simplex, as with few conflicts
        return np.asarray(w / w.sum())
    w = np.zeros(len(gram))
    support = [int(np.argmin(np.diag(gram)))]
    w[support] = 1.0
    for _ in range(20 * len(gram) + 20):
        gain = _gain(gram, w)
        enter = int(np.argmax(gain))
        if enter in support or gain[enter] <= 0:
            break
        support.append(enter)
        support = _descend(gram, w, support)
    return np.asarray(w / w.sum())


def _gain(gram: Array, w: Array) -> Array:
    """How steeply ``wᵀ G w`` falls towards each row, beyond rounding."""
    slope = gram @ w
    rounding = TINY * abs(w @ slope) + 4 * np.finfo(float).eps * (np.abs(gram) @ w)
    return np.asarray(w @ slope - slope - rounding)


def _descend(gram: Array, w: Array, support: list[int]) -> list[int]:
    """Move ``w`` to the minimizer of its face, dropping rows at the boundary; the rows that remain."""
    while True:
        goal = _affine_minimizer(gram[np.ix_(support, support)])
        if goal.min() > TINY:
            w[:] = 0.0
            w[support] = goal
            return support
        here = w[support]
        falling = goal < here
        step = min(1.0, float((here[falling] / (here - goal)[falling]).min(initial=1.0)))
        here = here + step * (goal - here)
        keep = here > TINY
        if keep.all():  # rounding: drop the smallest
            keep[np.argmin(here)] = False
        w[:] = 0.0
        support = [row for row, kept in zip(support, keep, strict=True) if kept]
        w[support] = here[keep] / here[keep].sum()


def _affine_minimizer(gram: Array) -> Array:
    """Minimizer of ``vᵀ G v`` among all ``v`` that sum to 1."""
    n = len(gram)
    cosines, s = unit_diagonal(gram)
    s = s / s.max()
    bordered, right = np.zeros((n + 1, n + 1)), np.zeros(n + 1)
    bordered[:n, :n], bordered[n, :n], bordered[:n, n], right[n] = cosines, s, s, 1.0
    return np.asarray(np.linalg.lstsq(bordered, right, rcond=1e-14)[0][:n] * s)


def cagrad(gram: Array, c: float) -> Array:
    """Weights of CAGrad's direction ``g_0 + c |g_0| g_w / |g_w|`` without rescaling, ``g_0`` the mean row.

    Solves the dual ``min_w g_w·g_0 + c |g_0| |g_w|`` on the simplex (Liu et al., NeurIPS 2021). For a fixed
    norm of ``g_w`` this is a min-norm problem; on the face that it finds, the solution has a closed form.
    """
    n = len(gram)
    b, length = gram.mean(1), np.sqrt(max(float(gram.mean()), 0.0))
    scale = np.sqrt(np.trace(gram))
    mean = np.full(n, 1 / n)
    if c == 0 or length <= 1e-9 * scale:
        return np.asarray(mean * (length > 1e-9 * scale))
    w, tau = mean, length
    for _ in range(100):
        curved = c * length * gram / (2 * tau) + (b[:, None] + b) / 2 + tau * length / (2 * c)
        w = min_norm(curved)
        exact = _on_face(gram, b, c * length, w > TINY)
        if exact is not None:
            w = exact
            break
        new = np.sqrt(max(float(w @ gram @ w), 0.0))
        if abs(new - tau) <= 1e-13 * scale or new <= 1e-9 * scale:
            break
        tau = new
    norm = np.sqrt(max(float(w @ gram @ w), 0.0))
    return mean if norm <= 1e-9 * scale else mean + c * length / norm * w


def _on_face(gram: Array, b: Array, radius: float, face: Any) -> Array | None:
    """The dual's minimizer on a face if it is the minimizer on the simplex (checked), else None."""
    rows = np.flatnonzero(face)
    inner = gram[np.ix_(rows, rows)]
    if np.linalg.cond(inner) > 1e12:
        return None
    ones = np.linalg.solve(inner, np.ones(len(rows)))
    slopes = np.linalg.solve(inner, b[rows])
    a, h, k = ones.sum(), slopes.sum(), float(b[rows] @ slopes) - radius**2
    if h * h < a * k:
        return None
    multiplier = (h + np.sqrt(h * h - a * k)) / a
    direction = multiplier * ones - slopes
    if direction.min() < 0 or direction.sum() <= 0:
        return None
    w = np.zeros(len(gram))
    w[rows] = direction / direction.sum()
    gradient = b + radius * (gram @ w) / np.sqrt(w @ gram @ w)
    slack = gradient.min() - multiplier
    return w if slack >= -1e-10 * np.abs(gradient).max() else None


def alpha_fair(gram: Array, alpha: float, priority: Array | None = None) -> Array:
    """The positive solution of ``G x = (q / x)^(1 / alpha)``: FairGrad, Nash-MTL with 1, PIVRG with q.

    Damped Newton on a strictly convex function after scaling to unit diagonal (Navon et al., ICML 2022; Ban
    and Ji, ICML 2024). Where no solution exists, because some mix of the rows is zero, x is a capped one on
    the way to infinity, and the direction is nearly zero.
    """
    cosines, s = unit_diagonal(gram)
    power = 1 / alpha
    q = np.ones(len(gram)) if priority is None else priority
    kappa = q**power * s ** (1 - power)
    unit = np.exp(np.log(kappa).mean())  # a common factor of z, restored at the end
    kappa = kappa / unit
    z = kappa ** (1 / (1 + power))
    size, largest = np.abs(cosines), 1e6 * z.max()
    for _ in range(60):
        h = kappa * z**-power
        residual = h - cosines @ z
        rounding = 4 * np.finfo(float).eps * (size @ z)
        if (np.abs(residual) <= 1e-11 * h + rounding).all() or z.max() > largest:
            break
        step = np.linalg.solve(cosines + np.diag(power * h / z), residual)
        z = z + _step_length(cosines, kappa, power, z, step) * step
    return np.asarray(s * z * unit ** (1 / (1 + power)))


def _step_length(cosines: Array, kappa: Array, power: float, z: Array, step: Array) -> float:
    """How far to follow a Newton step: 0.99 of the way to the border, halved until it helps (Armijo)."""

    def value(z: Array) -> float:
        gains = np.log(z) if power == 1 else z ** (1 - power) / (1 - power)
        return float(z @ cosines @ z / 2 - kappa @ gains)

    here = value(z)
    length = min(1.0, 0.99 / max(float((-step / z).max()), 1e-300))
    slope = float(step @ (kappa * z**-power - cosines @ z))
    while slope > 1e-9 * abs(here) and value(z + length * step) > here - 1e-4 * length * slope:
        length /= 2
        if length < 1e-8:
            break
    return length


def dual_cone(gram: Array, rows: Array) -> Array:
    """Weights of the projections of ``Jᵀ u`` onto the cone of directions that no task opposes, per row u.

    Solves ``min vᵀ G v, v >= u`` (Quinton and Rey, Jacobian descent, 2024) in units where all gradients have
    length 1, without regularization.

    Args:
        gram: ``[T, T]``.
        rows: ``[K, T]``.

    Returns:
        v, ``[K, T]``.
    """
    cosines, s = unit_diagonal(gram)
    starts = rows / s
    return np.asarray((starts + _nonnegative(cosines, starts @ cosines)) * s)


def _nonnegative(matrix: Array, linear: Array) -> Array:
    """``argmin_x xᵀ A x / 2 + bᵀ x`` over ``x >= 0`` for each row b ``[K, n]``, A positive semi-definite.

    Principal pivoting of all that is wrong, one by one once that does not help (Kim and Park, SIAM 2011).
    """
    n, every = len(matrix), np.arange(len(linear))
    matrix = matrix + 1e-14 * np.eye(n)  # dependent rows: any solution will do
    tolerance = TINY * np.abs(linear).max(1, keepdims=True, initial=np.finfo(float).tiny)
    free, best, patience = np.zeros(linear.shape, bool), np.full(len(linear), n + 1), np.full(len(linear), 3)
    x = np.zeros(linear.shape)
    for _ in range(20 * n + 20):
        slope = x @ matrix + linear
        wrong = np.where(free, x, slope) < -tolerance
        count = wrong.sum(1)
        if not count.any():
            break
        patience = np.where(count < best, 3, patience - 1)
        best = np.minimum(best, count)
        last = np.zeros_like(wrong)
        last[every, n - 1 - wrong[:, ::-1].argmax(1)] = True
        free ^= wrong & (last | (patience >= 0)[:, None])
        both = free[:, :, None] & free[:, None, :]
        systems, right = np.where(both, matrix, np.eye(n)), np.where(free, -linear, 0.0)
        x = np.linalg.solve(systems, right[:, :, None])[:, :, 0]
    return np.where(free, np.maximum(x, 0.0), 0.0)


def equal_projection(gram: Array) -> Array:
    """IMTL-G: weights, sum 1, with equal projections onto all unit gradients (Liu et al., ICLR 2021)."""
    cosines, s = unit_diagonal(gram)
    values, vectors = np.linalg.eigh(cosines)
    inverse = np.where(values > 1e-10 * values[-1], 1 / np.where(values > 0, values, 1.0), 0.0)
    alpha = s * (vectors @ (inverse * (vectors.T @ np.ones(len(gram)))))
    total = alpha.sum()
    if abs(total) <= 1e-8 * max(
        np.abs(alpha).sum(), s.sum()
    ):  # nearly opposite gradients: the mean of the unit gradients
        alpha, total = s, s.sum()
    return np.asarray(alpha / total)


def aligned(gram: Array, preference: Array, scale: str = "min", tolerance: float | None = None) -> Array:
    """Aligned-MTL: weights as if all singular values of ``J`` were one (Senushkin et al., CVPR 2023).

    Args:
        gram: ``[T, T]``.
        preference: weights of the tasks after alignment.
        scale: that one value: ``min``, ``median`` or ``rmse`` of those kept.
        tolerance: eigenvalues below this part of the largest are dropped; float32 rounding if None.
    """
    values, vectors = np.linalg.eigh(gram)
    rtol = len(gram) * np.finfo(np.float32).eps if tolerance is None else tolerance
    keep = values > values[-1] * rtol
    values, vectors = values[keep], vectors[:, keep]
    level = {"min": values[0], "median": _lower_median(values), "rmse": values.mean()}[scale]
    return np.asarray(np.sqrt(level) * (vectors / np.sqrt(values)) @ (vectors.T @ preference))


def _lower_median(values: Array) -> float:
    return float(np.sort(values)[(len(values) - 1) // 2])


def pcgrad(gram: Array, orders: Any) -> Array:
    """PCGrad on coefficients: rows lose their projection onto rows they oppose (Yu et al., NeurIPS 2020).

    Args:
        gram: ``[T, T]``.
        orders: for each row the order in which the others are looked at, ``[T, T - 1]`` indices.
    """
    n, every = len(gram), np.arange(len(gram))
    mix = np.eye(n)
    for others in orders.T:
        dots = (mix * gram[others]).sum(1)
        mix[every, others] -= np.minimum(dots, 0.0) / gram[others, others]
    return np.asarray(mix.sum(0))


def pcgrad_expected(gram: Array) -> Array:
    """The mean of ``pcgrad`` over all orders, for at most five tasks."""
    n = len(gram)
    choices = [list(itertools.permutations([j for j in range(n) if j != i])) for i in range(n)]
    count = len(choices[0])
    runs = [pcgrad(gram, np.array([choices[i][k] for i in range(n)])) for k in range(count)]
    return np.asarray(np.mean(runs, axis=0))


def gradvac(gram: Array, target: Array, beta: float, orders: Any) -> tuple[Array, Array]:
    """Gradient Vaccine: raise each pair's cosine to its running target (Wang et al., ICLR 2021).

    Args:
        gram: ``[T, T]``.
        target: running mean of the cosines, ``[T, T]``.
        beta: rate of that mean.
        orders: as for ``pcgrad``.

    Returns:
        weights ``[T]`` and the new target.
    """
    n, every = len(gram), np.arange(len(gram))
    norms, mix, target = np.sqrt(np.diag(gram)), np.eye(n), target.copy()
    for others in orders.T:
        lengths = np.sqrt(np.maximum(((mix @ gram) * mix).sum(1), np.finfo(float).tiny))
        cosine = np.clip((mix * gram[others]).sum(1) / (lengths * norms[others]), -1, 1)
        aim = target[every, others]
        across = np.sqrt(np.maximum(1 - aim**2, 1e-8))
        gain = lengths * (aim * np.sqrt(1 - cosine**2) - cosine * across) / (norms[others] * across)
        mix[every, others] += np.where(cosine < aim, gain, 0.0)
        target[every, others] = (1 - beta) * aim + beta * cosine
    return np.asarray(mix.sum(0)), target
