"""Checkpoint files of others, read without running what is in them.

A pickle may name any function of any module and have it called. Here it gets plain containers, numbers and
tensors; what it names of ``yacs`` becomes a dictionary; everything else is refused by name.
"""

from __future__ import annotations

import builtins
import collections
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from polytask.errors import CheckpointError

_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip
_NUMBERS = frozenset({"f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1"})
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of files that are no zip archives


class Node(dict[str, Any]):
    """What a node of settings was; it has no attributes and no behavior of its own."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Whatever else the node held is left behind."""


class _NumberKind:
    """Stands for ``numpy.dtype``."""

    def __init__(self, code: str, *_: object) -> None:
        if code not in _NUMBERS:
            raise ValueError(f"no plain number: numpy.dtype({code!r})")
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", "|"):
            raise ValueError("numbers in another order of bytes")


def _number(kind: _NumberKind, raw: bytes) -> Any:
    return np.frombuffer(raw, f"<{kind.code}")[0].item()


def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: object) -> Tensor:
    return storage.as_strided(size, stride, offset)  # raises where it would leave the storage


def _parameter(data: Tensor, *_: object) -> Tensor:
    return data


def _latin(text: str, _: str) -> bytes:
    return text.encode("latin1")  # how protocol 2 writes bytes


_PLAIN = ("set", "frozenset", "dict", "list", "tuple", "int", "float", "complex", "bool", "str", "slice")
_KNOWN: Mapping[tuple[str, str], Any] = {
    **{(module, name): vars(builtins)[name] for module in ("builtins", "__builtin__") for name in _PLAIN},
    **{("collections", c.__name__): c for c in (collections.OrderedDict, collections.Counter)},
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _STORAGES.values()},
    ("torch", "Size"): tuple,
    ("torch", "device"): str,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("_codecs", "encode"): _latin,
    ("numpy", "dtype"): _NumberKind,
    ("numpy.core.multiarray", "scalar"): _number,
    ("numpy._core.multiarray", "scalar"): _number,
}


class _Unpickler(pickle.Unpickler):
    """Knows the names above and no others."""

    def __init__(self, file: IO[bytes], storage: Callable[[Any, Any, Any], Tensor] | None = None) -> None:
        super().__init__(file, encoding="utf-8")
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "yacs":
            return Node
        if (module, name) not in _KNOWN:
            raise CheckpointError(
                f"the pickle calls for {module}.{name}, which no checkpoint needs, so that it was refused "
                "and nothing was run"
            )
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or any(view) or self.storage is None:
            raise ValueError("unknown kind of content")
        return self.storage(dtype, key, count)


def read_checkpoint(path: Path) -> Any:
    """What ``torch.save`` wrote, or the tensors of a safetensors file.

    Raises:
        CheckpointError: missing, truncated or altered, no checkpoint, or one that holds more than plain
            containers, numbers, tensors and nodes of yacs.
    """
    where = str(path)
    if not path.is_file():
        raise CheckpointError("a folder, not a file" if path.is_dir() else "no such file", where=where)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with path.open("rb") as file:
            return _read_zip(file) if zipfile.is_zipfile(file) else _read_legacy(file, path.stat().st_size)
    except CheckpointError as error:
        raise CheckpointError(error.what, where=where, hint=error.hint) from None
    except Exception as error:  # zipfile, pickle, torch and safetensors each raise their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what, hint = f"cannot be read ({reason})", "is the file complete, and a checkpoint?"
        raise CheckpointError(what, where=where, hint=hint) from None


def _read_zip(file: IO[bytes]) -> Any:
    with zipfile.ZipFile(file) as archive:
        root = next((name[:-8] for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if root is None:
            raise CheckpointError("zip archive that is no checkpoint: it has no data.pkl")
        order = f"{root}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            _refuse("numbers in another order of bytes")
        known: dict[str, Tensor] = {}

        def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
            if key not in known:
                entry = archive.getinfo(f"{root}data/{key}")
                if entry.file_size != count * dtype.itemsize:
                    _refuse(f"storage {key} has another size than the pickle says")
                raw = bytearray(archive.read(entry))
                known[key] = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
            return known[key]

        with archive.open(f"{root}data.pkl") as content:
            return _Unpickler(content, storage).load()


def _read_legacy(file: IO[bytes], size: int) -> Any:
    """Pickles one after the other, then the bytes of the storages."""
    file.seek(0)
    if file.read(2)[:1] != pickle.PROTO:
        _refuse("no checkpoint: neither a zip archive nor a pickle")
    file.seek(0)
    if _Unpickler(file).load() != _MAGIC or _Unpickler(file).load() != _PROTOCOL:
        _refuse("a pickle that torch.save has not written")
    _Unpickler(file).load()  # sizes of C types
    known: dict[str, Tensor] = {}

    def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
        if not 0 <= count * dtype.itemsize <= size:
            _refuse(f"storage {key} is larger than the file")
        if key not in known:
            known[key] = torch.zeros(count, dtype=dtype)
        return known[key]

    content = _Unpickler(file, storage).load()
    for key in _Unpickler(file).load():
        raw, count = known[key].view(torch.uint8).numpy(), int.from_bytes(file.read(8), "little")
        if count != len(known[key]) or file.readinto(raw) != len(raw):  # type: ignore[attr-defined]
            _refuse(f"storage {key} is cut off")
    return content


def _refuse(what: str) -> NoReturn:
    raise ValueError(what)


def state_dict(content: object, where: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint's entry ``model`` or ``state_dict``, or else its own, by name.

    Raises:
        CheckpointError: there are none.
    """
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(value, Tensor) for value in content.values())
    ):
        raise CheckpointError("holds no tensors by name", where=where, expected="a state dict")
    found = {str(name).removeprefix("module."): value for name, value in content.items()}
    if len(found) < len(content):
        raise CheckpointError("holds a tensor both with and without the prefix module.", where=where)
    return found
