"""Specs, slots, and the sentences about what does not fit."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from polytask.config import Slot, Spec, decode, encode, json_schema, register, registered
from polytask.errors import ConfigError, ConfigErrors


class Shape(Spec):
    type: str


@register("test-shape")
class Square(Shape):
    type: Literal["square"] = "square"
    side: float = 1.0


@register("test-shape")
class Circle(Shape):
    type: Literal["circle"] = "circle"
    radius: float = Field(default=1.0, gt=0)
    sizes: int | tuple[int, ...] = 1


class Drawing(Spec):
    shape: Annotated[Shape, Slot("test-shape")] = Square()
    shapes: tuple[Annotated[Shape, Slot("test-shape")], ...] = ()
    named: dict[str, Annotated[Shape, Slot("test-shape")]] = Field(default_factory=dict)
    color: Literal["red", "green"] = "red"
    width: float | None = None
    count: int = Field(default=1, ge=0)
    shown: bool = True
    size: tuple[int, int] = (1, 2)


def problems(data: Any) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        decode(Drawing, data)
    return caught.value.problems


def test_slot_takes_a_mapping_a_bare_name_and_a_spec() -> None:
    full = decode(Drawing, {"shape": {"type": "circle", "radius": 2}})
    assert full.shape == Circle(radius=2)
    assert decode(Drawing, {"shape": "circle"}).shape == Circle()
    assert decode(Drawing, {"shape": Circle()}).shape == Circle()
    assert decode(Drawing, {"shapes": ["square", {"type": "circle"}]}).shapes == (Square(), Circle())


def test_typo_names_path_nearest_spelling_and_what_the_spec_takes() -> None:
    assert problems({"shape": {"type": "circle", "raduis": 2}}) == [
        "shape.raduis: unknown key; did you mean 'radius'? (circle takes type, radius, sizes)"
    ]
    assert problems({"named": {"a": {"type": "square", "sied": 2}}})[0].startswith(
        "named.a.sied: unknown key"
    )
    assert problems({"shapes": ["circle", {"type": "square", "sied": 2}]})[0].startswith("shapes.1.sied:")


def test_unknown_name_in_a_slot() -> None:
    assert problems({"shape": "cirlce"}) == [
        "shape: unknown name 'cirlce'; did you mean 'circle'? (known: square, circle)"
    ]
    assert problems({"shapes": [{"radius": 1}]}) == ["shapes.0: `type` is missing; known: square, circle"]
    assert decode(Drawing, {"shape": {"side": 3}}).shape == Square(side=3)  # of the default
    assert problems({"shape": 5}) == ["shape: input should be a mapping or a name, got 5"]


def test_all_problems_at_once() -> None:
    found = problems({"shape": {"type": "circle", "radius": -1}, "color": "gren", "count": "x", "extra": 1})
    assert [p.partition(":")[0] for p in found] == ["shape.radius", "color", "count", "extra"]
    assert "did you mean 'green'?" in found[1]


def test_union_gives_one_sentence() -> None:
    (found,) = problems({"shape": {"type": "circle", "sizes": "x"}})
    assert found.startswith("shape.sizes: input should be a valid integer")
    assert "or input should be a list" in found
    (found,) = problems({"shape": {"type": "circle", "sizes": [1, "x"]}})
    assert found.startswith("shape.sizes.1: input should be a valid integer")


def test_number_written_as_yaml_leaves_it_a_string() -> None:
    assert decode(Drawing, {"width": "5e-4"}).width == 5e-4


@pytest.mark.parametrize("key", ["width", "count"])
def test_boolean_is_no_number(key: str) -> None:
    assert problems({key: True}) == [f"{key}: a number is needed, got True"]
    assert decode(Drawing, {"shown": False}).shown is False


def test_boolean_where_a_word_is_expected_is_explained() -> None:
    (found,) = problems({"color": False})
    assert found.startswith("color: input should be 'red' or 'green', got False; YAML reads a bare yes, no")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "nan"])
def test_numbers_are_finite(value: Any) -> None:
    assert "finite" in problems({"width": value})[0]


def test_python_words_do_not_reach_the_user() -> None:
    for data in ({"size": [1, 2, 3]}, {"size": 4}, {"named": [1]}, {"shape": [1]}, 5):
        text = " ".join(problems(data))
        assert "tuple" not in text.lower()
        assert "dictionary" not in text


def test_source_and_place_stand_before_each_problem() -> None:
    with pytest.raises(ConfigErrors) as caught:
        decode(Drawing, {"colour": 1, "sized": 2}, source="x.yaml", at="a.b")
    assert [p.split(": unknown")[0] for p in caught.value.problems] == [
        "x.yaml: a.b.colour",
        "x.yaml: a.b.sized",
    ]


def test_specs_are_frozen_and_take_keywords_only() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Square().side = 3
    with pytest.raises(TypeError):
        Square(3)  # type: ignore[call-arg]


def test_round_trip_keeps_the_kind_in_a_slot() -> None:
    drawing = Drawing(shape=Circle(sizes=(1, 2)), shapes=(Square(side=2),), named={"a": Circle()})
    data = encode(drawing)
    assert data["shape"] == {"type": "circle", "radius": 1.0, "sizes": [1, 2]}
    assert decode(Drawing, data) == drawing


def test_late_registration_works_in_an_existing_slot() -> None:
    class Late(Shape):
        type: Literal["late"] = "late"
        x: int = 0

    with pytest.raises(ConfigErrors):
        decode(Drawing, {"shape": "late"})
    register("test-shape")(Late)
    try:
        assert decode(Drawing, {"shape": {"type": "late", "x": 3}}).shape == Late(x=3)
        assert "late" in str(json_schema(Drawing))
        assert register("test-shape")(Late) is Late  # the same class again, as when a module is reloaded
    finally:
        registered("test-shape").pop("late")  # type: ignore[attr-defined]


def test_taken_name_is_refused() -> None:
    class Other(Shape):
        type: Literal["square"] = "square"

    with pytest.raises(
        ConfigError, match=r"test-shape 'square' is already registered by .*test_config\.Square"
    ):
        register("test-shape")(Other)

    class Square(Shape):  # of the same name, but another class
        type: Literal["square"] = "square"

    with pytest.raises(ConfigError, match="already registered"):
        register("test-shape")(Square)


def test_spec_without_name_cannot_be_registered() -> None:
    class Nameless(Shape):
        pass

    with pytest.raises(ConfigError, match="needs a field `type`"):
        register("test-shape")(Nameless)


def test_json_schema_takes_the_bare_name() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema(Drawing)
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    assert check.is_valid({"shape": "circle"})
    assert check.is_valid({"shape": {"type": "circle", "radius": 3}})
    assert not check.is_valid({"shape": "cirlce"})
    assert not check.is_valid({"shape": {"type": "circle", "raduis": 3}})
