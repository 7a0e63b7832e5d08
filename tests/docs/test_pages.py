"""What README and documentation quote is there: commands, recipes, messages, files, names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import polytask
from polytask.cli import main, parser
from polytask.recipe import find_recipe

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CHECKED = re.compile(r"^<!-- check -->\n```console\n\$ polytask (.*?)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`polytask ([a-z][^`]*)`")
CLI = (ROOT / "src" / "polytask" / "parser.py").read_text(encoding="utf-8")
ERRORS = (DOCS / "errors.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """The words after ``polytask`` of every command in a console block, without repetitions."""
    found = []
    for page in PAGES:
        for block in CONSOLE.findall(page.read_text(encoding="utf-8")):
            for line in block.splitlines():
                command = re.match(r"(?:\$ )?(?:torchrun .* -m )?polytask (.*)", line)
                if command:
                    found.append(command[1])
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("command", commands())
def test_command_parses(command: str) -> None:
    args = parser().parse_args(shlex.split(command))
    recipe = getattr(args, "recipe", None)
    if recipe is not None and recipe.suffix != ".yaml":  # else it is a file of the reader
        assert find_recipe(recipe).is_file()


def test_verbs_named_in_sentences_exist() -> None:
    for page in PAGES:
        for words in INLINE.findall(page.read_text(encoding="utf-8")):
            names = words.split()[: 2 if words.startswith("data ") else 1]
            options = [word for word in shlex.split(words) if word.startswith("--")]
            for name in [*names, *options]:
                assert f'"{name}"' in CLI, f"{page}: {words}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_named_in_sentences_exist(page: Path) -> None:
    for name in re.findall(r"`((?:rooms|pascal|nyud|smoke)/\w+)`", page.read_text(encoding="utf-8")):
        if not (ROOT / "recipes" / name).is_dir():
            assert find_recipe(Path(name)).is_file()


def bad_recipe() -> str:
    found = re.search(r"^`bad.yaml` .*?^```yaml\n(.*?)^```$", ERRORS, re.DOTALL | re.MULTILINE)
    assert found
    return found[1]


@pytest.mark.parametrize(("command", "printed"), CHECKED.findall(ERRORS))
def test_errors_read_as_printed(
    command: str,
    printed: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(bad_recipe(), encoding="utf-8")
    Path("runs").mkdir()
    Path("runs/smoke").symlink_to(trained)
    assert main(shlex.split(command)) > 1
    assert capsys.readouterr().err == printed


def test_architecture_lists_every_source_file_once() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    block = text.partition("## Tree")[2].partition("```text\n")[2].partition("```")[0]
    listed = [line.split()[0] for line in block.splitlines()]
    source = ROOT / "src" / "polytask"
    assert listed == sorted(file.relative_to(source).as_posix() for file in source.rglob("*.py"))


def test_architecture_names_every_layer() -> None:
    from tests.style.test_layers import LAYERS

    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    block = text.partition("## Order of imports")[2].partition("```text\n")[2].partition("```")[0]
    assert [set(line.split()) for line in block.splitlines()] == LAYERS


def test_reference_names_what_is_public() -> None:
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    block = text.partition(".. code-block:: text\n")[2].partition("```")[0]
    assert sorted(block.split()) == sorted(polytask.__all__)


def test_every_page_is_reached() -> None:
    reached = set(re.findall(r"^(?:\w|/|-)+$", (DOCS / "index.md").read_text(encoding="utf-8"), re.MULTILINE))
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")} - {"index"}
    assert pages == {name for name in reached if (DOCS / f"{name}.md").is_file()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).is_file(), target
