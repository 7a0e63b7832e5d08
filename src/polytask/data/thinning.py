"""Morphological thinning to lines one pixel wide (Guo and Hall, CACM 1989, algorithm A1)."""

from __future__ import annotations

import numpy as np

_AROUND = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))
"""Offsets (row, column) of the neighbors, counter-clockwise from the east; neighbor k is bit k of a code."""


def thin(mask: np.ndarray) -> np.ndarray:
    """Peel a boolean ``[H, W]`` mask from both sides until nothing changes; connections are kept."""
    padded = np.pad(np.asarray(mask, dtype=bool), 1)
    rows, columns = np.nonzero(padded)
    while True:
        before = len(rows)
        for removable in _REMOVABLE:
            code = np.zeros(len(rows), dtype=np.uint8)
            for bit, (down, right) in enumerate(_AROUND):
                code |= padded[rows + down, columns + right].astype(np.uint8) << bit
            goes = removable[code]
            padded[rows[goes], columns[goes]] = False
            rows, columns = rows[~goes], columns[~goes]
        if len(rows) == before:
            return padded[1:-1, 1:-1].copy()


def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Which of the 256 neighborhoods let a pixel go, in the first and in the second half of a pass."""
    codes = np.arange(256)
    n = [(codes >> k & 1).astype(bool) for k in range(8)]  # n[0] east, n[2] north, n[4] west, n[6] south
    crossings = sum((~n[k] & (n[k + 1] | n[(k + 2) % 8])).astype(int) for k in (0, 2, 4, 6))
    pairs_one = sum((n[k] | n[k + 1]).astype(int) for k in (0, 2, 4, 6))
    pairs_two = sum((n[k + 1] | n[(k + 2) % 8]).astype(int) for k in (0, 2, 4, 6))
    neighbors = np.minimum(pairs_one, pairs_two)
    common = (crossings == 1) & (neighbors >= 2) & (neighbors <= 3)
    first = common & ~((n[1] | n[2] | ~n[7]) & n[0])
    second = common & ~((n[5] | n[6] | ~n[3]) & n[4])
    return first, second


_REMOVABLE = _tables()
