"""Data loading: the PASCAL training pipeline at 512x512 with five label maps against a plain one.

The plain side does what the official code of the ATRC line does, written from its description: every file is
read for every sample, the whole photo and all maps are scaled, then cropped, flipped, recolored, normalized
and padded, with OpenCV if it is installed, else with Pillow and NumPy. (Only edges are made by the library on
both sides.) Photos are rooms rendered at 375x500, in the layout of PASCAL_MT. Both sides must agree on every
label and on what evaluation sees before anything is timed.

    python benchmarks/data.py [--quick] [--json]
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import interleave, median_ratio, parse, report
from PIL import Image
from scipy.io import loadmat
from torch.utils.data import DataLoader, Dataset

from polytask.allocator import keep_freed_memory
from polytask.data import datasets, rooms  # noqa: F401
from polytask.data.base import train_loader
from polytask.data.cache import prepare
from polytask.data.crops import Atrc
from polytask.data.export import export
from polytask.data.pascal_context import PART_NAMES, WITH_NORMALS, PascalContext, boundaries
from polytask.data.pipelines import Astmt
from polytask.tasks.base import TaskSet

try:
    import cv2

    cv2.setNumThreads(1)
except ModuleNotFoundError:
    cv2 = None

SIZE, BATCH = 512, 4
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
PART = {name: number for number, names in enumerate(PART_NAMES) for name in names}
FILLS = {"image": 0.0, "semseg": 255, "human_parts": 255, "saliency": 255, "edge": 255, "normals": 0.0}
Arrays = dict[str, Any]


# --- the plain side --------------------------------------------------------------------------------


def read(root: Path, name: str) -> Arrays:
    """All fields of a photo, from their files."""
    sample: Arrays = {"image": np.array(Image.open(root / "JPEGImages" / f"{name}.jpg").convert("RGB"))}
    sample["semseg"] = np.array(Image.open(root / "semseg/VOC12" / f"{name}.png"))
    sample["saliency"] = np.uint8(np.array(Image.open(root / "sal_distill" / f"{name}.png")) > 127)
    ids = loadmat(root / "pascal-context/trainval" / f"{name}.mat")["LabelMap"]
    sample["edge"] = np.uint8(boundaries(ids))
    colors = np.array(Image.open(root / "normals_distill" / f"{name}.png"))
    valid = np.isin(ids, list(WITH_NORMALS))[..., None]
    sample["normals"] = np.where(valid, 2 * np.float32(colors) / 255 - 1, np.float32(0))
    parts = np.zeros(ids.shape, np.uint8)
    for thing in loadmat(root / "human_parts" / f"{name}.mat")["anno"]["objects"].item().flat:
        if thing["class_ind"].item() == 15:
            for part in thing["parts"].flat:
                parts[part["mask"] != 0] = PART[part["part_name"].item()]
    return {**sample, "human_parts": parts}


def resize(array: np.ndarray, size: tuple[int, int], smooth: bool) -> np.ndarray:
    """To (height, width), bilinear or nearest."""
    if cv2:
        return cv2.resize(array, size[::-1], interpolation=cv2.INTER_LINEAR if smooth else cv2.INTER_NEAREST)
    if array.dtype == np.float32:
        rows, columns = (np.arange(new) * old // new for old, new in zip(array.shape, size, strict=False))
        return array[rows][:, columns]
    way = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return np.array(Image.fromarray(array).resize(size[::-1], way))


def scale(sample: Arrays, rng: np.random.Generator) -> Arrays:
    """Everything, by one factor."""
    factor = rng.uniform(0.5, 2.0)
    height, width = (int(n * factor) for n in sample["image"].shape[:2])
    return {name: resize(array, (height, width), name == "image") for name, array in sample.items()}


def crop(sample: Arrays, rng: np.random.Generator) -> Arrays:
    """A part in which no class takes up more than three quarters, if ten draws find one."""
    height, width = sample["image"].shape[:2]
    for _ in range(10):
        y, x = rng.integers(max(height - SIZE, 0) + 1), rng.integers(max(width - SIZE, 0) + 1)
        part = sample["semseg"][y : y + SIZE, x : x + SIZE]
        classes, counts = np.unique(part, return_counts=True)
        counts = counts[classes != 255]
        if len(counts) > 1 and counts.max() < 0.75 * counts.sum():
            break
    return {name: array[y : y + SIZE, x : x + SIZE] for name, array in sample.items()}


def flip(sample: Arrays, rng: np.random.Generator) -> Arrays:
    """All maps, and the x of vectors."""
    if rng.random() < 0.5:
        sample = {name: array[:, ::-1].copy() for name, array in sample.items()}
        sample["normals"][..., 0] *= -1
    return sample


def from_hsv(hsv: np.ndarray) -> np.ndarray:
    """Bytes to RGB."""
    picture = Image.merge(
        "HSV", [Image.fromarray(np.ascontiguousarray(channel)) for channel in hsv.transpose(2, 0, 1)]
    )
    return np.array(picture.convert("RGB"))


def recolor(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue, each with probability 0.5."""
    image = np.float32(image)
    if rng.random() < 0.5:
        image = np.clip(image + rng.uniform(-32, 32), 0, 255)
    late = rng.random() < 0.5
    contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else None
    if contrast and not late:
        image = np.clip(image * contrast, 0, 255)
    image, turn = np.uint8(image), 180 if cv2 else 256
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV) if cv2 else np.array(Image.fromarray(image).convert("HSV"))
    if rng.random() < 0.5:
        hsv[..., 1] = np.clip(hsv[..., 1] * np.float32(rng.uniform(0.5, 1.5)), 0, 255)
    if rng.random() < 0.5:
        hsv[..., 0] = (hsv[..., 0].astype(int) + rng.integers(-turn // 10, turn // 10)) % turn
    image = (
        cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) if cv2 else np.array(Image.fromarray(hsv, "HSV").convert("RGB"))
    )
    if contrast and late:
        image = np.clip(image * np.float32(contrast), 0, 255)
    return np.float32(image)


def finish(sample: Arrays) -> dict[str, torch.Tensor]:
    """Normalize, pad in the middle, mark empty maps of parts, to tensors."""
    finished, image = {}, (np.float32(sample["image"]) / 255 - MEAN) / STD
    for name, array in {**sample, "image": image}.items():
        above, left = ((SIZE - n) // 2 for n in array.shape[:2])
        padding = (above, SIZE - above - array.shape[0]), (left, SIZE - left - array.shape[1])
        padded = np.pad(array, padding + ((0, 0),) * (array.ndim - 2), constant_values=FILLS[name])
        if name == "human_parts" and not np.setdiff1d(padded, (0, 255)).size:
            padded[:] = 255
        if name == "normals":
            padded = padded / np.maximum(np.linalg.norm(padded, axis=-1, keepdims=True), 1e-12)
        tensor = torch.from_numpy(padded)
        finished[name] = tensor.permute(2, 0, 1).contiguous() if array.ndim == 3 else tensor.long()[None]
    return finished


def augment(sample: Arrays, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """The training transforms."""
    sample = flip(crop(scale(sample, rng), rng), rng)
    return finish({**sample, "image": recolor(sample["image"], rng)})


class Plain(Dataset):
    """What a straightforward loader does for a sample."""

    def __init__(self, root: Path, names: list[str]) -> None:
        self.root, self.names, self.rng = root, names, np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return augment(read(self.root, self.names[index]), self.rng)


# --- measurement -----------------------------------------------------------------------------------


def check_equal(spec: PascalContext) -> None:
    """Labels, and what evaluation sees, are the same on both sides."""
    tasks = TaskSet(spec.TASKS)
    samples = spec.open("train", tasks, train=False)
    for index, record in enumerate(spec.records("train")):
        plain = read(spec.root, record.id)
        for name in tasks:
            assert np.array_equal(plain[name], spec.read(record, name).numpy()), name
        ours = samples[index]
        for name, value in finish(plain).items():
            assert torch.allclose(ours[name].float(), value.float(), atol=1e-4), name


def epochs(run: Callable[[int], Any]) -> Callable[[], None]:
    """Goes through one more epoch at each call."""
    counter = itertools.count()

    def once() -> None:
        for _ in run(next(counter)):
            pass

    return once


def main() -> None:
    """Time whole epochs with and without the cache, and the transforms alone."""
    args = parse(__doc__.splitlines()[0])
    torch.set_num_threads(1)
    keep_freed_memory()  # as `polytask train` does; for both sides
    count, rounds = (8, 5) if args.quick else (24, 15)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["POLYTASK_CACHE"] = f"{folder}/cache"
        root = Path(folder) / "PASCAL_MT"
        rooms.PRESETS["nano"] = rooms.Preset(375, 500, count, 1, 1)
        export("PASCAL_MT", root, ["preset=nano"], split="train")
        spec = PascalContext(root=root, image_size=(SIZE, SIZE), pipeline=Atrc(), label_cache="never")
        cached = spec.model_copy(update={"label_cache": "auto"})
        affine = cached.model_copy(update={"pipeline": Astmt()})
        check_equal(spec)
        prepare(cached, ["train"])
        check_equal(cached)
        names, tasks = [record.id for record in spec.records("train")], TaskSet(spec.TASKS)

        def load(chosen: PascalContext) -> Callable[[], None]:
            samples = chosen.open("train", tasks, train=True)
            return epochs(lambda epoch: train_loader(samples, batch_size=BATCH, epoch=epoch, seed=0))

        plain = DataLoader(Plain(root, names), BATCH, shuffle=True)
        sides = {"read": load(spec), "cached": load(cached), "cached, astmt": load(affine)}
        sides["plain"] = epochs(lambda _: plain)
        seconds = interleave(sides, rounds)
        decoded = [read(root, name) for name in names]
        loaded = [spec.load(record, tasks) for record in spec.records("train")]
        rng = np.random.default_rng(0)
        sides = {
            "plain transforms": lambda: [augment(sample, rng) for sample in decoded],
            "transforms": lambda: [spec.pipeline.train(sample, (SIZE, SIZE)) for sample in loaded],
        }
        seconds |= interleave(sides, rounds)
    ratios = {
        "samples/s, with the cache / plain": 1 / median_ratio(seconds, "cached", "plain"),
        "samples/s, without the cache / plain": 1 / median_ratio(seconds, "read", "plain"),
        "samples/s, transforms / plain transforms": 1
        / median_ratio(seconds, "transforms", "plain transforms"),
    }
    settings = {
        "photos": count, "photo": "375x500", "image_size": SIZE, "batch": BATCH, "rounds": rounds,
        "tasks": list(tasks), "plain side": f"OpenCV {cv2.__version__}" if cv2 else "Pillow and NumPy",
        "unit": "CPU seconds of one thread, no workers, median of ratios",
        "samples/s": {name: round(count / float(np.median(times)), 1) for name, times in seconds.items()},
    }  # fmt: skip
    report(args, settings, ratios)


if __name__ == "__main__":
    main()
