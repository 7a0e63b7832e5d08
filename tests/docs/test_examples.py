"""The marked Python blocks of README and documentation run, each as a file of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKED = re.compile(r"^<!-- run -->\n```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
EXAMPLES = {
    f"{page.relative_to(ROOT).as_posix()}-{number}": code
    for page in PAGES
    for number, code in enumerate(MARKED.findall(page.read_text(encoding="utf-8")), 1)
}


def test_every_mark_is_found() -> None:
    marks = sum(page.read_text(encoding="utf-8").count("<!-- run -->") for page in PAGES)
    assert marks == len(EXAMPLES) > 0


def test_every_guide_has_an_example() -> None:
    guides = {page.stem for page in (ROOT / "docs" / "howto").glob("*.md")} - {"distributed"}
    assert guides == {Path(name.rpartition("-")[0]).stem for name in EXAMPLES if "/howto/" in name}


RUNNER = """
import os, runpy, sys
import torch
import polytask.study  # imports nearly everything, once for all examples

torch.set_num_threads(1)
for line in sys.stdin:
    folder = line.rstrip("\\n")
    pid = os.fork()
    if pid == 0:  # a process of its own: what an example registers stays there
        os.chdir(folder)
        os.dup2(os.open("stdout", os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(os.open("stderr", os.O_CREAT | os.O_WRONLY), 2)
        code = 1
        try:
            runpy.run_path("example.py", run_name="__main__")
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def runner(rooms: Path) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"POLYTASK_CACHE": str(rooms), "OMP_NUM_THREADS": "1"}
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-c", RUNNER]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()  # ends it


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, runner: subprocess.Popen[str], tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(EXAMPLES[name], encoding="utf-8")
    runner.stdin.write(f"{tmp_path}\n")
    runner.stdin.flush()
    assert runner.stdout.readline().strip() == "0", (tmp_path / "stderr").read_text()
