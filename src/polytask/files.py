"""Files of recipes and results: strict YAML with inheritance and overrides, JSON, atomic writing."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from polytask.errors import ConfigError

MAX_INHERITANCE = 3


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys, which YAML would silently let overwrite each other; reads 5e-4 as a number."""


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that the loader would read as numbers."""


_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
for _kind in (_Loader, _Dumper):  # as YAML 1.2 has it; PyYAML demands a dot and a sign
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(k, deep=True) for k, _ in node.value]
    for place, key in enumerate(keys):
        mark = node.value[place][0].start_mark
        if isinstance(key, (list, dict)):
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is no plain value", mark)
        if key in keys[:place]:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", mark)
    return dict(zip(keys, (loader.construct_object(v, deep=True) for _, v in node.value), strict=True))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping with its ``base:`` files merged below it, nearest file winning.

    Raises:
        ConfigError: file missing, not YAML, not a mapping, inheritance cycle or deeper than three.
    """
    return _load(path, ())


def _load(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    where, resolved = str(path), path.resolve()
    hint = f"it is the `base` of {children[-1]}" if children else "check the path"
    if resolved in children:
        raise ConfigError("`base:` leads back to the same file", where=where)
    if len(children) > MAX_INHERITANCE:
        raise ConfigError(f"`base:` is nested deeper than {MAX_INHERITANCE} files", where=where)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe cannot be read ({error})", where=where, hint=hint) from None
    data = parse_yaml(text, where)
    if not isinstance(data, dict):
        raise ConfigError("recipe is not a mapping of keys", where=where, got=type(data).__name__)
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise ConfigError("`base` must be one path", where=where, got=base)
    return merge(_load(path.parent / base, (*children, resolved)), data)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text; a syntax error names line and column."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        raise ConfigError(f"not valid YAML ({getattr(error, 'problem', error)})", where=place) from None


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge; ``above`` wins. A mapping with another ``type`` replaces instead of merging."""
    merged = dict(below)
    for key, value in above.items():
        old = expand_name(merged.get(key))
        if (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and value.get("type", old.get("type")) == old.get("type")
        ):
            value = merge(old, value)
        merged[key] = value
    return merged


def expand_name(value: Any) -> Any:
    """A bare name is short for ``{type: name}``; other values are left as they are."""
    return {"type": value} if isinstance(value, str) else value


def _full_form(value: Any) -> Any:
    """The mapping that a name, or a list of names, is short for; other values as they are."""
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        return {name: {} for name in value}
    return expand_name(value)


def override(data: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply ``a.b.0.c=VALUE`` texts (values parse as YAML) before decoding.

    Raises:
        ConfigError: no ``=`` in the text, or a path that runs through a scalar or past a list's end.
    """
    for text in assignments:
        path, equals, value = text.partition("=")
        if not equals or not path:
            raise ConfigError("an override must look like a.b=value", where="--set", got=text)
        data = _assign(data, path.split("."), parse_yaml(value, f"--set {path}"), path)
    return data


def _assign(node: Any, keys: list[str], value: Any, path: str) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node, list) and not (key in node and rest):
        if not key.isdecimal() or int(key) >= len(node):
            items = f"0 to {len(node) - 1}" if node else "nothing, the list is empty"
            raise ConfigError("no such list item", where=f"--set {path}", got=key, expected=items)
        return [_assign(item, rest, value, path) if i == int(key) else item for i, item in enumerate(node)]
    node = {} if node is None else _full_form(node)
    if not isinstance(node, dict):
        raise ConfigError("the path runs through a plain value", where=f"--set {path}", got=node)
    return {**node, key: _assign(node.get(key), rest, value, path)}


def dump_yaml(data: Mapping[str, Any]) -> str:
    """YAML text in the order of the keys, short lists on one line."""
    style: dict[str, Any] = {
        "sort_keys": False,
        "allow_unicode": True,
        "width": 100,
        "default_flow_style": None,
    }
    text: str = yaml.dump(dict(data), Dumper=_Dumper, **style)
    return text


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Paths at which two nests of plain data differ."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = dict.fromkeys([*one, *other])
        below = [differences(one.get(k), other.get(k), f"{path}.{k}" if path else str(k)) for k in keys]
        return [difference for found in below for difference in found]
    return [] if one == other else [path]


def to_json(value: Any) -> str:
    """Strict JSON text; numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=1, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def make_folder(path: Path, where: str) -> None:
    """Make a folder for results.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"folder cannot be made ({error})", where=where, got=str(path)) from None


@contextmanager
def new_folder(path: Path, where: str) -> Iterator[Path]:
    """A folder to fill, which appears under its name when it is complete, or not at all.

    Raises:
        ConfigError: there is something of that name, or it cannot be made.
    """
    if path.exists():
        hint = "name one that does not exist yet"
        raise ConfigError("nothing is overwritten", where=where, got=str(path), hint=hint)
    draft = path.absolute().with_name(f".{path.name}.{uuid.uuid4().hex}")
    make_folder(draft, where)
    try:
        yield draft
        draft.rename(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lets processes of one machine wait for each other; without it they would do the work twice."""
    with path.open("w") as file:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
