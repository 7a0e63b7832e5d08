"""Fabricates a tiny CelebA: the true layouts, file kinds and headers, content drawn by code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from polytask.data.celeba import ATTRIBUTES

SPLITS = ("train", "val", "test")


@dataclass
class Face:
    """What was written for one file."""

    split: str
    person: int
    attributes: list[int]


def write_celeba(root: Path, *, flat: bool = False) -> dict[str, Face]:
    """Write the folder and return what is in it, by file: six faces to train on, four each for val and test.

    Args:
        root: folder to make.
        flat: all lists beside the images, as torchvision has them, instead of Anno, Eval and Img.
    """
    lists, partition, images = (root / ("" if flat else name) for name in ("Anno", "Eval", "Img"))
    for folder in (lists, partition, images / "img_align_celeba"):
        folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    plan = [("train", 2880), ("train", 2937), ("train", 2880), ("val", 8692), ("val", 8692), ("test", 7)]
    plan += [("test", 9040), ("train", 2937), ("val", 15), ("train", 31), ("test", 7), ("val", 15)]
    plan += [("train", 31), ("test", 7)]
    faces = {
        f"{i:06d}.jpg": Face(split, person, rng.integers(0, 2, len(ATTRIBUTES)).tolist())
        for i, (split, person) in enumerate(plan, 1)
    }
    for name in faces:
        pixels = rng.integers(0, 256, (55, 45, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / "img_align_celeba" / name, quality=95)
    signs = [f"{n} {' '.join(f'{2 * v - 1:2d}' for v in face.attributes)}" for n, face in faces.items()]
    header = [str(len(faces)), " ".join(ATTRIBUTES) + " "]  # the true file has this trailing space
    _write(lists / "list_attr_celeba.txt", [*header, *signs])
    _write(lists / "identity_CelebA.txt", [f"{n} {face.person}" for n, face in faces.items()])
    _write(partition / "list_eval_partition.txt", [f"{n} {SPLITS.index(f.split)}" for n, f in faces.items()])
    return faces


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
