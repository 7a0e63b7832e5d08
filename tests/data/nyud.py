"""Fabricates a tiny NYUD_MT or NYUDv2 folder: the true layout and encodings, content drawn by code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (30, 40)
SPLITS = {"train": ("0003", "0004"), "val": ("0001", "0002", "0005")}


@dataclass
class Room:
    """What was written for one id, as read back where the file kind loses something."""

    image: np.ndarray
    semseg: np.ndarray  # 0 = unlabeled, 1..40
    depth: np.ndarray
    normals: np.ndarray  # as stored: floats, or colors in NYUDv2
    edge: np.ndarray  # 0 or 1
    frames: dict[int, np.ndarray]


def small(folder: Path) -> dict[str, Any]:
    write_nyud(folder / "NYUD_MT")
    return {"root": str(folder / "NYUD_MT"), "image_size": [24, 40]}


def write_nyud(root: Path, layout: str = "NYUD_MT", clip: int = 0) -> dict[str, Room]:
    """Write the folder, with ``clip`` frames before and after each photo, and return what is in it, by id."""
    for name in ("images", "segmentation", "edge", "normals", "depth", "gt_sets"):
        (root / name).mkdir(parents=True)
    for split, ids in SPLITS.items():
        (root / "gt_sets" / f"{split}.txt").write_text("\n".join(ids))
    return {name: _room(root, name, layout, clip) for ids in SPLITS.values() for name in ids}


def _room(root: Path, name: str, layout: str, clip: int) -> Room:
    rng = np.random.default_rng(int(name))
    vectors = rng.normal((0, 0.3, 1), 0.4, (*SIZE, 3))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    vectors[:3] = 0  # a hole
    semseg = rng.integers(0, 41, SIZE, dtype=np.uint8)
    semseg[0, :2] = 0, 40
    depth = rng.uniform(0.5, 9.9, SIZE).astype(np.float32)
    depth[-1] = 0
    edge = rng.integers(0, 2, SIZE, dtype=np.uint8)
    suffix = ".jpg" if layout == "NYUD_MT" else ".png"
    Image.fromarray(semseg).save(root / "segmentation" / f"{name}.png")
    np.save(root / "depth" / f"{name}.npy", depth)
    if layout == "NYUD_MT":
        normals = vectors.astype(np.float32)
        np.save(root / "normals" / f"{name}.npy", normals)
        np.save(root / "edge" / f"{name}.npy", edge)
    else:
        normals = np.rint((vectors + 1) * 127.5).astype(np.uint8)
        Image.fromarray(normals).save(root / "normals" / f"{name}.png")
        Image.fromarray(255 * edge).save(root / "edge" / f"{name}.png")
    frames = {o: _photo(root / "frames" / name / f"{o}.jpg", rng) for o in range(-clip, clip + 1) if o}
    image = _photo(root / "images" / f"{name}{suffix}", rng)
    return Room(image, semseg, depth, normals, edge, frames)


def _photo(path: Path, rng: np.random.Generator) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(path)
    with Image.open(path) as picture:
        return np.array(picture)
