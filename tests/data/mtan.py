"""Fabricates tiny copies of the arrays of MTAN: nyuv2, and cityscapes2 with 7 and 19 classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

NYUV2, CITYSCAPES = (12, 16), (8, 16)
Arrays = dict[tuple[str, str, int], np.ndarray]
"""By split, folder and number."""


def small_nyuv2(folder: Path) -> dict[str, Any]:
    write_nyuv2(folder / "nyuv2")
    return {"root": str(folder / "nyuv2"), "image_size": NYUV2}


def small_cityscapes(folder: Path) -> dict[str, Any]:
    write_cityscapes(folder / "cityscapes2")
    return {"root": str(folder / "cityscapes2"), "image_size": CITYSCAPES}


def write_nyuv2(root: Path) -> Arrays:
    """Eleven photos to train on, so that numbers do not sort as words, and three to validate."""
    return _write(root, NYUV2, {"label": 13}, normals=True)


def write_cityscapes(root: Path) -> Arrays:
    """With all three label folders of the archive; ``label`` holds the seven classes."""
    return _write(root, CITYSCAPES, {"label": 7, "label_7": 7, "label_19": 19}, normals=False)


def _write(root: Path, size: tuple[int, int], labels: dict[str, int], normals: bool) -> Arrays:
    written: Arrays = {}
    for split, count in (("train", 11), ("val", 3)):
        for n in range(count):
            for folder, array in _sample(np.random.default_rng([count, n]), size, labels, normals).items():
                (root / split / folder).mkdir(parents=True, exist_ok=True)
                np.save(root / split / folder / f"{n}.npy", array)
                written[split, folder, n] = array
    return written


def _sample(
    rng: np.random.Generator, size: tuple[int, int], labels: dict[str, int], normals: bool
) -> dict[str, np.ndarray]:
    depth = rng.uniform(0.5, 9.0, (*size, 1)).astype(np.float32)
    depth[:2] = 0
    sample = {"image": rng.random((*size, 3)), "depth": depth}  # the images are float64
    for folder, classes in labels.items():
        sample[folder] = rng.integers(-1, classes, size).astype(np.float64)
        sample[folder][0, :2] = -1, classes - 1
    if normals:
        vectors = rng.normal((0, 0.3, 1), 0.4, (*size, 3))
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        vectors[-2:] = 0
        sample["normal"] = vectors.astype(np.float32)
    return sample
