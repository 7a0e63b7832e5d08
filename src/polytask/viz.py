"""Pictures: prediction panels and contact sheets."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from polytask.data.base import DatasetSpec
from polytask.data.maps import plain
from polytask.data.pipelines import Pipeline
from polytask.errors import ConfigError, DataError
from polytask.files import make_folder
from polytask.model import MultiTaskModel
from polytask.tasks.base import Task, TaskSet
from polytask.types import Sample

GAP, LABEL_HEIGHT = 4, 16


def to_picture(image: Tensor, pipeline: Pipeline) -> np.ndarray:
    """A normalized image ``[3, H, W]`` back to uint8 ``[H, W, 3]``."""
    picture: np.ndarray = pipeline.denormalize(image.cpu()).permute(1, 2, 0).numpy()
    return picture


def task_picture(task: Task, value: Tensor, like: np.ndarray) -> np.ndarray:
    """One target or prediction (no batch axis) as a picture of the size of ``like``."""
    array = value.detach().cpu().numpy()
    if not task.dense:
        return text_picture(task.caption(array), like.shape[0], like.shape[1])
    return task.colorize(array[0] if array.ndim == 3 and array.shape[0] == 1 else array)


def text_picture(text: str, height: int, width: int) -> np.ndarray:
    """Words centered on white."""
    picture = Image.new("RGB", (width, height), "white")
    lines = textwrap.fill(text, max(width // 6, 1))
    ImageDraw.Draw(picture).text((width / 2, height / 2), lines, fill="black", anchor="mm", font=_font())
    return np.asarray(picture)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=11)


@torch.no_grad()
def predictions(model: MultiTaskModel, tasks: TaskSet, sample: Sample) -> dict[str, Tensor]:
    """Predictions for one sample, without batch axis."""
    device = next(model.parameters()).device
    output = model(sample["image"][None].to(device), tuple(tasks))
    return {name: task.predict(output.logits[name].float())[0].cpu() for name, task in tasks.items()}


def grid(
    rows: Sequence[Sequence[np.ndarray]], row_names: Sequence[str], column_names: Sequence[str]
) -> Image.Image:
    """Pictures in a grid with names above the columns and left of the rows; each row has its own height."""
    heights = [max(picture.shape[0] for picture in row) for row in rows]
    width = max(picture.shape[1] for row in rows for picture in row)
    left = 8 + max(int(_font().getlength(name)) for name in row_names)
    size = left + len(column_names) * (width + GAP), LABEL_HEIGHT + sum(heights) + len(rows) * GAP
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(column_names):
        draw.text(
            (left + column * (width + GAP) + width / 2, LABEL_HEIGHT / 2),
            name,
            fill="black",
            anchor="mm",
            font=_font(),
        )
    top = LABEL_HEIGHT
    for name, height, pictures in zip(row_names, heights, rows, strict=True):
        draw.text((left - 4, top + height / 2), name, fill="black", anchor="rm", font=_font())
        for column, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (left + column * (width + GAP), top))
        top += height + GAP
    return sheet


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture; the kind of file follows from the ending.

    Raises:
        ConfigError: an ending that stands for no kind of picture, or a folder that cannot be made.
    """
    if path.suffix.lower() not in Image.registered_extensions():
        raise ConfigError(
            "no kind of picture has this ending", where="--output", got=path.name, hint="use .png"
        )
    make_folder(path.parent, "--output")
    picture.save(path)


def data_uri(picture: Image.Image) -> str:
    """A picture to embed in a page."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def contact_sheet(
    spec: DatasetSpec, split: str | None, count: int, tasks: TaskSet | None = None
) -> Image.Image:
    """Samples of a split (default: the first) as they are stored, with labels (default: all) laid over them.

    Raises:
        ConfigError: unknown split or task.
        DataError: an empty split, and what the dataset raises.
    """
    tasks, split = tasks or TaskSet(spec.labels()), split or spec.split_names()[0]
    records = spec.open(split, tasks, train=False).records[:count]
    if not records:
        raise DataError("the split is empty", where=f"{spec.type}, {split}")
    rows = []
    for record in records:
        sample = {name: plain(value) for name, value in spec.load(record, tasks).items()}
        photo = sample["image"].float().round().clamp(0, 255).to(torch.uint8)
        picture = _fitted(photo.permute(1, 2, 0).numpy())
        rows.append([picture, *(_laid_over(picture, task, sample[name]) for name, task in tasks.items())])
    return grid(rows, [record.id for record in records], ["image", *tasks])


def _laid_over(picture: np.ndarray, task: Task, value: Tensor) -> np.ndarray:
    drawn = _fitted(task_picture(task, value, picture))
    return (0.4 * picture + 0.6 * drawn).astype(np.uint8) if task.dense and not task.of_image else drawn


def _fitted(picture: np.ndarray) -> np.ndarray:
    """Pixels repeated until there are 120 rows, or averaged until there are no more than 480."""
    times = -(-120 // picture.shape[0])
    larger = picture.repeat(times, axis=0).repeat(times, axis=1)
    return np.asarray(Image.fromarray(larger).reduce(-(-picture.shape[0] // 480)))
