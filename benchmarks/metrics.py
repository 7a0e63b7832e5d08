"""Metrics: one pass over the pixels against a loop per class and threshold; odsF against SciPy's matching.

The plain side is written from the definitions, as the official evaluators are: a mask per class or threshold,
with sums over it. Both sides must agree before anything is timed.

    python benchmarks/metrics.py [--quick] [--json]
"""

from __future__ import annotations

import multiprocessing
import time

import numpy as np
import torch
from common import interleave, median_ratio, parse, report
from scipy import ndimage
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching
from torch import Tensor
from torch.nn import functional as F

from polytask.data.thinning import contours, thin
from polytask.metrics import (
    AngularError,
    BoundaryScore,
    DepthError,
    MaxF,
    MeanIoU,
    SaliencyIoU,
    largest_matching,
)
from polytask.metrics.boundary import suppress, thinned

CLASSES = 21
LEVELS = 255  # thresholds of maxF
THRESHOLDS = tuple(k / 100 for k in range(1, 100))
Maps = dict[str, tuple[Tensor, Tensor]]


# --- dense metrics ---------------------------------------------------------------------------------


def make_maps(count: int, size: int) -> Maps:
    """Predictions and targets of four tasks: blobs, with some pixels ignored."""
    g = torch.Generator().manual_seed(0)

    def smooth(channels: int) -> Tensor:
        noise = torch.randn(count, channels, size // 16, size // 16, generator=g)
        return F.interpolate(noise, (size, size), mode="bilinear")

    ignored = smooth(1) > 1.2
    labels = smooth(CLASSES)
    semseg = (labels + 0.3 * smooth(CLASSES)).argmax(1), labels.argmax(1, keepdim=True)
    salient = smooth(1)
    saliency = (2 * salient[:, 0] + smooth(1)[:, 0]).sigmoid(), (salient > 0).long()
    vectors = F.normalize(smooth(3), dim=1)
    normals = F.normalize(vectors + 0.2 * smooth(3), dim=1), torch.where(ignored, 0.0, vectors)
    depth = smooth(1).abs() + 1
    return {
        "semseg": (semseg[0], torch.where(ignored, 255, semseg[1])),
        "saliency": (saliency[0], torch.where(ignored, 255, saliency[1])),
        "normals": normals,
        "depth": ((depth + 0.1 * smooth(1).abs())[:, 0], torch.where(ignored, 0.0, depth)),
    }


def ours(maps: Maps) -> dict[str, float]:
    """Scores by the library."""
    metrics = {
        "semseg": [MeanIoU(tuple(map(str, range(CLASSES))), "zero")],
        "saliency": [SaliencyIoU(), MaxF(LEVELS)],
        "normals": [AngularError()],
        "depth": [DepthError()],
    }
    scores: dict[str, float] = {}
    for task, (prediction, target) in maps.items():
        for metric in metrics[task]:
            scores |= {f"{task} {name}": value for name, value in metric.of(prediction, target).items()}
    return scores


def plain_semseg(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """A mask per class."""
    hits, extra, missed = (torch.zeros(CLASSES) for _ in range(3))
    for p, t in zip(prediction, target[:, 0], strict=True):
        valid = t != 255
        for c in range(CLASSES):
            hits[c] += ((t == c) & (p == c) & valid).sum()
            extra[c] += ((t != c) & (p == c) & valid).sum()
            missed[c] += ((t == c) & (p != c) & valid).sum()
    return {"mIoU": 100 * float((hits / (hits + extra + missed).clamp(min=1e-8)).mean())}


def plain_saliency(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """A mask per threshold, in both protocols."""
    overlaps, tables = [], torch.zeros(LEVELS, 3)
    for p, t in zip(prediction, target[:, 0], strict=True):
        valid, row = t != 255, []
        for threshold in np.linspace(0.2, 0.9, 15):
            chosen, true = (p > threshold)[valid], (t == 1)[valid]
            both, either = (chosen & true).sum(), (chosen | true).sum()
            precision = both / (chosen.sum() + 1e-12)
            recall = both / (true.sum() + 1e-12)
            row.append(torch.stack([both / either if either else torch.tensor(1.0), precision, recall]))
        overlaps.append(torch.stack(row))
        for k in range(LEVELS):
            chosen, true = (p >= (k + 1) / (LEVELS + 1)) & valid, (t == 1) & valid
            tables[k] += torch.stack([(chosen & true).sum(), chosen.sum(), true.sum()])
    iou, precision, recall = torch.stack(overlaps).mean(0).unbind(1)
    p, r = tables[:, 0] / tables[:, 1], tables[:, 0] / tables[:, 2]
    return {
        "mIoU": 100 * float(iou.max()),
        "maxF1": 100 * float((2 * precision * recall / (precision + recall)).nan_to_num().max()),
        "maxF": 100 * float((1.3 * p * r / (0.3 * p + r)).nan_to_num().max()),
    }


def plain_normals(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """All angles kept for the median."""
    valid = (target != 0).any(1)
    p, t = (F.normalize(x.permute(0, 2, 3, 1)[valid], dim=1) for x in (prediction, target))
    theta = torch.rad2deg(2 * torch.atan2((p - t).norm(dim=1), (p + t).norm(dim=1))).double()
    within = {f"within_{t:g}": 100 * float((theta < t).double().mean()) for t in (11.25, 22.5, 30)}
    return {"mean": float(theta.mean()), "median": float(theta.median()),
            "rmse": float(theta.square().mean().sqrt()), **within}  # fmt: skip


def plain_depth(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """Masks, and a pass per figure."""
    g, valid = target[:, 0].double(), target[:, 0] > 0
    p = prediction.double()
    n, ratio = valid.sum(), torch.maximum(p / g, g / p)
    mean = {
        "log_rmse": (p.log() - g.log()) ** 2, "rmse": (p - g) ** 2, "abs_err": (p - g).abs(),
        "abs_rel": (p - g).abs() / g, "sq_rel": (p - g) ** 2 / g,
    }  # fmt: skip
    scores = {name: float(x[valid].sum() / n) for name, x in mean.items()}
    near = {f"delta{k}": 100 * float((ratio < 1.25**k)[valid].sum() / n) for k in (1, 2, 3)}
    return {**scores, "rmse": scores["rmse"] ** 0.5, "log_rmse": scores["log_rmse"] ** 0.5, **near}


PLAIN = {"semseg": plain_semseg, "saliency": plain_saliency, "normals": plain_normals, "depth": plain_depth}


def plain(maps: Maps) -> dict[str, float]:
    """Scores by loops."""
    return {f"{task} {name}": v for task, pair in maps.items() for name, v in PLAIN[task](*pair).items()}


# --- odsF ------------------------------------------------------------------------------------------


def scene(seed: int, height: int = 320, width: int = 480) -> tuple[np.ndarray, np.ndarray]:
    """True lines between warped Voronoi cells, and the soft, displaced, incomplete answer of a network."""
    g = np.random.default_rng(seed)
    grid = np.mgrid[:height, :width].astype(float)

    def smooth(sigma: float, size: float) -> np.ndarray:
        noise = ndimage.gaussian_filter(g.standard_normal((2, height, width)), (0, sigma, sigma))
        return size * noise / noise.std()

    def cells(count: int, where: np.ndarray) -> np.ndarray:
        centers = g.uniform(0, 1, (count, 2)) * (height, width)
        return np.argmin(sum((where[a][..., None] - centers[:, a]) ** 2 for a in range(2)), -1)

    regions = cells(40, grid + smooth(12, 6))
    y, x = (grid + smooth(10, 1.5)).round().astype(int)
    seen = regions[y.clip(0, height - 1), x.clip(0, width - 1)]
    if seed % 2:
        seen = 40 * seen + cells(25, grid)
    lines, texture = contours(seen) * (0.6 + smooth(15, 0.25)[0]).clip(0.05, 1), smooth(1.5, 0.06)[0]
    answer = (4 * ndimage.gaussian_filter(lines, 1.6) + (texture + 0.03).clip(0)).clip(0, 1)
    return thin(contours(regions)), answer.astype(np.float32)


def score(seeds: range) -> tuple[BoundaryScore, np.ndarray]:
    """A metric that has seen some scenes, and the seconds on the clock and of CPU that it took."""
    torch.set_num_threads(1)
    metric, seconds = BoundaryScore(thresholds=THRESHOLDS), np.zeros(2)
    for seed in seeds:
        lines, answer = map(torch.from_numpy, scene(seed))
        started = np.array([time.perf_counter(), time.process_time()])
        metric.update(answer[None], lines.long()[None, None])
        seconds += np.array([time.perf_counter(), time.process_time()]) - started
    return metric, seconds


def score_all(images: int, processes: int) -> tuple[BoundaryScore, np.ndarray]:
    """The same by several processes, whose states are added; and the seconds of the longest."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        parts = pool.map(score, [range(i, images, processes) for i in range(processes)])
    whole = BoundaryScore(thresholds=THRESHOLDS)
    for part, _ in parts:
        whole.state = {name: value + part.state[name] for name, value in whole.state.items()}
    return whole, np.max([seconds for _, seconds in parts], axis=0)


def by_scipy(masks: np.ndarray, lines: np.ndarray, radius: float) -> list[int]:
    """Matches by one sparse matrix and one matching per threshold."""
    true, matches = np.argwhere(lines), []
    reach = int(radius)
    ids = np.pad(np.where(lines, np.cumsum(lines).reshape(lines.shape) - 1, -1), reach, constant_values=-1)
    y, x = np.mgrid[: 2 * reach + 1, : 2 * reach + 1] - reach
    order = np.argsort(y**2 + x**2, axis=None)[: (y**2 + x**2 <= radius**2).sum()]
    steps = [(dy, dx) for dy, dx in zip(y.ravel()[order] + reach, x.ravel()[order] + reach, strict=True)]
    for k in range(masks.shape[-1]):
        pixels = np.argwhere(masks[..., k])
        around = np.stack([ids[pixels[:, 0] + dy, pixels[:, 1] + dx] for dy, dx in steps], 1)
        rows, _ = np.nonzero(around >= 0)
        edges = csr_matrix((np.ones(len(rows)), (rows, around[around >= 0])), (len(pixels), len(true)))
        matches.append(int((maximum_bipartite_matching(edges, perm_type="column") >= 0).sum()))
    return matches


def ods_ratio(thresholds: tuple[float, ...], images: int) -> float:
    """CPU seconds of the matchings of a few scenes, ours / SciPy's; their sizes must be equal.

    Only scenes with false lines: without them, SciPy's search takes minutes at some thresholds.
    """
    seconds = np.zeros(2)
    for seed in range(1, 2 * images, 2):
        lines, answer = scene(seed)
        masks, radius = thinned(suppress(answer), thresholds), 0.0075 * float(np.hypot(*lines.shape))
        found = []
        for side, matching in enumerate((largest_matching, by_scipy)):
            started = time.process_time()
            found.append(list(matching(masks, lines, radius)))
            seconds[side] += time.process_time() - started
        assert found[0] == found[1], "the two matchings differ"
    return float(seconds[0] / seconds[1])


# --- measurement -----------------------------------------------------------------------------------


def main() -> None:
    """Compare, then time."""
    args = parse(__doc__.splitlines()[0])
    torch.set_num_threads(1)
    count, size, repeats, images = (2, 256, 3, 8) if args.quick else (4, 512, 7, 100)
    maps = make_maps(count, size)
    left, right = ours(maps), plain(maps)
    for name, value in right.items():
        assert abs(left[name] - value) < (0.01 if "median" in name else 1e-3), (name, left[name], value)
    ratios = {}
    seconds = interleave({"plain": lambda: plain(maps), "ours": lambda: ours(maps)}, repeats)
    ratios["dense metrics, plain / ours"] = 1 / median_ratio(seconds, "ours", "plain")
    for task in maps:
        one = {task: maps[task]}
        seconds = interleave(
            {"plain": lambda one=one: plain(one), "ours": lambda one=one: ours(one)}, repeats
        )
        ratios[f"{task}, plain / ours"] = 1 / median_ratio(seconds, "ours", "plain")
    ratios["boundary matching, SciPy / ours"] = 1 / ods_ratio(THRESHOLDS[9::10], 1 if args.quick else 4)
    metric, (clock, cpu) = score_all(images, 2)
    ratios["odsF, seconds on the clock, two processes"] = float(clock)
    ratios["odsF, CPU seconds of each process"] = float(cpu)
    settings = {
        "maps": f"{count} x {size} x {size}", "thresholds of maxF": LEVELS, "rounds": repeats,
        "unit": "CPU seconds of one thread",
        "odsF": f"{images} images of 320 x 480, {len(THRESHOLDS)} thresholds, {metric.compute()}",
    }  # fmt: skip
    report(args, settings, ratios)


if __name__ == "__main__":
    main()
