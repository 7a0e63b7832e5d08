"""Predictions of a trained run for a person's own images, of any size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Pictures
from PIL import ImageOps
from torch import Tensor
from torchvision.tv_tensors import Image

from polytask.data.base import DatasetSpec
from polytask.errors import DataError
from polytask.files import make_folder
from polytask.model import MultiTaskModel
from polytask.progress import track
from polytask.runs import Run
from polytask.tasks.base import TaskSet


def read_image(path: Path) -> Tensor:
    """A picture file, turned upright, as uint8 ``[3, H, W]``.

    Raises:
        DataError: missing, truncated or not a picture.
    """
    try:
        with Pictures.open(path) as picture:
            array = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except FileNotFoundError:
        raise DataError("no such image", where=str(path)) from None
    except (OSError, SyntaxError, ValueError, Pictures.DecompressionBombError) as error:
        raise DataError(
            f"image cannot be read ({error})", where=str(path), hint="is the file complete?"
        ) from None
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


@torch.no_grad()
def predict_image(
    model: MultiTaskModel, tasks: TaskSet, data: DatasetSpec, image: Tensor
) -> dict[str, Tensor]:
    """Predictions at the image's own size.

    Args:
        model: in eval mode.
        tasks: what to predict.
        data: gives the size the model sees and the normalization.
        image: uint8 ``[3, H, W]``.
    """
    sample = data.pipeline.evaluate({"image": Image(image)}, data.image_size)
    device = next(model.parameters()).device
    logits = model(sample["image"].as_subclass(Tensor)[None].to(device), tuple(tasks)).logits
    size = (image.shape[-2], image.shape[-1])
    own_size = {
        name: data.pipeline.restore(x, size) if x.ndim == 4 else x.float() for name, x in logits.items()
    }
    return {name: tasks[name].predict(x)[0].cpu() for name, x in own_size.items()}


def predict_files(
    run: Run,
    images: Sequence[Path],
    output: Path,
    *,
    tasks: Sequence[str] | None = None,
    checkpoint: str = "last",
    raw: bool = False,
) -> list[dict[str, str]]:
    """Write one picture per image and dense task, and with ``raw`` the values of all tasks as ``.npy``.

    Returns:
        per image, its path and per task the written file, or the words of an image-level prediction.

    Raises:
        DataError: an image that cannot be read (before anything is written).
        ConfigError: a task the run does not have.
        CheckpointError: see ``Run.model``.
    """
    chosen = run.tasks.subset(list(tasks), "--tasks") if tasks else run.tasks
    for path in images:
        read_image(path)
    model = run.model(checkpoint).merged()
    make_folder(output, "--output")
    results = []
    for path, stem in zip(track(images, "predict"), file_stems(images), strict=True):
        predicted = predict_image(model, chosen, run.recipe.data, read_image(path))
        results.append({"image": str(path), **_write(chosen, predicted, output / stem, raw)})
    return results


def file_stems(images: Sequence[Path]) -> list[str]:
    """A name per image for its results; images of one name in several folders get numbers."""
    stems: list[str] = []
    for path in images:
        stem, number = path.stem, 2
        while stem in stems:
            stem, number = f"{path.stem}-{number}", number + 1
        stems.append(stem)
    return stems


def _write(tasks: TaskSet, predicted: Mapping[str, Tensor], base: Path, raw: bool) -> dict[str, str]:
    result = {}
    for name, value in predicted.items():
        array, file = value.numpy(), base.with_name(f"{base.name}_{name}.png")
        if raw:
            np.save(file.with_suffix(".npy"), array)
        if tasks[name].dense:
            Pictures.fromarray(tasks[name].colorize(array)).save(file)
        result[name] = str(file) if tasks[name].dense else tasks[name].caption(array)
    return result
