"""``verify`` against folders with every kind of damage at once: each is told, by a sentence with its file."""

from __future__ import annotations

import shutil
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from polytask.catalog import dataset
from polytask.data.base import DatasetSpec
from polytask.data.verification import verify
from tests.data import cityscapes, mtan, nyud
from tests.data.pascal_mt import write_pascal_mt
from tests.data.pets import write_pets

Damage = Callable[[Path], object]


def deep_color_png(path: Path, height: int, width: int) -> None:
    """16 bits for each of red, green and blue, which Pillow cannot write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(6 * width)) * height)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def grey(mode: str, value: int, *size: int) -> Damage:
    return lambda path: Image.new(mode, size[::-1], value).save(path)


def array(change: Callable[[np.ndarray], object]) -> Damage:
    """Change an ``.npy`` file in place; what is returned, if anything, takes its place."""

    def apply(path: Path) -> None:
        values = np.load(path)
        changed = change(values)
        np.save(path, values if changed is None else changed)

    return apply


def put(value: float) -> Damage:
    return array(lambda values: values.__setitem__((3, 4), value))


def check(spec: DatasetSpec, damages: Mapping[str, tuple[Damage, str]]) -> None:
    """Each damage is told once, by the file and the given words, and nothing else is."""
    assert verify(spec).problems == []
    root = Path(spec.root)  # type: ignore[attr-defined]
    for name, (damage, _) in damages.items():
        damage(root / name)
    problems = verify(spec).problems
    for name, (_, words) in damages.items():
        told = [problem for problem in problems if problem.startswith(f"{root / name}:")]
        assert len(told) == 1, (name, told)
        assert words in told[0]
        assert "\n" not in told[0]
    assert len(problems) == len(damages), problems


def test_pascal(tmp_path: Path) -> None:
    write_pascal_mt(tmp_path / "root")
    ids = tmp_path / "root" / "ImageSets" / "Context"
    (ids / "train.txt").write_text("\n".join(path.read_text().strip() for path in sorted(ids.iterdir())))
    spec = dataset("pascal_context", tmp_path / "root", ["image_size=24"])
    (ids / "val.txt").write_text("2008_000002")
    contexts = "pascal-context/trainval"
    damages = {
        "ImageSets/Context/val.txt": (Path.unlink, "split cannot be read"),
        "JPEGImages/2008_000008.jpg": (cut, "image cannot be read (image file is truncated"),
        "JPEGImages/2008_000015.jpg": (Path.unlink, "no such file"),
        "JPEGImages/2008_000016.jpg": (Path.unlink, "no such file"),
        "sal_distill/2008_000008.png": (grey("I;16", 0, 33, 47), "unexpected mode, expected L, got 'I;16'"),
        "sal_distill/2008_000003.png": (grey("L", 0, 28, 29), "another size than the image"),
        "semseg/VOC12/2008_000002.png": (grey("L", 21, 36, 48), "unknown class id, expected 0 to 20"),
        "human_parts/2008_000002.mat": (lambda p: savemat(p, {"mask": np.ones(3)}), "no entry anno"),
        f"{contexts}/2008_000002.mat": (lambda p: savemat(p, {"map": np.ones(3)}), "no entry LabelMap"),
        f"{contexts}/2008_000003.mat": (cut, "file cannot be read"),
        "normals_distill/2008_000008.png": (lambda p: deep_color_png(p, 33, 47), "16 bits per color"),
    }
    check(spec, damages)


def test_nyud(tmp_path: Path) -> None:
    nyud.write_nyud(tmp_path / "root")
    with (tmp_path / "root" / "gt_sets" / "train.txt").open("a") as listing:
        listing.write("\n0001\n0002\n0005")
    (tmp_path / "root" / "gt_sets" / "val.txt").write_text("0005")
    spec = dataset("nyud", tmp_path / "root", ["image_size=24"])
    damages = {
        "gt_sets/val.txt": (lambda p: p.write_text(" \n"), "split lists no samples"),
        "images/0001.jpg": (lambda p: deep_color_png(p, 30, 40), "16 bits per color, expected 8"),
        "images/0002.jpg": (Path.unlink, "no such file"),
        "depth/0001.npy": (put(np.nan), "map with 1 values that are not finite"),
        "depth/0003.npy": (
            put(-0.5),
            "depth map with 1 negative values, expected 0 where",
        ),
        "depth/0004.npy": (lambda p: p.write_bytes(p.read_bytes()[:40]), "array cannot be read"),
        "normals/0003.npy": (array(lambda v: 255 * v), "normals of another length"),
        "normals/0004.npy": (put(90), "normals of another length"),
        "normals/0005.npy": (array(lambda v: v[:, :, :2]), "unexpected shape"),
        "edge/0004.npy": (array(lambda v: v.astype(">u2") + 7), "binary label map with another value"),
        "edge/0005.npy": (array(lambda v: v[:0]), "array of an unexpected kind"),
        "segmentation/0003.png": (grey("L", 41, 30, 40), "unknown class id"),
    }
    check(spec, damages)


def test_mtan(tmp_path: Path) -> None:
    spec = dataset("nyuv2", mtan.small_nyuv2(tmp_path)["root"], ["image_size=24"])
    damages = {
        "train/image/2.npy": (put(3), "unexpected image"),
        "train/label/0.npy": (put(13), "unknown class id"),
        "train/label/1.npy": (put(0.5), "a value that is no integer"),
        "train/normal/3.npy": (array(lambda v: 0.2 * v), "normals of another length"),
        "train/depth/10.npy": (put(-1), "negative"),
        "val/label/9.npy": (lambda p: shutil.copy(p.with_stem("0"), p), "there is no image for it"),
    }
    check(spec, damages)
    for path in (tmp_path / "nyuv2" / "val" / "image").iterdir():
        path.unlink()
    report = verify(spec)
    assert report.counts == {"train": 11}
    assert sum(f"{tmp_path / 'nyuv2' / 'val' / 'image'}: no files" in p for p in report.problems) == 1
    assert len(report.problems) == 5 + 1


def test_cityscapes_and_pets(tmp_path: Path) -> None:
    spec = dataset("cityscapes", cityscapes.small(tmp_path)["root"], ["image_size=24"])
    (photo,) = {record.files["image"] for record in spec.records("val")[:1]}
    stray = spec.records("val")[0].files["semseg"].relative_to(spec.root)  # type: ignore[attr-defined]
    (photo.parent / "._copy_leftImg8bit.png").write_bytes(b"of another system")
    check(spec, {str(stray): (lambda _: photo.unlink(), "there is no image for it")})
    write_pets(tmp_path / "pets")
    names = ("Bengal_3", "yorkshire_terrier_9")
    spec = dataset("pets", tmp_path / "pets", ["image_size=24"])
    check(spec, {f"images/{name}.jpg": (Path.unlink, "no such file") for name in names})


def test_damaged_annotation_of_persons_is_one_problem_of_many(tmp_path: Path) -> None:
    write_pascal_mt(tmp_path / "root")
    spec = dataset("pascal_context", tmp_path / "root", ["require_parts=true"])
    damages = {f"human_parts/2008_0000{n}.mat": (cut, "file cannot be read") for n in ("03", "08", "15")}
    check(spec, damages)


@pytest.mark.parametrize(("low", "high", "fits"), [(0.9, 1.1, True), (0.2, 0.3, False), (0.9, 2.1, False)])
def test_normals_about_unit_length_pass(tmp_path: Path, low: float, high: float, fits: bool) -> None:
    nyud.write_nyud(tmp_path / "root")
    path = tmp_path / "root" / "normals" / "0001.npy"
    lengths = np.random.default_rng(0).uniform(low, high, (30, 40, 1))
    lengths[0, 0] = high
    vectors = np.load(path)
    vectors[0] = 0, 0, 1
    np.save(path, vectors * lengths)
    assert (verify(dataset("nyud", tmp_path / "root")).problems == []) == fits


@pytest.mark.parametrize("hole", [0, 127, 128])
def test_holes_of_colored_normals_pass(tmp_path: Path, hole: int) -> None:
    nyud.write_nyud(tmp_path / "root", "NYUDv2")
    path = tmp_path / "root" / "normals" / "0001.png"
    colors = np.array(Image.open(path))
    colors[: 18 if hole == 0 else 29] = hole
    Image.fromarray(colors).save(path)
    assert verify(dataset("nyud", tmp_path / "root")).problems == []
