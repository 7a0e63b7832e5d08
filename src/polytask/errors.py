"""The kinds of error a user can cause, and how their sentences are composed.

Every error says *what* went wrong, *where*, what was *got*, what was *expected* and what to *do*;
each kind carries the exit code of the command line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PolytaskWarning(UserWarning):
    """Something a user should know that does not stop the work."""


class PolytaskError(Exception):
    """Base of all errors caused by input.

    Args:
        what: the fact, one clause.
        where: file, YAML path, module or task the fact belongs to.
        got: the offending value.
        expected: what would have been right.
        hint: what to do about it.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object = None,
        expected: object = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.expected, self.hint = what, where, got, expected, hint
        super().__init__(compose(what, where, got, expected, hint))


def compose(what: str, where: str | None, got: object, expected: object, hint: str | None) -> str:
    """One line out of the five parts; parts that are None are left out."""
    parts = [f"{where}: {what}" if where else what]
    if expected is not None:
        parts.append(f"expected {expected}")
    if got is not None:
        parts.append(f"got {got!r}" if isinstance(got, str) else f"got {got}")
    sentence = ", ".join(parts)
    return f"{sentence}; {hint}" if hint else sentence


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known spelling closest to ``word``, whatever their case, if any is close."""
    spelled = {name.lower(): name for name in known}
    matches = difflib.get_close_matches(word.lower(), spelled, n=1, cutoff=0.5)
    return spelled[matches[0]] if matches else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint that names the closest spelling, or else all known ones."""
    names = list(known)
    close = nearest(word, names)
    return f"did you mean {close!r}?" if close else f"known: {', '.join(names) or 'none'}"


class ConfigError(PolytaskError):
    """A recipe or command-line value that cannot be accepted."""

    exit_code = 2


class ConfigErrors(ConfigError):
    """All problems of one recipe, reported at once."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems

    def __reduce__(self) -> tuple[type[ConfigErrors], tuple[list[str]]]:
        return type(self), (self.problems,)

    def below(self, place: str) -> ConfigErrors:
        """The same problems, each with a file or path named before it."""
        return ConfigErrors([f"{place}: {problem}" for problem in self.problems]) if place else self


class MissingDependencyError(ConfigError):
    """An optional package is needed and not installed."""


class UnsupportedBackboneError(ConfigError):
    """The chosen backbone lacks what the chosen technique needs."""


class DatasetNotFoundError(PolytaskError):
    """A dataset folder, or a part of it, is not there."""

    exit_code = 3


class DataError(PolytaskError):
    """A file of a dataset is damaged or has unexpected content."""

    exit_code = 3


class TaskMismatchError(PolytaskError):
    """A checkpoint or run belongs to another set of tasks."""

    exit_code = 4


class CheckpointError(PolytaskError):
    """A checkpoint or weight file does not fit or is damaged."""

    exit_code = 4


class NonFiniteLossError(PolytaskError):
    """A loss became NaN or infinite."""

    exit_code = 5
