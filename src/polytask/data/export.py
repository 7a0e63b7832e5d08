"""Rooms, clips, faces and pets written in the layouts of public archives, to exercise their readers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image as Picture

from polytask.config import decode
from polytask.data import celeba, cityscapes, nyud, pets, standins, video
from polytask.data.files import scipy_io
from polytask.data.pascal_context import CLASSES
from polytask.data.raycast import Array
from polytask.data.rooms import FIRST_SEED, Rooms
from polytask.data.scenes import compose_scene, trace
from polytask.errors import ConfigError, did_you_mean
from polytask.files import new_folder, override
from polytask.progress import track
from polytask.tasks.segmentation import bit_palette

Files: TypeAlias = dict[str, Any]  # content by name: arrays, pictures, plain data, or the next line of a .txt

VOC = np.array((0, 1, 2, 5, 3, 11, 9, 4, 6, 16, 15, 7, 20), np.uint8)
"""Class of PASCAL VOC for each class of the rooms: the same where there is one, else one left over."""
CONTEXT = np.array((440, 38, 10, 34, 78, 397, 72, 232, 295, 307, 284, 331, 427), np.uint16)
SKY = 360  # as those an id of label maps, but one without normals
_PARTS = ("head", "torso", "luarm", "llarm", "luleg", "llleg")
_BASELINE = 0.22  # meters
_CLIPS, _LABELED, _OFFSETS = {"train": 4_000_000, "val": 4_500_000}, (4, 12, 20, 28), (-2, -1, 1, 2)
_PEOPLE = {"train": range(192), "val": range(192, 224), "test": range(224, 256)}
_PHOTOS = {"train": range(40), "test": range(40, 60)}  # of each breed
_BREEDS = ("Abyssinian", "Bengal", "Maine Coon", "Russian Blue", "Basset Hound", "Beagle", "Boxer",
           "Chihuahua", "Newfoundland", "Pug", "Samoyed", "Shiba Inu")  # fmt: skip


def _room(write: Callable[[Files, str], Files], rooms: Rooms, split: str, index: int) -> Files:
    """Files out of a room's labels, focus and disparity (in widths of the picture)."""
    seed = FIRST_SEED[split] + index
    scene = compose_scene(seed, rooms.difficulty)
    room, focus = trace(scene, *rooms.job(split)[:2]), 0.5 / scene.camera.slope
    shift = _BASELINE * focus / np.where(np.asarray(room["depth"]) > 0, room["depth"], np.inf)
    return write({**room, "name": f"{seed:07d}", "focus": focus, "shift": shift}, split)


def _pascal(room: Files, split: str) -> Files:
    name, semseg = f"{2008 + (split == 'val')}_{room['name'][1:]}", Picture.fromarray(VOC[room["semseg"]])
    semseg.putpalette(bit_palette(256).tobytes())
    kinds = [(field, object) for field in ("class", "class_ind", "mask", "parts")]
    objects = np.array([_object(room, number) for number in np.unique(room["instance"])[1:]], kinds)
    ids = np.where(room["depth"] > 0, CONTEXT[room["semseg"]], SKY)
    return {
        f"ImageSets/Context/{split}.txt": name,
        f"JPEGImages/{name}.jpg": room["image"],
        f"semseg/VOC12/{name}.png": semseg,
        f"normals_distill/{name}.png": _as_colors(room["normals"]),
        f"sal_distill/{name}.png": 255 * room["saliency"],
        f"pascal-context/trainval/{name}.mat": {"LabelMap": ids},
        f"human_parts/{name}.mat": {"anno": {"imname": name, "objects": objects[None]}},
    }


def _object(room: Files, number: int) -> tuple[Any, ...]:
    """Class, its number, mask and parts of an instance, as annotations hold them."""
    mask = room["instance"] == number
    index = int(VOC[room["semseg"][mask][0]])
    masks = [(n, np.uint8(mask & (room["human_parts"] == part))) for part, n in enumerate(_PARTS, 1)]
    parts = np.array([p for p in masks if p[1].any()], [("part_name", object), ("mask", object)])[None]
    return CLASSES[index], index, np.uint8(mask), parts if parts.size else np.zeros((0, 0))


def _as_colors(normals: Array) -> Array:
    return np.rint((normals + 1.0) * 127.5).astype(np.uint8)


def _nyud(archive: str, room: Files, split: str) -> Files:
    kinds, name = nyud.LAYOUTS[archive], room["name"]
    labels = {**room, "semseg": np.where(room["depth"] > 0, room["semseg"] + np.uint8(1), np.uint8(0))}
    if kinds["normals"] == ".png":
        labels |= {"normals": _as_colors(room["normals"]), "edge": 255 * room["edge"]}
    files = {f"{folder}/{name}{kinds[field]}": labels[field] for field, folder in nyud.FOLDERS.items()}
    return {f"gt_sets/{split}.txt": name, **files}


def _clip(rooms: Rooms, split: str, index: int) -> Files:
    """A labeled frame and those around it."""
    seed, middle = _CLIPS[split] + index // len(_LABELED), _LABELED[index % len(_LABELED)]
    scenes = {k: video.compose_frame(seed, middle + k, rooms.difficulty) for k in (0, *_OFFSETS)}
    frames = {k: trace(scene, *rooms.job(split)[:2]) for k, scene in scenes.items()}
    files = _nyud("NYUD_MT", {**frames.pop(0), "name": f"{seed}{middle:02d}"}, split)
    return files | {f"frames/{seed}{middle:02d}/{k}.jpg": frame["image"] for k, frame in frames.items()}


def _mtan(street: bool, room: Files, split: str) -> Files:
    ids, index = room["semseg"], int(room["name"][1:])
    outdoors = ids + 1  # persons are persons there
    category = np.searchsorted(cityscapes.CATEGORY_IDS, cityscapes.CLASS_IDS, "right") - 1
    home = {"label": ids, "normal": room["normals"], "depth": room["depth"][..., None]}
    city = {"label_19": outdoors, "label_7": category[outdoors], "depth": room["shift"][..., None]}
    arrays = {"image": room["image"] / 255, **(city if street else home)}
    return {f"{split}/{field}/{index}.npy": np.float32(array) for field, array in arrays.items()}


def _cityscapes(room: Files, split: str) -> Files:
    (height, width), name = room["depth"].shape, f"{split}/rooms/rooms_{room['name']}_000019"
    lens = {"fx": room["focus"] * width, "fy": room["focus"] * width, "u0": 0.5 * width, "v0": 0.5 * height}
    shift = np.rint(256 * width * room["shift"]).clip(0, 65534) + (room["depth"] > 0)
    fine = np.array(cityscapes.CLASS_IDS, np.uint8)[room["semseg"] + 1]
    around = sliding_window_view(np.pad(fine, 1, mode="edge"), (3, 3))
    coarse = np.where(around.min((2, 3)) == around.max((2, 3)), fine, np.uint8(0))
    files: Files = {
        f"leftImg8bit/{name}_leftImg8bit.png": room["image"],
        f"disparity/{name}_disparity.png": shift.astype(np.uint16),
        f"camera/{name}_camera.json": {"extrinsic": {"baseline": _BASELINE}, "intrinsic": lens},
    }
    for kind, ids in (("gtFine", fine), ("gtCoarse", coarse)):
        numbers = np.where(ids >= 24, np.uint16(1000) * ids + room["instance"], ids)  # of what is counted
        files |= {f"{kind}/{name}_{kind}_{k}Ids.png": v for k, v in (("label", ids), ("instance", numbers))}
    return files


def _celeba(_: Rooms, split: str, index: int) -> Files:
    person, view = _PEOPLE[split][index // standins.VIEWS], index % standins.VIEWS
    (picture, holds), name = standins.portrait(person, view), f"{standins.VIEWS * person + view + 1:06d}.jpg"
    signs = " ".join("1" if attribute in holds else "-1" for attribute in celeba.ATTRIBUTES)
    return {
        f"img_align_celeba/{name}": picture,
        "list_attr_celeba.txt": f"{name} {signs}",
        "identity_CelebA.txt": f"{name} {person + 1}",
        "list_eval_partition.txt": f"{name} {[*_PEOPLE].index(split)}",
    }


def _pets(_: Rooms, split: str, index: int) -> Files:
    number, breed = _PHOTOS[split][index // len(_BREEDS)], index % len(_BREEDS)
    picture, trimap = standins.pet(breed, number)
    species, name = (1, _BREEDS[breed]) if breed < standins.CATS else (2, _BREEDS[breed].lower())
    name = f"{name.replace(' ', '_')}_{number + 1}"
    line = f"{name} {pets.BREEDS.index(_BREEDS[breed]) + 1} {species} {breed % standins.CATS + 1}"
    return {
        f"images/{name}.jpg": picture,
        f"annotations/trimaps/{name}.png": trimap,
        f"annotations/{'trainval' if split == 'train' else split}.txt": line,
        "annotations/list.txt": line,
    }


LAYOUTS: Mapping[str, Callable[[Rooms, str, int], Files]] = {
    "PASCAL_MT": partial(_room, _pascal),
    "NYUD_MT": partial(_room, partial(_nyud, "NYUD_MT")),
    "NYUD_MT-clips": _clip,
    "NYUDv2": partial(_room, partial(_nyud, "NYUDv2")),
    "nyuv2": partial(_room, partial(_mtan, False)),
    "cityscapes": partial(_room, _cityscapes),
    "cityscapes2": partial(_room, partial(_mtan, True)),
    "CelebA": _celeba,
    "oxford-iiit-pet": _pets,
}
"""What makes the files of one sample."""
_SIZES = {
    "CelebA": {split: standins.VIEWS * len(people) for split, people in _PEOPLE.items()},
    "oxford-iiit-pet": {split: len(_BREEDS) * len(numbers) for split, numbers in _PHOTOS.items()},
}


def export(
    layout: str,
    out: Path,
    settings: Sequence[str] = (),
    *,
    split: str | None = None,
    count: int | None = None,
) -> dict[str, int]:
    """Fill a new folder in one of ``LAYOUTS``, up to ``count`` per split; returns the samples per split.

    ``settings`` are ``A=V`` texts for ``Rooms``, such as ``preset=nano``; faces and pets take none.

    Raises:
        ConfigError: unknown layout, split or setting, or there is something at ``out`` already.
        MissingDependencyError: scipy is needed and not installed.
    """
    if layout not in LAYOUTS:
        raise ConfigError("unknown layout", where="LAYOUT", got=layout, hint=did_you_mean(layout, LAYOUTS))
    sizes, rooms = _SIZES.get(layout), decode(Rooms, override({}, settings), source="--set")
    if sizes and settings:
        raise ConfigError(f"{layout} takes no settings", where="--set", got=settings[0])
    sizes = sizes or {name: rooms.job(name).images for name in _CLIPS}
    if split not in (None, *sizes):
        raise ConfigError("unknown split", where="--split", got=split, hint=did_you_mean(str(split), sizes))
    counts = {
        n: size if count is None else min(size, count) for n, size in sizes.items() if split in (None, n)
    }
    with new_folder(out, "OUT") as draft:
        places = [(name, index) for name, size in counts.items() for index in range(size)]
        for place in track(places, f"exporting {layout}"):
            for file, content in LAYOUTS[layout](rooms, *place).items():
                _save(draft / file, content)
        if layout == "CelebA":
            path, names = draft / "list_attr_celeba.txt", " ".join(celeba.ATTRIBUTES)
            path.write_text(f"{sum(counts.values())}\n{names} \n{path.read_text()}")
    return counts


def _save(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".txt":
        with path.open("a") as file:
            file.write(f"{content}\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(content))
    elif path.suffix == ".npy":
        np.save(path, content)
    elif path.suffix == ".mat":
        scipy_io(path).savemat(path, content, do_compression=True)
    else:
        picture = content if isinstance(content, Picture.Image) else Picture.fromarray(content)
        picture.save(path, quality=95)
