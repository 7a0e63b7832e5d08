"""Files of any kind: read, or refused with one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polytask.data.files import picture_size, read_array, read_picture
from polytask.errors import DataError


@pytest.mark.parametrize("kind", [">f4", ">i2", "u2", "u4", "u8", "?", "f8", "u1", "f2", "longdouble"])
def test_arrays_of_all_kinds_become_tensors(tmp_path: Path, kind: str) -> None:
    np.save(tmp_path / "a.npy", np.array([[0, 1], [1, 0]], kind))
    read = read_array(tmp_path / "a.npy", [2])
    assert torch.from_numpy(read).tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("length", [0, 5, 20, 60, 100, 130])
def test_cut_arrays_are_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.ones((3, 3)))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=r"a\.npy: array cannot be read"):
        read_array(path, [2])


@pytest.mark.parametrize("array", [np.ones((0, 3)), np.array([["a"]]), np.ones(3), np.ones((1, 1), complex)])
def test_arrays_of_other_kinds_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match="array of an unexpected kind"):
        read_array(tmp_path / "a.npy", [2])


def test_a_damaged_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.ones((3, 3)))
    path.write_bytes(path.read_bytes().replace(b"(3, 3)", b"(3, 3 "))
    with pytest.raises(DataError, match="array cannot be read"):
        read_array(path, [2])


@pytest.mark.parametrize(
    "shape", ["(9999999999, 9)", "(999999999999999999999, 3)", "(-3, 3)", "('a', 3)", "(3, 3", "None"]
)
def test_a_header_of_nonsense_is_refused(tmp_path: Path, shape: str) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.ones((3, 3)))
    path.write_bytes(path.read_bytes().replace(b"(3, 3), }", f"{shape}, }}".encode()))
    with pytest.raises(DataError, match="array cannot be read"):
        read_array(path, [2])


def test_missing_and_enormous_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    for read in (lambda: read_picture(path, "L"), lambda: picture_size(path), lambda: read_array(path, [2])):
        with pytest.raises(DataError, match=r"a\.png: no such file; unpack it again"):
            read()
    Image.new("L", (50, 50)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"image cannot be read .*exceeds limit"):
        read_picture(path, "L")
