"""Fabricates a tiny PASCAL_MT folder: the true layout, file kinds and encodings, content drawn by code."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from polytask.data.pascal_context import PART_NAMES, WITH_NORMALS

PERSON, BOTTLE = 15, 5
OUTDOORS = 360  # a context id whose normals are not to be trusted
_PARTS = np.dtype([("part_name", object), ("mask", object)])
_OBJECTS = np.dtype([("class", object), ("class_ind", object), ("mask", object), ("parts", object)])


@dataclass
class Photo:
    """What was written for one id."""

    split: str
    size: tuple[int, int]
    person: bool
    context: np.ndarray
    semseg: np.ndarray
    saliency: np.ndarray
    normals: np.ndarray  # uint8 colors
    parts: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.uint8))

    @property
    def trusted(self) -> np.ndarray:
        """Where normals are valid."""
        return np.isin(self.context, sorted(WITH_NORMALS))


def write_pascal_mt(root: Path) -> dict[str, Photo]:
    """Write the folder and return what is in it, by id: two photos to train on and three to validate."""
    for name in (
        "JPEGImages", "ImageSets/Context", "ImageSets/Parts", "pascal-context/trainval", "semseg/VOC12",
        "semseg/pascal-context", "human_parts", "normals_distill", "sal_distill",
    ):  # fmt: skip
        (root / name).mkdir(parents=True)
    plan = {
        "2008_000008": ("train", (33, 47), True),
        "2008_000015": ("train", (40, 31), False),
        "2008_000002": ("val", (36, 48), True),
        "2008_000003": ("val", (29, 29), False),
        "2008_000016": ("val", (24, 50), False),
    }
    photos = {name: _photo(root, name, split, size, person) for name, (split, size, person) in plan.items()}
    for split in ("train", "val"):
        ids = [name for name, photo in photos.items() if photo.split == split]
        (root / "ImageSets" / "Context" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    return photos


def _photo(root: Path, name: str, split: str, size: tuple[int, int], person: bool) -> Photo:
    rng = np.random.default_rng(int(name[-6:]))
    height, width = size
    box = np.zeros(size, bool)
    box[height // 4 : height * 3 // 4, width // 3 : width * 2 // 3] = True
    context = np.where(box, 284 if person else 34, 440).astype(np.uint16)
    context[:, :4] = OUTDOORS
    semseg = np.where(box, PERSON if person else BOTTLE, 0).astype(np.uint8)
    if person:
        semseg[height // 4] = 255
    photo = Photo(
        split,
        size,
        person,
        context,
        semseg,
        rng.integers(0, 256, size, dtype=np.uint8),
        _normals(rng, size),
    )
    pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
    _write_semseg(root, name, semseg, palette=person)
    Image.fromarray(photo.saliency).save(root / "sal_distill" / f"{name}.png")
    Image.fromarray(photo.normals).save(root / "normals_distill" / f"{name}.png")
    savemat(root / "pascal-context" / "trainval" / f"{name}.mat", {"LabelMap": context})
    objects, photo.parts = _objects(size, person, box)
    anno = {"imname": name, "objects": objects}
    savemat(root / "human_parts" / f"{name}.mat", {"anno": anno}, do_compression=person)
    return photo


def _normals(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    vectors = rng.normal((0, 0.3, 1), 0.4, (*size, 3))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.rint((vectors + 1) * 127.5).astype(np.uint8)


def _write_semseg(root: Path, name: str, semseg: np.ndarray, palette: bool) -> None:
    picture = Image.fromarray(semseg)
    if palette:
        picture.putpalette([value * 5 % 256 for value in range(768)])
    picture.save(root / "semseg" / ("VOC12" if palette else "pascal-context") / f"{name}.png")


def _objects(size: tuple[int, int], person: bool, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Objects as the annotation files hold them, and the map they amount to; later parts cover earlier."""
    drawn = np.zeros(size, np.uint8)
    car = _object("car", 7, box, [("fwheel", box)])
    if not person:
        return _row([car], _OBJECTS), drawn
    top, parts = int(np.nonzero(box.any(1))[0][0]), []
    for part, names in enumerate(PART_NAMES):
        for offset, name in enumerate(names):
            mask = np.zeros(size, np.uint8)
            mask[top + 2 * part : top + 2 * part + 3, size[1] // 3 + offset :: 7] = 1
            parts.append((name, mask))
            drawn[mask != 0] = part
    people = [_object("person", PERSON, box, []), _object("person", PERSON, box, parts)]
    return _row([car, *people], _OBJECTS), drawn


def _object(name: str, number: int, mask: np.ndarray, parts: list[tuple[str, np.ndarray]]) -> tuple:
    return name, number, mask.astype(np.uint8), _row(parts, _PARTS) if parts else np.zeros((0, 0))


def _row(items: list[tuple], kind: np.dtype) -> np.ndarray:
    """A 1 x n struct array."""
    row = np.empty((1, len(items)), kind)
    for i, item in enumerate(items):
        row[0, i] = item
    return row
