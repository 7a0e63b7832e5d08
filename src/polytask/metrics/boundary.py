"""The published score of boundary detection (odsF): thinned predictions, matched one to one with the truth.

The figures are those of SEISM (Pont-Tuset & Marques, PAMI 2016) in the mode ``read_one_cont_png`` that tables
on PASCAL-Context and NYUD quote, with exact matchings where SEISM's miss a pair now and then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from polytask.data.thinning import contours, thin
from polytask.metrics.base import IGNORE, Metric
from polytask.metrics.matching import largest_matching

THRESHOLDS = (0.001, *(k / 100 for k in range(1, 100)), 0.999)
"""Those of the published protocol; a pixel is a candidate if its strength is greater."""

Truth = Literal["lines", "contours"]
"""What a map of edge pixels is: the true lines, or (NYUD) regions whose contours are the true lines."""

_TRIANGLE = np.array([1, 2, 3, 4, 5, 4, 3, 2, 1], dtype=np.float32) / np.float32(25)


def _smooth(strength: np.ndarray, axis: int) -> np.ndarray:
    padded = np.pad(strength, [(4, 4) if a == axis else (0, 0) for a in range(2)], mode="symmetric")
    windows, total = sliding_window_view(padded, 9, axis), np.zeros_like(strength)
    for k in reversed(range(9)):  # this order of additions gives the last bit of the official result
        total += _TRIANGLE[k] * windows[..., k]
    return total


def orientation(strength: np.ndarray) -> np.ndarray:
    """Direction across the edge at every pixel, radians in [0, pi), float32 ``[H, W]``."""
    down, right = np.gradient(_smooth(_smooth(strength, 1), 0))
    bend_x, (bend_y, twist) = np.gradient(right, axis=1), np.gradient(down)
    angle = np.arctan(bend_y * np.sign(-twist) / (bend_x + np.float32(1e-5)))
    return np.asarray(np.mod(angle, np.float32(np.pi)))


def suppress(strength: np.ndarray) -> np.ndarray:
    """Strength, float32 ``[H, W]``, where it is greatest across the edge (to one percent), else 0.

    It fades out towards the border, and is 0 in its outermost pixels: all of a map one or two pixels wide.
    """
    if min(strength.shape) < 3:
        return np.zeros_like(strength)
    angle, sizes = orientation(strength), strength.shape
    rows, columns = (np.arange(size, dtype=np.float32) for size in sizes)
    kept = strength.copy()
    for side in (np.float32(-1), np.float32(1)):
        y = np.clip(rows[:, None] + side * np.sin(angle), 0, np.float32(sizes[0] - 1.001))
        x = np.clip(columns + side * np.cos(angle), 0, np.float32(sizes[1] - 1.001))
        kept[strength * np.float32(1.01) < _between(strength, y, x)] = 0
    fade_y, fade_x = (np.clip(np.minimum(i, i[::-1]) / np.float32(5), 0, 1) for i in (rows, columns))
    return np.asarray(kept * fade_x * fade_y[:, None])


def _between(values: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Bilinear interpolation at positions inside the map."""
    i, j = y.astype(np.int64), x.astype(np.int64)
    v, u = y - i.astype(np.float32), x - j.astype(np.float32)
    top = values[i, j] * (1 - u) * (1 - v) + values[i, j + 1] * u * (1 - v)
    return np.asarray(top + values[i + 1, j] * (1 - u) * v + values[i + 1, j + 1] * u * v)


def thinned(strength: np.ndarray, thresholds: Sequence[float] = THRESHOLDS) -> np.ndarray:
    """The mask ``strength > t`` of each of K ascending thresholds, thinned, boolean ``[H, W, K]``."""
    count = len(thresholds)
    bits = np.tri(count + 1, -(-count // 64) * 64, -1, dtype=np.uint8)  # row k: the first k thresholds
    words = np.packbits(bits, axis=1, bitorder="little").view("<u8")
    planes = thin(words[np.searchsorted(np.array(thresholds, dtype=np.float32), strength)])
    return np.unpackbits(planes.view(np.uint8), axis=-1, count=count, bitorder="little").view(bool)


def boundary_counts(
    strength: np.ndarray,
    truth: np.ndarray,
    max_dist: float = 0.0075,
    thresholds: Sequence[float] = THRESHOLDS,
    valid: np.ndarray | bool = True,
) -> np.ndarray:
    """Matched, predicted and true boundary pixels of one image at each threshold, int64 ``[K, 3]``.

    Args:
        strength: probability of a boundary, float32 ``[H, W]``.
        truth: thin lines, boolean ``[H, W]``.
        max_dist: largest distance of a pair as a fraction of the image's diagonal.
        thresholds: ascending.
        valid: where predictions count, boolean ``[H, W]``.
    """
    masks = thinned(suppress(strength) * np.float32(valid), thresholds)
    pairs = largest_matching(masks, truth, max_dist * float(np.hypot(*truth.shape)))
    return np.stack([pairs, masks.sum((0, 1)), np.full(len(pairs), truth.sum())], axis=1)


def rates(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F of counts ``[..., 3]``; nothing predicted (or true) is no mistake."""
    pairs, predicted, true = np.moveaxis(counts.astype(np.float64), -1, 0)
    precision = np.where(predicted > 0, pairs / predicted.clip(1), 1.0)
    recall = np.where(true > 0, pairs / true.clip(1), 1.0)
    return precision, recall, 2 * precision * recall / (precision + recall).clip(1e-12)


class BoundaryScore(Metric):
    """``odsF``, ``oisF`` and ``AP`` in percent, and ``ods_threshold``.

    Counts are pooled over the set: odsF is the best F over the thresholds, oisF that of each image's own best
    threshold, AP the mean precision at recalls 0, .01 … 1. Probabilities are rounded down to multiples of
    1/255, as in the files that the official evaluator reads. Each image is cropped to the rectangle of its
    labeled pixels, so that padding changes nothing; published figures are for the size of the photo, and for
    a ``max_dist`` of .0075 on PASCAL and .011 on NYUD.
    """

    FINAL: ClassVar[bool] = True

    def __init__(
        self, max_dist: float = 0.0075, truth: Truth = "lines", thresholds: Sequence[float] = THRESHOLDS
    ) -> None:
        self.max_dist, self.truth, self.thresholds = max_dist, truth, thresholds
        super().__init__()

    def zeros(self) -> dict[str, Tensor]:
        sizes = {"counts": (len(self.thresholds), 3), "best": (3,), "images": ()}
        return {name: torch.zeros(size, dtype=torch.int64) for name, size in sizes.items()}

    def counts(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        maps = target.reshape(prediction.shape).cpu().numpy()
        files = (prediction * 255).to(torch.uint8).cpu().numpy()
        state = self.zeros()
        for file, labels in zip(files, maps, strict=True):
            if (labels != IGNORE).any():
                counts = torch.from_numpy(self._image(file, labels))
                f = 2 * counts[:, 0] / (counts[:, 1] + counts[:, 2]).clamp(min=1)  # 0 without true pixels
                state["counts"] += counts
                state["best"] += counts[f.numpy().argmax()]  # the first of equals
                state["images"] += 1
        return state

    def _image(self, file: np.ndarray, labels: np.ndarray) -> np.ndarray:
        valid = labels != IGNORE
        rows, columns = np.flatnonzero(valid.any(1)), np.flatnonzero(valid.any(0))
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        edge, strength = labels[box] == 1, file[box].astype(np.float32) / np.float32(255)
        lines = thin(contours(edge) if self.truth == "contours" else edge)
        return boundary_counts(strength, lines, self.max_dist, self.thresholds, valid[box])

    def compute(self) -> dict[str, float]:
        precision, recall, f = rates(self.state["counts"].numpy())
        known, first = np.unique(recall, return_index=True)
        curve = np.interp(np.linspace(0, 1, 101), known, precision[first], left=0, right=0)
        own = rates(self.state["best"].numpy())[2]
        scores = {"odsF": 100 * f.max(), "oisF": 100 * own, "AP": 100 * curve.mean()}
        scores["ods_threshold"] = self.thresholds[int(f.argmax())]
        return {name: float(v) if self.state["images"] else float("nan") for name, v in scores.items()}
