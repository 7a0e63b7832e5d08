"""Files of the datasets: pictures, arrays, ``.mat`` files and lists, each read or refused with a sentence."""

from __future__ import annotations

import importlib
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from PIL import Image as Picture

from polytask.errors import DataError, DatasetNotFoundError, MissingDependencyError

_AGAIN = "unpack it again"
DAMAGE = (
    OSError, ValueError, SyntaxError, EOFError, OverflowError, MemoryError, TokenError,
    Picture.DecompressionBombError,
)  # fmt: skip
"""What Pillow and NumPy raise for files that are damaged."""


def check_folders(root: Path, needed: Sequence[str | Sequence[str]], hint: str) -> None:
    """Raise DatasetNotFoundError unless ``root`` has all folders (or files); of a tuple, any one will do."""
    if not root.is_dir():
        raise DatasetNotFoundError("no such folder", where=str(root), hint=hint)
    choices = [(entry,) if isinstance(entry, str) else tuple(entry) for entry in needed]
    missing = [" or ".join(c) for c in choices if not any((root / name).exists() for name in c)]
    if missing:
        what = f"the folder lacks {', '.join(missing)}"
        raise DatasetNotFoundError(what, where=str(root), hint=hint)


def read_list(path: Path, hint: str) -> list[str]:
    """The words of a text file, for lists of ids.

    Raises:
        DatasetNotFoundError: file missing, unreadable or empty.
    """
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetNotFoundError(f"split cannot be read ({error})", where=str(path), hint=hint) from None
    if not words:
        raise DatasetNotFoundError("split lists no samples", where=str(path), hint=hint)
    return words


def read_table(path: Path, columns: Sequence[tuple[Any, ...]], skip: int = 0) -> np.ndarray:
    """Columns of words and numbers below ``skip`` lines, as a structured array of NumPy's ``columns``.

    Raises:
        DataError: file missing or empty, or a line that does not fit.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # about an empty file
            return np.loadtxt(path, np.dtype(list(columns)), skiprows=skip, ndmin=1, encoding="utf-8")
    except (OSError, ValueError, UserWarning) as error:
        raise DataError(f"list cannot be read ({error})", where=str(path), hint=_AGAIN) from None


def read_picture(path: Path, *modes: str) -> np.ndarray:
    """Pixels as stored (a palette image yields indices), ``[H, W]`` or ``[H, W, 3]``.

    Args:
        path: anything Pillow reads.
        modes: accepted Pillow modes; if that is RGB alone, any kind of photo is converted to it.

    Raises:
        DataError: file missing, damaged, of another mode, or in colors of 16 bits, which Pillow cuts to 8.
    """
    try:
        with Picture.open(path) as picture:
            deep = any(";16" in str(tile[3]) for tile in picture.tile) and len(picture.getbands()) > 1
            picture.load()
            photo = modes == ("RGB",) and picture.mode in ("L", "LA", "P", "CMYK", "RGBA")
            converted = picture.convert("RGB") if photo else picture
            mode, pixels = converted.mode, np.array(converted)
    except DAMAGE as error:
        raise _unreadable("image", path, error) from None
    if deep:
        raise DataError("image has 16 bits per color", where=str(path), expected="8", hint="save it with 8")
    if mode not in modes:
        hint = "labels are stored as numbers, not as colors" if "P" in modes else None
        what, expected = "image has an unexpected mode", " or ".join(modes)
        raise DataError(what, where=str(path), got=mode, expected=expected, hint=hint)
    return pixels


def _unreadable(kind: str, path: Path, error: BaseException) -> DataError:
    missing = isinstance(error, FileNotFoundError)
    what = "no such file" if missing else f"{kind} cannot be read ({str(error) or type(error).__name__})"
    return DataError(what, where=str(path), hint=_AGAIN)


def check_listed(paths: Sequence[Path], listing: Path, hint: str) -> None:
    """Raise DatasetNotFoundError unless there is a file for every entry of the list they come from."""
    absent = [path for path in paths if not path.is_file()]
    if absent:
        what = f"{len(absent)} of {len(paths)} listed photos are not in {absent[0].parent.name}"
        raise DatasetNotFoundError(f"{what}, first {absent[0].stem}", where=str(listing), hint=hint)


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height, from the header alone.

    Raises:
        DataError: file missing or no picture.
    """
    try:
        with Picture.open(path) as picture:
            return picture.size
    except DAMAGE as error:
        raise _unreadable("image", path, error) from None


def read_array(path: Path, axes: Sequence[int]) -> np.ndarray:
    """A numeric ``.npy`` file without pickled objects.

    Args:
        path: the file.
        axes: accepted numbers of axes.

    Raises:
        DataError: file missing, truncated, not numeric or of another shape.
    """
    try:
        with path.open("rb") as file:
            array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    except DAMAGE as error:
        raise _unreadable("array", path, error) from None
    if array.ndim not in axes or array.dtype.kind not in "biuf" or not array.size:
        expected = f"numbers on {' or '.join(map(str, axes))} axes"
        raise DataError(
            "array of an unexpected kind",
            where=str(path),
            got=f"{array.dtype} {array.shape}",
            expected=expected,
        )
    kind, size = array.dtype.kind, array.dtype.itemsize
    known = np.int64 if kind == "u" and size > 1 else np.float64 if size > 8 else array.dtype  # to torch
    return array.astype(np.dtype(known).newbyteorder("="), copy=False)


def scipy_io(path: Path) -> Any:
    """The module that reads and writes ``.mat`` files; raises MissingDependencyError without scipy."""
    try:
        return importlib.import_module("scipy.io")
    except ModuleNotFoundError:
        what, hint = "scipy is needed for .mat files", "pip install 'polytask[data]' (or scipy)"
        raise MissingDependencyError(what, where=str(path), hint=hint) from None


def read_mat(path: Path, key: str) -> Any:
    """One entry of a MATLAB file.

    Raises:
        MissingDependencyError: scipy is not installed.
        DataError: file missing, damaged or without the entry.
    """
    matlab = scipy_io(path).matlab
    damage = matlab.MatReadError, TypeError, IndexError, NotImplementedError, zlib.error
    try:
        return matlab.loadmat(path, variable_names=[key])[key]
    except KeyError:
        raise DataError(f"file has no entry {key}", where=str(path), hint=_AGAIN) from None
    except (*damage, *DAMAGE) as error:
        raise _unreadable("file", path, error) from None
