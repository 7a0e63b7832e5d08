"""Pickled checkpoints of others: what is read, and what is refused without being run."""

from __future__ import annotations

import collections
import io
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from polytask.errors import CheckpointError
from polytask.pickles import read_checkpoint, state_dict

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(content: object, path: Path, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.fixture
def config_node(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A class that pickles as ``yacs.config.CfgNode``; the package is gone when files are read."""
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    package, module = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    module.CfgNode = node  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", package)
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    return node


@FORMATS
def test_a_training_checkpoint_is_read_whole(
    zipped: bool, tmp_path: Path, config_node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    config = config_node(MODEL=config_node(R=[4, 4], NAME="tiny", HEAD=config_node(sal="hrnet")), AMP=True)
    config.__dict__["__immutable__"] = True
    content = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "config": config, "epoch": 7,
        "max_accuracy": np.float64(0.25), "scaler": {"scale": 65536.0}, "size": torch.Size([2, 3]),
        "steps": collections.Counter({3: 1}), "dtype": torch.float16, "order": np.int64(-3),
    }  # fmt: skip
    path = save(content, tmp_path / "ckpt.pth", zipped)
    monkeypatch.delitem(sys.modules, "yacs.config")
    monkeypatch.delitem(sys.modules, "yacs")
    read = read_checkpoint(path)
    assert read["model"].keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(read["model"][key], value)
        assert read["model"][key].dtype == value.dtype
    moments = optimizer.state_dict()["state"][0]["exp_avg"]
    assert torch.equal(read["optimizer"]["state"][0]["exp_avg"], moments)
    assert read["config"] == {"MODEL": {"R": [4, 4], "NAME": "tiny", "HEAD": {"sal": "hrnet"}}, "AMP": True}
    assert isinstance(read["config"]["MODEL"], dict)
    assert not any(name.partition(".")[0] == "yacs" for name in sys.modules)
    rest = {key: read[key] for key in ("epoch", "max_accuracy", "scaler", "size", "steps", "dtype", "order")}
    assert rest == {
        "epoch": 7, "max_accuracy": 0.25, "scaler": {"scale": 65536.0}, "size": (2, 3), "steps": {3: 1},
        "dtype": torch.float16, "order": -3,
    }  # fmt: skip


@FORMATS
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
     torch.uint8, torch.bool],
)  # fmt: skip
def test_tensors_of_every_kind(dtype: torch.dtype, zipped: bool, tmp_path: Path) -> None:
    whole = torch.arange(24).view(4, 6).to(dtype)
    views = {"a": whole, "b": whole[1:3, ::2], "c": whole.T, "d": whole[:0], "e": whole[0, 0]}
    read = read_checkpoint(save({**views, "p": nn.Parameter(torch.ones(2))}, tmp_path / "x.pt", zipped))
    for name, view in views.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], view), name
    assert torch.equal(read["p"], torch.ones(2))


class Malice:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@FORMATS
@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (os.system, ("touch {}",), r"(posix|nt)\.system"),
        (eval, ("open('{}', 'w')",), r"builtins\.eval|__builtin__\.eval"),
        (getattr, (os, "system"), r"getattr"),
        (io.open, ("{}", "w"), r"io\.open|_io\.open"),
        (torch.load, ("{}",), r"torch.*load"),
        (torch.storage._load_from_bytes, (b"",), r"torch\.storage\._load_from_bytes"),
        (np.load, ("{}",), r"numpy.*load"),
    ],
)
def test_malice_is_refused_and_not_run(
    function: Any, args: tuple[Any, ...], name: str, zipped: bool, tmp_path: Path
) -> None:
    trace = tmp_path / "ran"
    args = tuple(a.format(trace) if isinstance(a, str) else a for a in args)
    if function is getattr:
        args = ("text", "upper")
    content = {"model": {"weight": torch.ones(1)}, "config": Malice(function, *args)}
    path = save(content, tmp_path / "bad.pth", zipped)
    with pytest.raises(CheckpointError, match=rf"bad\.pth: .*({name}).*refused") as caught:
        read_checkpoint(path)
    assert len(str(caught.value).splitlines()) == 1
    assert not trace.exists()


def test_a_class_of_yacs_never_means_code(tmp_path: Path) -> None:
    """A made-up function of the package gives a dictionary, whatever it is called with."""
    data = b"\x80\x02cyacs.config\nload_cfg\n)RX\x01\x00\x00\x00aK\x01s."
    path = tmp_path / "node.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("node/data.pkl", data)
    assert read_checkpoint(path) == {"a": 1}


@FORMATS
@pytest.mark.parametrize("part", [0.02, 0.5, 0.99])
def test_truncated(part: float, zipped: bool, tmp_path: Path) -> None:
    path = save({"model": {"weight": torch.randn(64, 64)}}, tmp_path / "cut.pth", zipped)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(CheckpointError, match=r"cut\.pth: .*complete") as caught:
        read_checkpoint(path)
    assert len(str(caught.value).splitlines()) == 1


def test_altered(tmp_path: Path) -> None:
    path = save({"weight": torch.ones(64, 64)}, tmp_path / "flip.pth")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"flip\.pth: .*CRC"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"hello\n" * 9, pickle.dumps({"a": 1}), b"\x89PNG\r\n\x1a\n" * 3])
def test_no_checkpoint(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "photo.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"photo\.pth: ") as caught:
        read_checkpoint(path)
    assert len(str(caught.value).splitlines()) == 1


def test_other_zip_archives(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "text.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"text\.pth: .*no data\.pkl"):
        read_checkpoint(tmp_path / "text.pth")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/data.pkl", b"\x80\x02c__torch__.net\nNet\n)\x81.")
    with pytest.raises(CheckpointError, match=r"script\.pt: .*__torch__\.net\.Net.*refused"):
        read_checkpoint(tmp_path / "script.pt")


@FORMATS
def test_sizes_that_lie(zipped: bool, tmp_path: Path) -> None:
    """A file that claims huge storages is refused before memory is asked for."""
    path = save({"weight": torch.ones(200)}, tmp_path / "lie.pth", zipped)
    if zipped:
        with zipfile.ZipFile(path) as old:
            entries = {info.filename: old.read(info) for info in old.infolist()}
        with zipfile.ZipFile(path, "w") as new:
            for name, data in entries.items():
                new.writestr(name, data.replace(b"K\xc8", b"K\x90") if name.endswith("data.pkl") else data)
    else:
        path.write_bytes(path.read_bytes().replace(b"K\xc8", b"\x4b\xff", 1))
    with pytest.raises(CheckpointError, match=r"lie\.pth: "):
        read_checkpoint(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pth: no such file"):
        read_checkpoint(tmp_path / "none.pth")


def test_safetensors(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    assert torch.equal(read_checkpoint(tmp_path / "x.safetensors")["a"], torch.ones(2))
    (tmp_path / "y.safetensors").write_bytes(b"\0" * 50)
    with pytest.raises(CheckpointError, match=r"y\.safetensors: cannot be read"):
        read_checkpoint(tmp_path / "y.safetensors")


@pytest.mark.parametrize("key", ["model", "state_dict", None])
def test_the_state_dict_of_a_checkpoint(key: str | None) -> None:
    state: dict[str, Tensor] = {"module.a.weight": torch.ones(1)}
    assert state_dict({key: state, "epoch": 1} if key else state, "x").keys() == {"a.weight"}


@pytest.mark.parametrize("content", [{}, [1], {"model": {"a": "text"}}, {"model": {}}, None, {"epoch": 3}])
def test_no_state_dict(content: object) -> None:
    with pytest.raises(CheckpointError, match="x: holds no tensors by name"):
        state_dict(content, "x")
