"""Sentences and kinds of errors."""

from __future__ import annotations

import pickle

import pytest

from polytask import errors
from polytask.errors import ConfigError, ConfigErrors, PolytaskError, compose, did_you_mean, nearest


def test_sentence_has_what_where_expected_got_and_hint_in_this_order() -> None:
    text = compose("too large", "a.b", "x", "a number", "lower it")
    assert text == "a.b: too large, expected a number, got 'x'; lower it"
    assert compose("too large", None, None, None, None) == "too large"
    assert compose("too large", None, 0, None, None) == "too large, got 0"


def test_error_keeps_its_parts() -> None:
    error = ConfigError("bad", where="x", got=3, expected="4", hint="do")
    assert (error.what, error.where, error.got, error.expected, error.hint) == ("bad", "x", 3, "4", "do")
    assert str(error) == "x: bad, expected 4, got 3; do"


@pytest.mark.parametrize(
    ("word", "close"), [("rnak", "rank"), ("scael", "scale"), ("RANK", "rank"), ("zzzzzz", None)]
)
def test_nearest(word: str, close: str | None) -> None:
    assert nearest(word, ["rank", "scale"]) == close


def test_hint_names_all_when_nothing_is_close() -> None:
    assert did_you_mean("zzzzzz", ["rank", "scale"]) == "known: rank, scale"
    assert did_you_mean("zzzzzz", []) == "known: none"
    assert did_you_mean("rnak", iter(["rank"])) == "did you mean 'rank'?"


def test_exit_codes() -> None:
    codes = {
        "ConfigError": 2, "ConfigErrors": 2, "MissingDependencyError": 2, "UnsupportedBackboneError": 2,
        "DatasetNotFoundError": 3, "DataError": 3, "TaskMismatchError": 4, "CheckpointError": 4,
        "NonFiniteLossError": 5, "PolytaskError": 1,
    }  # fmt: skip
    kinds = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    mine = {name: k.exit_code for name, k in kinds.items() if issubclass(k, PolytaskError)}
    assert mine == codes


def test_many_problems_survive_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ConfigErrors(["a: one", "b: two"])))
    assert error.problems == ["a: one", "b: two"]
    assert str(error) == "a: one\nb: two"
    assert str(error.below("f.yaml")) == "f.yaml: a: one\nf.yaml: b: two"
    assert str(pickle.loads(pickle.dumps(ConfigError("bad", where="x")))) == "x: bad"
