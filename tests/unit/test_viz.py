"""Pictures."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polytask.config import decode
from polytask.data.crops import Atrc
from polytask.data.folder import Folder
from polytask.data.pascal_context import PascalContext
from polytask.data.pipelines import Plain
from polytask.errors import ConfigError, DataError
from polytask.tasks import Classification, Depth, Segmentation
from polytask.viz import (
    contact_sheet,
    data_uri,
    grid,
    save_picture,
    task_picture,
    text_picture,
    to_picture,
)
from tests.conftest import Make
from tests.data.pascal_mt import write_pascal_mt


def test_normalized_image_back_to_a_picture() -> None:
    pixels = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    assert np.array_equal(to_picture(Plain().normalize(pixels), Plain()), pixels.permute(1, 2, 0).numpy())


def test_tasks_as_pictures() -> None:
    like = np.zeros((20, 60, 3), np.uint8)
    for task, value in (
        (Segmentation(classes=("a", "b")), torch.zeros(1, 20, 60, dtype=torch.long)),
        (Segmentation(classes=("a", "b")), torch.full((20, 60), 255)),
        (Depth(), torch.rand(1, 20, 60)),
        (Classification(classes=("kitchen", "bath")), torch.tensor(1)),
    ):
        picture = task_picture(task, value, like)
        assert picture.shape == like.shape
        assert picture.dtype == np.uint8
    words = text_picture("bath", 20, 60)
    assert words.min() < 100 < words.max() == 255


def test_grid_places_pictures() -> None:
    red, blue = (
        np.broadcast_to(np.array(color, np.uint8), (6, 9, 3)) for color in ((255, 0, 0), (0, 0, 255))
    )
    sheet = np.asarray(grid([[red, blue], [blue, red]], ["one", "a longer name"], ["p", "q"]))
    assert (sheet == (255, 0, 0)).all(-1).sum() == (sheet == (0, 0, 255)).all(-1).sum() == 2 * 6 * 9


def test_picture_in_a_page() -> None:
    uri = data_uri(Image.new("RGB", (3, 2), "green"))
    kind, _, data = uri.partition(",")
    assert kind == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (3, 2)


def test_contact_sheet(small: Make, rooms: Path) -> None:
    data = small().data
    sheet = contact_sheet(data, "val", 2)
    assert sheet.size[0] > 8 * 48
    assert 2 * 128 < sheet.size[1] < 3 * 128  # four times as large
    with pytest.raises(ConfigError, match="unknown split"):
        contact_sheet(data, "vla", 1)


def test_contact_sheet_shows_photos_as_they_are(tmp_path: Path) -> None:
    write_pascal_mt(tmp_path)
    spec = PascalContext(root=tmp_path, image_size=(512, 512), pipeline=Atrc())
    photos = [spec.read(record, "image") for record in spec.records("val")]
    sheet = np.asarray(contact_sheet(spec, "val", 9))
    times = [-(-120 // photo.shape[1]) for photo in photos]
    assert sheet.shape[0] == 16 + sum(photo.shape[1] * k + 4 for photo, k in zip(photos, times, strict=True))
    shown = photos[0].permute(1, 2, 0).numpy().repeat(times[0], 0).repeat(times[0], 1)
    where = sheet[16 : 16 + len(shown)]
    assert any(np.array_equal(where[:, x : x + shown.shape[1]], shown) for x in range(200))
    Image.new("RGB", (2000, 961)).save(spec.records("val")[0].files["image"])
    masks = {"task": "saliency", "file": "{stem}.png", "optional": True}
    photo = {"root": tmp_path, "splits": {"all": "JPEGImages/*02.jpg"}, "targets": {"saliency": masks}}
    assert contact_sheet(decode(Folder, {**photo, "image_size": 64}), None, 1).size[1] == 16 + 321 + 4


def test_empty_split(small: Make, rooms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = small().data
    monkeypatch.setattr(type(data), "records", lambda *_: [])
    with pytest.raises(DataError, match="the split is empty"):
        contact_sheet(data, "val", 2)


def test_saving_a_picture(tmp_path: Path) -> None:
    save_picture(Image.new("RGB", (3, 2)), tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").exists()
    with pytest.raises(ConfigError, match=r"no kind of picture has this ending, got 'a\.txt'"):
        save_picture(Image.new("RGB", (3, 2)), tmp_path / "a.txt")
