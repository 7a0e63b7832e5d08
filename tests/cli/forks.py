"""Command lines in processes of their own that need not import anything: forks of one that has.

``Forks`` starts ``python forks.py``, which imports the library once and then forks for each request.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Fork:
    """One command line in its own process; ``status`` is the exit code, negative for a signal."""

    pid: int
    folder: Path

    def kill(self) -> None:
        """End the process, and its loader processes in time, without asking."""
        os.kill(self.pid, signal.SIGKILL)

    def running(self) -> bool:
        return not (self.folder / "status").exists()

    def wait(self, seconds: float = 120) -> int:
        deadline = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(self.err)
            time.sleep(0.01)
        return int((self.folder / "status").read_text())

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()


class Forks:
    """The process that forks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        self.extra: dict[str, str] = {}
        """More additions to the environment of every fork."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        paths = [str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(
        self,
        words: Sequence[str],
        *,
        die: tuple[str, int] | None = None,
        patch: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Fork:
        """Start ``polytask WORDS``.

        Args:
            words: the command line.
            die: a function ``module:name`` and a number; the process kills itself instead of calling it
                that many times.
            patch: a function of ``tests.cli.patches`` to call first.
            env: additions to the environment.
        """
        self.number += 1
        folder = self.folder / f"fork{self.number}"
        folder.mkdir()
        words = list(map(str, words))
        request = {
            "words": words,
            "die": die,
            "patch": patch,
            "env": {**self.extra, **(env or {})},
            "folder": str(folder),
        }
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return Fork(int(self.server.stdout.readline()), folder)

    def run(self, *words: Any, **options: Any) -> Fork:
        """Start and wait."""
        fork = self.start(words, **options)
        fork.wait()
        return fork

    def group(self, size: int, *words: Any, patch: str | None = None) -> list[Fork]:
        """Several processes of one group, as torchrun starts them, when all have ended."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        forks = [
            self.start(words, patch=patch, env={**shared, "RANK": str(i), "LOCAL_RANK": str(i)})
            for i in range(size)
        ]
        for fork in forks:
            fork.wait()
        return forks

    def close(self) -> None:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()


def _child(request: Mapping[str, Any]) -> int:
    import importlib

    import torch

    from polytask.cli import main

    torch.set_num_threads(1)  # a fork makes its own pool of threads; two threads doing so at once would crash
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(Path(request["folder"]) / name, os.O_CREAT | os.O_WRONLY), number)
    os.environ.update(request["env"])
    if request["patch"]:
        getattr(importlib.import_module("tests.cli.patches"), request["patch"])()
    if request["die"]:
        (where, times), calls = request["die"], 0
        module, name = where.split(":")
        original = getattr(importlib.import_module(module), name)

        def instead(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == times:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(importlib.import_module(module), name, instead)
    return main(request["words"])


def _fork(request: Mapping[str, Any]) -> int:
    """The pid of a fork that carries out the request; another one waits and writes down how it ended."""
    read, write = os.pipe()
    if os.fork() == 0:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = _child(request)
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        os.write(write, str(pid).encode())
        _, status = os.waitpid(pid, 0)
        temporary = Path(request["folder"]) / "status.tmp"
        temporary.write_text(str(os.waitstatus_to_exitcode(status)))
        temporary.replace(temporary.with_name("status"))
        os._exit(0)
    pid = int(os.read(read, 32))
    os.close(read)
    os.close(write)
    return pid


def _serve() -> None:
    import torch

    import polytask.study  # noqa: F401 - imports nearly everything

    torch.set_num_threads(1)
    for line in sys.stdin:
        sys.stdout.write(f"{_fork(json.loads(line))}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
