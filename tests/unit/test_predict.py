"""Predictions for a person's own images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polytask.errors import ConfigError, DataError
from polytask.predict import file_stems, predict_files, predict_image, read_image
from polytask.runs import Run


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (45, 71, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_files_at_the_size_of_the_image(trained: Path, photo: Path, tmp_path: Path) -> None:
    (result,) = predict_files(Run(trained), [photo], tmp_path / "out", raw=True)
    assert set(result) == {"image", "semseg", "depth", "scene"}
    for name in ("semseg", "depth"):
        assert Path(result[name]) == tmp_path / "out" / f"photo_{name}.png"
        with Image.open(result[name]) as picture:
            assert picture.size == (71, 45)
        assert np.load(tmp_path / "out" / f"photo_{name}.npy").shape[-2:] == (45, 71)
    assert any(word in result["scene"] for word in Run(trained).tasks["scene"].classes)  # type: ignore[attr-defined]
    assert np.load(tmp_path / "out" / "photo_scene.npy").shape == ()
    assert len(list((tmp_path / "out").iterdir())) == 5


def test_prediction_for_an_image_of_the_dataset(trained: Path) -> None:
    run = Run(trained)
    data = run.recipe.data
    sample = data.open("val", run.tasks, train=False)[3]
    raw = data.read(data.records("val")[3], "image")
    model = run.model()
    mine = predict_image(model, run.tasks, data, raw)
    with torch.no_grad():
        logits = model(sample["image"][None]).logits
    for name, task in run.tasks.items():
        assert torch.equal(mine[name], task.predict(logits[name])[0])


def test_merged_model_predicts_the_same(trained: Path, photo: Path) -> None:
    run = Run(trained)
    one = predict_image(run.model(), run.tasks, run.recipe.data, read_image(photo))
    two = predict_image(run.model().merged(), run.tasks, run.recipe.data, read_image(photo))
    torch.testing.assert_close(one["depth"], two["depth"], rtol=1e-4, atol=1e-5)


def test_subset_of_tasks(trained: Path, photo: Path, tmp_path: Path) -> None:
    (result,) = predict_files(Run(trained), [photo], tmp_path / "out", tasks=["depth"])
    assert set(result) == {"image", "depth"}
    with pytest.raises(ConfigError, match="--tasks: unknown task 'dpeth'; did you mean 'depth'"):
        predict_files(Run(trained), [photo], tmp_path / "new", tasks=["dpeth"])
    assert not (tmp_path / "new").exists()


def test_images_of_one_name(trained: Path, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    other = tmp_path / "b" / "photo.png"
    other.write_bytes(photo.read_bytes())
    results = predict_files(Run(trained), [photo, other], tmp_path / "out", tasks=["depth"])
    assert [Path(result["depth"]).name for result in results] == ["photo_depth.png", "photo-2_depth.png"]
    names = ["x.png", "x.jpg", "x-2.png", "y/x.png"]
    assert len(set(file_stems(list(map(Path, names))))) == 4


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_kinds_of_pictures(tmp_path: Path, mode: str) -> None:
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (5, 4)).save(file)
    assert read_image(file).shape == (3, 4, 5)


def test_photo_is_turned_upright(tmp_path: Path) -> None:
    picture = Image.new("RGB", (6, 4))
    exif = picture.getexif()
    exif[0x0112] = 6  # held upright: to be turned by 90 degrees
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (3, 6, 4)


def test_unreadable_images_write_nothing(trained: Path, photo: Path, tmp_path: Path) -> None:
    bad, cut, missing = tmp_path / "bad.png", tmp_path / "cut.png", tmp_path / "missing.png"
    bad.write_text("no picture")
    cut.write_bytes(photo.read_bytes()[:2000])
    for path, message in ((bad, "cannot be read"), (cut, "cannot be read"), (missing, "no such image")):
        with pytest.raises(DataError, match=message) as caught:
            predict_files(Run(trained), [photo, path], tmp_path / "out")
        assert path.name in str(caught.value)
        assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="cannot be read"):
        read_image(tmp_path)


def test_giant_picture_is_refused(tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="cannot be read"):
        read_image(photo)
