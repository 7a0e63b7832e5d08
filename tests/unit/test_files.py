"""YAML with inheritance and overrides, JSON, atomic writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from polytask.errors import ConfigError
from polytask.files import (
    differences,
    dump_yaml,
    load_yaml,
    make_folder,
    merge,
    override,
    parse_yaml,
    to_json,
    write_text,
)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_bases_merge_below_the_file_that_names_them(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "x: {p: 1, q: 1}\ny: 1\nz: [1, 2]\n")
    write(tmp_path / "sub" / "b.yaml", "base: ../a.yaml\nx: {q: 2}\nz: [3]\n")
    top = write(tmp_path / "c.yaml", "base: sub/b.yaml\ny: 3\n")
    assert load_yaml(top) == {"x": {"p": 1, "q": 2}, "y": 3, "z": [3]}


def test_another_type_replaces_and_a_name_is_completed() -> None:
    old = {"adapter": {"type": "mtlora", "rank": 4}, "neck": "fuse"}
    assert merge(old, {"adapter": {"type": "other"}})["adapter"] == {"type": "other"}
    assert merge(old, {"adapter": {"rank": 8}})["adapter"] == {"type": "mtlora", "rank": 8}
    assert merge(old, {"neck": {"channels": 3}})["neck"] == {"type": "fuse", "channels": 3}
    assert old["adapter"] == {"type": "mtlora", "rank": 4}


def test_circle_of_bases(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "base: b.yaml\n")
    top = write(tmp_path / "b.yaml", "base: a.yaml\n")
    with pytest.raises(ConfigError, match=r"b\.yaml: `base:` leads back to the same file"):
        load_yaml(top)


@pytest.mark.parametrize(("depth", "works"), [(3, True), (4, False)])
def test_depth_of_bases(tmp_path: Path, depth: int, works: bool) -> None:
    write(tmp_path / "0.yaml", "x: 1\n")
    for level in range(1, depth + 1):
        write(tmp_path / f"{level}.yaml", f"base: {level - 1}.yaml\n")
    if works:
        assert load_yaml(tmp_path / f"{depth}.yaml") == {"x": 1}
    else:
        with pytest.raises(ConfigError, match="nested deeper than 3"):
            load_yaml(tmp_path / f"{depth}.yaml")


def test_missing_base_names_the_file_that_wants_it(tmp_path: Path) -> None:
    top = write(tmp_path / "a.yaml", "base: nowhere.yaml\n")
    with pytest.raises(
        ConfigError, match=r"nowhere\.yaml: recipe cannot be read .*it is the `base` of .*a\.yaml"
    ):
        load_yaml(top)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x: 1\nx: 2\n", r"a\.yaml:2:1: not valid YAML \(key 'x' appears twice\)"),
        ("a: {b: 1, b: 2}\n", "key 'b' appears twice"),
        ("x: [1, 2\n", r"a\.yaml:2:1: not valid YAML"),
        ("x: !!python/object:os.system {}\n", "not valid YAML"),
        ("? [1, 2]\n: 3\n", "no plain value"),
        ("a: &x {b: *x}\n", "not valid YAML"),
        ("- 1\n", "not a mapping of keys, got 'list'"),
        ("", "not a mapping of keys"),
        ("base: [a.yaml]\n", "`base` must be one path"),
        ("x: \x00\n", "not valid YAML"),
    ],
)
def test_faulty_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_yaml(write(tmp_path / "a.yaml", text))


def test_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path)


def test_overrides_reach_mappings_lists_and_names() -> None:
    data = {"a": {"b": 1}, "l": [{"x": 1}, {"x": 2}], "neck": "fuse", "tasks": ["p", "q"]}
    assert override(data, ["a.b=2"])["a"] == {"b": 2}
    assert override(data, ["l.1.x=[3, 4]"])["l"] == [{"x": 1}, {"x": [3, 4]}]
    assert override(data, ["neck.channels=null"])["neck"] == {"type": "fuse", "channels": None}
    assert override(data, ["new.deep.key=yes"])["new"] == {"deep": {"key": True}}
    assert override(data, ["tasks.q.weight=2"])["tasks"] == {"p": {}, "q": {"weight": 2}}
    assert override(data, ["a.b=x=y"])["a"] == {"b": "x=y"}
    assert override(data, ["a.b=1", "a.b=2"])["a"] == {"b": 2}
    assert data["a"] == {"b": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "must look like a.b=value, got 'a'"),
        ("=3", "must look like"),
        ("a.b.c=1", "--set a.b.c: the path runs through a plain value, got 1"),
        ("l.2=1", "no such list item, expected 0 to 1, got '2'"),
        ("l.x=1", "no such list item"),
        ("l.²=1", "no such list item"),
        ("l.-1=1", "no such list item"),
        ("e.0=1", "the list is empty"),
        ("a.b=[1", "--set a.b:1:3: not valid YAML"),
    ],
)
def test_faulty_overrides(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override({"a": {"b": 1}, "l": [1, 2], "e": []}, [text])
    assert message in str(caught.value)


words = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]))
words |= st.sampled_from(["5e-4", "1e5", "no", "null", "1.5", "0x1", "1_000", "~", "2024-01-02", "a: b", "#"])
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


def test_exponents_are_numbers() -> None:
    text = "{a: 5e-4, b: 1E5, c: -2.e+3, d: '5e-4', e: 5e, f: e4, g: 1e5x}"
    expected = {"a": 5e-4, "b": 1e5, "c": -2000.0, "d": "5e-4", "e": "5e", "f": "e4", "g": "1e5x"}
    assert parse_yaml(text, "x") == expected


@given(st.dictionaries(words, plain, max_size=4))
def test_written_yaml_reads_back(data: dict[str, Any]) -> None:
    assert parse_yaml(dump_yaml(data), "x") == data


@given(
    st.dictionaries(st.text(max_size=3), plain, max_size=4),
    st.dictionaries(st.text(max_size=3), plain, max_size=4),
)
def test_merge_keeps_what_the_nearer_file_says(below: dict[str, Any], above: dict[str, Any]) -> None:
    merged = merge(below, above)
    assert set(merged) == set(below) | set(above)
    for key, value in above.items():
        assert merged[key] == value or isinstance(value, dict)
    assert merge(below, {}) == below
    assert merge({}, above) == above


def test_differences_name_paths() -> None:
    one = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    assert differences(one, one) == []
    assert differences(one, {"a": {"b": 2, "c": [1]}, "e": 1}) == ["a.b", "a.c", "d", "e"]


def test_json_is_strict() -> None:
    text = to_json({"x": float("nan"), "y": [float("inf"), 1.5], "z": {"é": True}})
    assert json.loads(text, parse_constant=pytest.fail) == {"x": None, "y": [None, 1.5], "z": {"é": True}}


def test_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.txt"
    write_text(file, "old")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_text(file, "new")
    assert file.read_text() == "old"


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b", "--output")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--output: folder cannot be made"):
        make_folder(tmp_path / "file" / "x", "--output")


def test_reader_is_the_safe_one() -> None:
    with pytest.raises(ConfigError):
        parse_yaml("!!python/name:os.system ''", "x")
    assert parse_yaml("2024-01-02", "x") == yaml.safe_load("2024-01-02")
