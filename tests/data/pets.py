"""Fabricates a tiny Oxford-IIIT Pet: the true layout with its oddities, content drawn by code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

COMMENTS = (
    "#Image CLASS-ID SPECIES BREED ID", "#ID: 1:37 Class ids", "#SPECIES: 1:Cat 2:Dog",
    "#BREED ID: 1-25:Cat 1:12:Dog", "#All images with 1st letter as captial are cat images",
    "#images with small first letter are dog images",
)  # fmt: skip


@dataclass
class Pet:
    """What was written for one name."""

    split: str
    breed: int  # from 1
    species: int  # from 1
    trimap: np.ndarray


def write_pets(root: Path) -> dict[str, Pet]:
    """Write the folder and return what is in it, by name: four photos to train on and three to test on.

    Two of the photos are a palette GIF and a CMYK file under the name of a JPEG; one trimap has an
    AppleDouble file beside it; a photo and its trimap are in no split.
    """
    for folder in ("images", "annotations/trimaps", "annotations/xmls"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    plan = {
        "Abyssinian_1": ("trainval", 1, 1, 1), "american_bulldog_10": ("trainval", 2, 2, 1),
        "Egyptian_Mau_14": ("trainval", 12, 1, 5), "yorkshire_terrier_9": ("test", 37, 2, 25),
        "Bengal_3": ("test", 6, 1, 2), "beagle_7": ("trainval", 5, 2, 4), "Sphynx_2": ("test", 34, 1, 12),
        "pug_1": ("", 26, 2, 18),
    }  # fmt: skip
    pets = {}
    for name, (split, breed, species, _) in plan.items():
        height, width = rng.integers(30, 60, 2).tolist()
        trimap = np.full((height, width), 2, np.uint8)
        trimap[8:-6, 7:-9] = 3
        trimap[10:-8, 9:-11] = 1
        Image.fromarray(trimap).save(root / "annotations" / "trimaps" / f"{name}.png")
        photo = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        kind = {"Egyptian_Mau_14": "GIF", "beagle_7": "CMYK"}.get(name, "JPEG")
        photo = photo.convert({"GIF": "P", "CMYK": "CMYK"}.get(kind, "RGB"))
        photo.save(root / "images" / f"{name}.jpg", "GIF" if kind == "GIF" else "JPEG")
        if split:
            pets[name] = Pet(split, breed, species, trimap)
    (root / "annotations" / "trimaps" / "._Abyssinian_1.png").write_bytes(b"\0\5\26\7" + bytes(60))
    lines = {name: " ".join(map(str, (name, *row[1:]))) for name, row in plan.items()}
    _write(root / "annotations" / "list.txt", [*COMMENTS, *lines.values()])
    for split in ("trainval", "test"):
        _write(
            root / "annotations" / f"{split}.txt", [lines[n] for n, pet in pets.items() if pet.split == split]
        )
    return pets


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
