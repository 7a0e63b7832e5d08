"""Lines one pixel wide: contours of regions, and morphological thinning (Guo and Hall, CACM 1989, A1)."""

from __future__ import annotations

import numpy as np

_AROUND = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))
"""Offsets (row, column) of the neighbors, counter-clockwise from the east."""


def contours(labels: np.ndarray) -> np.ndarray:
    """Where ``[H, W]`` labels differ from the pixel to the right, below, or right below; boolean."""
    more = np.pad(labels, ((0, 1), (0, 1)), mode="edge")
    return np.asarray((labels != more[:-1, 1:]) | (labels != more[1:, :-1]) | (labels != more[1:, 1:]))


def thin(mask: np.ndarray) -> np.ndarray:
    """Peel a boolean ``[H, W]`` mask from both sides until nothing changes; connections are kept.

    Unsigned integers ``[H, W, K]`` are taken as one mask per bit, and all of them are thinned at once.
    """
    padded = np.pad(np.ascontiguousarray(mask), [(1, 1), (1, 1), (0, 0)][: mask.ndim])
    flat = padded.reshape(padded.shape[0] * padded.shape[1], -1)  # a view
    steps = np.array([row * padded.shape[1] + column for row, column in _AROUND])
    pixels, half = np.flatnonzero(flat.any(1)), 0
    before: np.ndarray | None = None  # pixels that the previous half of a pass changed
    while before is None or len(pixels):
        goes = flat[pixels] & _removable([flat[pixels + step] for step in steps], half)
        flat[pixels] ^= goes
        changed = pixels[goes.any(1)]
        if before is not None:  # a pixel's answer is new only if something changed beside it
            beside = np.zeros(len(flat), dtype=bool)
            for step in (0, *steps):
                beside[before + step] = beside[changed + step] = True
            pixels = np.flatnonzero(beside)
            pixels = pixels[flat[pixels].any(1)]
        before, half = changed, 1 - half
    return padded[1:-1, 1:-1].copy()


def _removable(n: list[np.ndarray], half: int) -> np.ndarray:
    """Bits that may go in a half of a pass; n[0] is the neighbor in the east, n[2] north and so on."""
    one = [n[k] | n[k + 1] for k in (0, 2, 4, 6)]
    two = [n[k + 1] | n[(k + 2) % 8] for k in (0, 2, 4, 6)]
    a, b, c, d = (~n[2 * k] & two[k] for k in range(4))
    crosses_once = (a ^ b ^ c ^ d) & ~(a & b | c & d)
    all_four = one[0] & one[1] & one[2] & one[3] & two[0] & two[1] & two[2] & two[3]
    kept = (n[5] | n[6] | ~n[3]) & n[4] if half else (n[1] | n[2] | ~n[7]) & n[0]
    return np.asarray(crosses_once & _two(one) & _two(two) & ~all_four & ~kept)


def _two(pairs: list[np.ndarray]) -> np.ndarray:
    """Where at least two of four bits are set."""
    a, b, c, d = pairs
    return np.asarray(a & b | c & d | (a | b) & (c | d))
