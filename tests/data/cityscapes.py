"""Fabricates a tiny Cityscapes folder with fine and coarse labels, disparity and cameras."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (16, 32)
BASELINE, FOCUS = 0.21, 60.0
CITIES = {"train": ("aachen", "bochum"), "val": ("frankfurt",), "train_extra": ("augsburg",)}
NAMES = {  # of the official table of labels: id and category by class
    "road": (7, "flat"), "sidewalk": (8, "flat"), "building": (11, "construction"),
    "wall": (12, "construction"), "fence": (13, "construction"), "pole": (17, "object"),
    "traffic light": (19, "object"), "traffic sign": (20, "object"), "vegetation": (21, "nature"),
    "terrain": (22, "nature"), "sky": (23, "sky"), "person": (24, "human"), "rider": (25, "human"),
    "car": (26, "vehicle"), "truck": (27, "vehicle"), "bus": (28, "vehicle"), "train": (31, "vehicle"),
    "motorcycle": (32, "vehicle"), "bicycle": (33, "vehicle"),
}  # fmt: skip
ONLY_IN_CATEGORIES = {
    "flat": (9, 10), "construction": (14, 15, 16), "object": (18,), "vehicle": (29, 30),
}  # fmt: skip


@dataclass
class Street:
    """What was written for one image."""

    image: np.ndarray
    ids: dict[str, np.ndarray]  # by gtFine, gtCoarse
    disparity: np.ndarray


def small(folder: Path) -> dict[str, Any]:
    write_cityscapes(folder / "cityscapes")
    return {"root": str(folder / "cityscapes"), "image_size": [16, 24]}


def write_cityscapes(root: Path) -> dict[str, Street]:
    """Two images of each city; what is in them, by record id."""
    streets = {}
    for split, cities in CITIES.items():
        for city in cities:
            for frame in (19, 294):
                name = f"{city}_000000_{frame:06d}"
                streets[name] = _street(root, f"{split}/{city}", name, len(streets))
    return streets


def _street(root: Path, place: str, name: str, seed: int) -> Street:
    rng = np.random.default_rng(seed)

    def save(folder: str, ending: str, array: np.ndarray) -> None:
        (root / folder / place).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(root / folder / place / f"{name}_{ending}.png")

    image = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    save("leftImg8bit", "leftImg8bit", image)
    ids = {}
    for kind in ("gtCoarse",) if "extra" in place else ("gtFine", "gtCoarse"):
        ids[kind] = rng.integers(0, 34, SIZE, dtype=np.uint8)
        ids[kind].flat[:34] = range(34)
        save(kind, f"{kind}_labelIds", ids[kind])
        save(kind, f"{kind}_instanceIds", 1000 * ids[kind].astype(np.uint16))
        save(kind, f"{kind}_color", rng.integers(0, 256, (*SIZE, 4), dtype=np.uint8))
    disparity = rng.integers(0, 32257, SIZE, dtype=np.uint16)
    disparity[0, :4] = 0, 1, 2, 41  # unknown, infinitely far, 3226 m, 80.6 m
    save("disparity", "disparity", disparity)
    (root / "camera" / place).mkdir(parents=True, exist_ok=True)
    camera = {"extrinsic": {"baseline": BASELINE, "z": 1.2}, "intrinsic": {"fx": FOCUS, "u0": 16.0}}
    (root / "camera" / place / f"{name}_camera.json").write_text(json.dumps(camera))
    return Street(image, ids, disparity)
