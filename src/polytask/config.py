"""Plain data to frozen typed objects and back: specs, slots and the sentences about what does not fit.

A *spec* is a frozen pydantic model that is both schema and constructor argument. A *slot* is a field
that holds one of several registered specs, told apart by their ``type`` key.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails, core_schema

from polytask.errors import ConfigError, ConfigErrors, nearest
from polytask.files import expand_name

Location = Annotated[Path, AfterValidator(lambda path: Path(os.path.abspath(path.expanduser())))]
"""A path in a recipe: ``~`` is the home, and it stays the same from whatever folder the run is read again."""


class Spec(BaseModel):
    """Base of everything that can stand in a recipe: frozen, keyword-only, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    PENALTIES: ClassVar[tuple[str, ...]] = ()
    """Names of the auxiliary losses that modules built from this spec record."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads a bare yes, no, on or off as a boolean, which would pass for 1 or 0."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        kinds = {annotation, *get_args(annotation)}
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError(f"a number is needed, got {value}")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _keep_type_of_default(cls, value: Any, info: ValidationInfo) -> Any:
        """Settings without a ``type`` are those of the spec that stands in the slot by default."""
        default = cls.model_fields[info.field_name or ""].default
        if isinstance(default, Spec) and isinstance(value, Mapping) and "type" in type(default).model_fields:
            return {"type": default.model_dump()["type"], **value}
        return value


S = TypeVar("S", bound=Spec)
_registry: dict[str, dict[str, type[Spec]]] = {}
_aliases: dict[str, dict[str, str]] = {}
_stale = False


def register(slot: str, *aliases: str) -> Callable[[type[S]], type[S]]:
    """Class decorator that offers a spec in a slot, under the default of its ``type`` and as ``aliases``.

    Raises:
        ConfigError: if the class has no ``type`` default or the name is taken by another class.
    """

    def add(cls: type[S]) -> type[S]:
        global _stale
        field = cls.model_fields.get("type")
        if field is None or not isinstance(field.default, str):
            raise ConfigError(
                "a registered spec needs a field `type` with its name as default", where=cls.__name__
            )
        taken = _registry.setdefault(slot, {}).get(field.default)
        if taken is not None and _qualified(taken) != _qualified(cls):
            raise ConfigError(f"{slot} {field.default!r} is already registered by {_qualified(taken)}")
        _registry[slot][field.default] = cls
        _aliases.setdefault(slot, {}).update(dict.fromkeys(aliases, field.default))
        _stale = True
        return cls

    return add


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def full_name(slot: str, name: Any) -> Any:
    """The name a spec is registered under, for one of its aliases; other values as they are."""
    return _aliases.get(slot, {}).get(name, name) if isinstance(name, str) else name


def aliases(slot: str) -> Mapping[str, str]:
    """Other names of specs, and what they are registered under."""
    return _aliases.get(slot, {})


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
        either = core_schema.union_schema([core_schema.literal_schema(list(choices)), union])
        return core_schema.no_info_before_validator_function(
            self._expand, union, json_schema_input_schema=either
        )

    def _expand(self, value: Any) -> Any:
        """A bare name is short for a mapping, and an alias for a name."""
        value = expand_name(value)
        if isinstance(value, Mapping) and "type" in value:
            value = {**value, "type": full_name(self.name, value["type"])}
        return value


def decode(cls: type[S], data: object, *, source: str = "", at: str = "") -> S:
    """Check plain data against a spec class.

    Args:
        cls: the spec class to build.
        data: nested mappings, sequences and scalars, as YAML yields them.
        source: name of the file, for the messages.
        at: YAML path of the data inside the file.

    Raises:
        ConfigErrors: lists every problem with its path, value and a hint.
    """
    _rebuild_if_stale()
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        problems = sentences(cls, data, error)
    above = f"{at}." if at else ""
    raise ConfigErrors([f"{above}{problem}" for problem in problems]).below(source)


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


# --- sentences -------------------------------------------------------------------------------------


def sentences(cls: type[Spec], data: object, error: ValidationError) -> list[str]:
    """One sentence per problem, beginning with its path, without those that only repeat a deeper one."""
    found: dict[str, str] = {}
    for details in error.errors(include_url=False):
        path, owner = _locate(cls, data, details["loc"])
        text = _sentence(cls, owner, path, details)
        if path in found and text != found[path]:  # members of a union
            text = f"{found[path]}, or {text}"
        found[path] = text
    deepest = {p: t for p, t in found.items() if not any(p and other.startswith(f"{p}.") for other in found)}
    return [f"{path}: {text}" if path else text for path, text in deepest.items()]


_WORDS = {
    "a valid dictionary or object to extract fields from": "a mapping or a name",
    "a valid dictionary": "a mapping",
    "a valid tuple": "a list",
    "Tuple": "List",
    " after validation": "",
}


def _sentence(cls: type[Spec], owner: type[Spec] | None, path: str, details: ErrorDetails) -> str:
    kind, got = details["type"], details["input"]
    message = details["msg"].removeprefix("Value error, ")
    for jargon, word in _WORDS.items():
        message = message.replace(jargon, word)
    if kind == "extra_forbidden":
        fields = list(owner.model_fields) if owner else []
        guess = _guess(path.rpartition(".")[2], fields)
        return f"unknown key{guess} ({_label(owner)} takes {', '.join(fields)})"
    if kind == "missing":
        return "required key is missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _unknown_name(got, list(registered(_slot_at(cls, details["loc"]) or "")))
    if kind == "value_error":
        return message
    hint = ""
    if kind == "literal_error" and isinstance(got, str):
        hint = _guess(got, details["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", "))
    elif isinstance(got, bool):
        hint = "; YAML reads a bare yes, no, on or off as a boolean, so put it in quotes"
    return f"{message[0].lower()}{message[1:]}, got {got!r}{hint}"


def _unknown_name(got: object, names: list[str]) -> str:
    name = got.get("type") if isinstance(got, Mapping) else got
    if name is None:
        return f"`type` is missing; known: {', '.join(names)}"
    return f"unknown name {name!r}{_guess(str(name), names)} (known: {', '.join(names)})"


def _guess(word: str, known: Sequence[str]) -> str:
    close = nearest(word, known)
    return f"; did you mean {close!r}?" if close else ""


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
        elif isinstance(target, type) and isinstance(key, str) and key != "[key]":
            owner = target
            path.append(key)
            data = data.get(key) if isinstance(data, Mapping) else None
            field = target.model_fields.get(key)
            target = _target([*field.metadata, field.annotation]) if field else target  # a name in a mapping
        elif isinstance(key, int) or (isinstance(data, Mapping) and key in data):  # else: a member of a union
            path.append(str(key))
            data = _inside(data, key)
    return ".".join(path), owner


def _inside(data: object, key: int | str) -> object:
    if isinstance(data, Mapping):
        return data.get(key)
    is_item = isinstance(data, Sequence) and isinstance(key, int) and key < len(data)
    return data[key] if is_item else None  # type: ignore[index]


def _slot_at(cls: type[Spec], loc: tuple[int | str, ...]) -> str | None:
    target: type[Spec] | Slot | None = cls
    for key in loc:
        if isinstance(target, Slot) and isinstance(key, str) and key in registered(target.name):
            target = registered(target.name)[key]
        elif isinstance(target, type) and isinstance(key, str) and key in target.model_fields:
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
