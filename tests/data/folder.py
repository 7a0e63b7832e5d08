"""Fabricates a folder as people have them: photos, masks with odd ids, millimeters, and a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (24, 36)


def write_folder(root: Path) -> dict[str, Any]:
    """Write the folder and return the settings that read it; the raw arrays are in ``raw.npz``.

    Below the root: ``photos/<split>/<name>_rgb.<ending>`` (five to train on, three to validate),
    ``masks/<split>/<name>.png`` with 0 and 255, ``ids/<name>.png`` (16 bit, ids 7, 400 and others),
    ``depth/<name>.png`` in millimeters with 65535 for holes, ``normals/<name>.png`` as colors with black for
    holes, and ``table.csv``.
    """
    rng, raw = np.random.default_rng(0), {}
    for folder in ("photos/train", "photos/val", "masks/train", "masks/val", "ids", "depth", "normals"):
        (root / folder).mkdir(parents=True)
    rows = ["image,room,sunny,tidy,place"]
    for i in range(8):
        name, split = f"p{i}", "train" if i < 5 else "val"
        raw[f"{name}_mask"] = np.where(rng.random(SIZE) < 0.4, 255, 0).astype(np.uint8)
        raw[f"{name}_ids"] = rng.choice([7, 400, 9], SIZE).astype(np.uint16)
        raw[f"{name}_depth"] = rng.choice([65535, 1000, 2500], SIZE).astype(np.uint16)
        colors = rng.integers(1, 256, (*SIZE, 3), dtype=np.uint8)
        colors[:3] = 0
        raw[f"{name}_normals"] = colors
        photo = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(photo).save(root / "photos" / split / f"{name}_rgb.{'png' if i % 2 else 'JPG'}")
        files = {"masks/" + split: "mask", "ids": "ids", "depth": "depth", "normals": "normals"}
        for folder, kind in files.items():
            Image.fromarray(raw[f"{name}_{kind}"]).save(root / folder / f"{name}.png")
        rows.append(f"{name}_rgb,{('kitchen', 'bath', '')[i % 3]},{i % 2},{'' if i == 0 else 1},{i % 4}")
    (root / "photos" / "train" / "notes.md").write_text("not a photo")
    (root / "table.csv").write_text("\ufeff" + "\n".join(rows) + "\n", encoding="utf-8")
    np.savez(root / "raw.npz", **raw)
    return settings(root)


def settings(root: Path) -> dict[str, Any]:
    """What describes the folder, as it stands under ``data`` in a recipe."""
    return {
        "root": str(root),
        "image_size": list(SIZE),
        "splits": {"train": "photos/train/*_rgb.*", "val": "photos/val/*_rgb.*"},
        "targets": {
            "marked": {"task": "saliency", "file": "masks/{split}/{star}.png", "ids": {0: 0, 255: 1}},
            "surface": {
                "task": {"type": "segmentation", "classes": ["floor", "wall"]},
                "file": "{folder}/../../ids/{star}.png",
                "ids": {7: 0, 400: 1},
            },
            "depth": {"task": "depth", "file": "depth/{star}.png", "scale": 0.001, "ignore": 65535},
            "normals": {"task": "normals", "file": "normals/{star}.png", "scale": [1, -1, -1], "ignore": 0},
            "room": {"task": {"type": "classification", "classes": ["bath", "kitchen"]}, "file": "table.csv"},
            "facts": {"task": {"type": "attributes", "names": ["sunny", "tidy"]}, "file": "table.csv"},
            "place": {"task": {"type": "embedding", "dimension": 4}, "file": "table.csv"},
            "again": {"task": "reconstruction"},
        },
    }
