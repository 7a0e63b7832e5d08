"""Strict YAML to frozen typed objects and back: files, inheritance, overrides, slots and sentences.

A *spec* is a frozen pydantic model that is both schema and constructor argument. A *slot* is a field
that holds one of several registered specs, told apart by their ``type`` key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import ErrorDetails, core_schema

from polytask.errors import ConfigError, ConfigErrors, did_you_mean

MAX_INHERITANCE = 3


class Spec(BaseModel):
    """Base of everything that can stand in a recipe: frozen, keyword-only, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


S = TypeVar("S", bound=Spec)
_registry: dict[str, dict[str, type[Spec]]] = {}
_stale = False


def register(slot: str) -> Callable[[type[S]], type[S]]:
    """Class decorator that offers a spec in a slot, under the default of its ``type`` field.

    Raises:
        ConfigError: if the class has no ``type`` default or the name is taken by another class.
    """

    def add(cls: type[S]) -> type[S]:
        global _stale
        field = cls.model_fields.get("type")
        if field is None or not isinstance(field.default, str):
            raise ConfigError("a registered spec needs a field `type` with its name as default", where=cls.__name__)
        taken = _registry.setdefault(slot, {}).get(field.default)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise ConfigError(f"{slot} {field.default!r} is already registered by {taken.__qualname__}")
        _registry[slot][field.default] = cls
        _stale = True
        return cls

    return add


def registered(slot: str) -> Mapping[str, type[Spec]]:
    """Name to class of all specs that may stand in a slot."""
    return _registry.get(slot, {})


class Slot:
    """Annotation of a field that takes any spec registered for a slot: ``Annotated[Neck, Slot("neck")]``.

    A bare name is short for ``{type: name}``.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        choices: dict[Any, core_schema.CoreSchema] = {
            name: handler.generate_schema(cls) for name, cls in registered(self.name).items()
        }
        if not choices:  # nothing registered yet: the first registration rebuilds
            return core_schema.any_schema()
        union = core_schema.tagged_union_schema(choices, discriminator="type")
        return core_schema.no_info_before_validator_function(_expand_name, union)


def _expand_name(value: object) -> object:
    return {"type": value} if isinstance(value, str) else value


def decode(cls: type[S], data: object, *, source: str = "recipe") -> S:
    """Check plain data against a spec class.

    Args:
        cls: the spec class to build.
        data: nested mappings, sequences and scalars, as YAML yields them.
        source: name of the file, for the messages.

    Raises:
        ConfigErrors: lists every problem with its path, value and a hint.
    """
    _rebuild_if_stale()
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        problems = [_sentence(cls, data, details) for details in error.errors(include_url=False)]
        raise ConfigErrors([f"{source}: {problem}" for problem in dict.fromkeys(problems)]) from None


def encode(spec: Spec) -> dict[str, Any]:
    """Plain data of a spec; ``decode(type(spec), encode(spec)) == spec``."""
    _rebuild_if_stale()
    return spec.model_dump(mode="json", serialize_as_any=True)


def json_schema(cls: type[Spec]) -> dict[str, Any]:
    """JSON schema of a spec class, for completion in editors."""
    _rebuild_if_stale()
    return cls.model_json_schema()


def _rebuild_if_stale() -> None:
    """Slots list what is registered when their schema is built, so a late registration rebuilds."""
    global _stale
    if _stale:
        _stale = False
        for cls in list(_subclasses(Spec)):
            cls.model_rebuild(force=True)


def _subclasses(cls: type[Spec]) -> Iterator[type[Spec]]:
    for child in cls.__subclasses__():
        yield from _subclasses(child)
        yield child


# --- files -----------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys, which YAML would silently let overwrite each other."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(k, deep=True) for k, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", node.start_mark)
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
    if resolved in children:
        raise ConfigError("`base:` leads back to the same file", where=where)
    if len(children) > MAX_INHERITANCE:
        raise ConfigError(f"`base:` is nested deeper than {MAX_INHERITANCE} files", where=where)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe cannot be read ({error})", where=where, hint="check the path") from None
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
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        raise ConfigError(f"not valid YAML ({getattr(error, 'problem', error)})", where=place) from None


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge; ``above`` wins. A mapping with another ``type`` replaces instead of merging."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        same_kind = isinstance(old, Mapping) and isinstance(value, Mapping)
        if same_kind and value.get("type", old.get("type")) == old.get("type"):  # type: ignore[union-attr]
            merged[key] = merge(old, value)  # type: ignore[arg-type]
        else:
            merged[key] = value
    return merged


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
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            raise ConfigError("no such list item", where=f"--set {path}", got=key, expected=f"0 to {len(node) - 1}")
        return [_assign(item, rest, value, path) if i == int(key) else item for i, item in enumerate(node)]
    if isinstance(node, str):  # a bare name in a slot, about to get settings
        node = {"type": node}
    if node is None:
        node = {}
    if not isinstance(node, dict):
        raise ConfigError("the path runs through a plain value", where=f"--set {path}", got=node)
    return {**node, key: _assign(node.get(key), rest, value, path)}


def dump_yaml(data: Mapping[str, Any]) -> str:
    """YAML text in the order of the keys, short lists on one line."""
    text: str = yaml.dump(dict(data), sort_keys=False, allow_unicode=True, width=100, default_flow_style=None)
    return text


# --- sentences -------------------------------------------------------------------------------------


def _sentence(cls: type[Spec], data: object, details: ErrorDetails) -> str:
    path, owner = _locate(cls, data, details["loc"])
    kind, got = details["type"], details["input"]
    fields = list(owner.model_fields) if owner else []
    if kind == "extra_forbidden":
        key = path.rpartition(".")[2]
        return f"{path}: unknown key; {did_you_mean(key, fields)} ({_label(owner)} takes {', '.join(fields)})"
    if kind == "missing":
        return f"{path}: required key is missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        known = [tag.strip().strip("'") for tag in details.get("ctx", {}).get("expected_tags", "").split(",")]
        name = got.get("type") if isinstance(got, Mapping) else got
        names = list(filter(None, known)) or list(registered(_slot_at(cls, details["loc"]) or ""))
        return f"{path}.type: unknown name {name!r}; {did_you_mean(str(name), names)} (known: {', '.join(names)})"
    message = details["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{path}: {message}" if path else message
    hint = ""
    if kind in ("literal_error", "enum") and isinstance(got, str):
        hint = f"; {did_you_mean(got, details['ctx']['expected'].replace(' or ', ', ').replace(chr(39), '').split(', '))}"
    return f"{path}: {message[0].lower()}{message[1:]}, got {got!r}{hint}"


def _label(owner: type[Spec] | None) -> str:
    if owner is None:
        return "it"
    field = owner.model_fields.get("type")
    return field.default if field is not None and isinstance(field.default, str) else owner.__name__


def _locate(cls: type[Spec], data: object, loc: tuple[int | str, ...]) -> tuple[str, type[Spec] | None]:
    """Dotted YAML path of an error and the spec class that owns its last key (tags are no keys)."""
    path: list[str] = []
    owner: type[Spec] | None = cls
    target: type[Spec] | Slot | None = cls
    for key in loc:
        if isinstance(target, Slot) and isinstance(key, str) and key in registered(target.name):
            target = registered(target.name)[key]
        elif isinstance(target, type) and isinstance(key, str):
            owner = target
            path.append(key)
            data = data.get(key) if isinstance(data, Mapping) else None
            field = target.model_fields.get(key)
            target = _target([*field.metadata, field.annotation]) if field else None
        elif isinstance(key, int) or (isinstance(data, Mapping) and key in data):  # else: a member of a union
            path.append(str(key))
            data = data[key] if isinstance(data, (Mapping, Sequence)) else None  # type: ignore[index,call-overload]
    return ".".join(path), owner


def _slot_at(cls: type[Spec], loc: tuple[int | str, ...]) -> str | None:
    target: type[Spec] | Slot | None = cls
    for key in loc:
        if isinstance(target, type) and isinstance(key, str) and key in target.model_fields:
            field = target.model_fields[key]
            target = _target([*field.metadata, field.annotation])
    return target.name if isinstance(target, Slot) else None


def _target(annotations: Sequence[Any]) -> type[Spec] | Slot | None:
    """The first slot or spec class found in a nest of annotations."""
    for annotation in annotations:
        if isinstance(annotation, Slot) or (isinstance(annotation, type) and issubclass(annotation, Spec)):
            return annotation
    for annotation in annotations:
        inner = [*getattr(annotation, "__metadata__", ()), *get_args(annotation)]
        found = _target(inner) if inner else None
        if found is not None:
            return found
    return None
