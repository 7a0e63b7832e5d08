"""Progress bars on stderr: rich on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")

_quiet = False
_PLAIN_SECONDS = 15.0


def set_quiet(quiet: bool) -> None:
    """Switch all progress output off or on."""
    global _quiet
    _quiet = quiet


def tell(text: str) -> None:
    """A line of news for people, unless progress output is off."""
    if not _quiet:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def track(
    items: Iterable[T], description: str, total: int | None = None, note: Callable[[], str] = str
) -> Iterator[T]:
    """Yield the items while showing how far along they are.

    Args:
        items: what to go through.
        description: a few words, shown before the bar.
        total: number of items, if ``items`` has no length.
        note: called now and then for words after the description, such as the current loss.
    """
    if total is None:
        total = len(items) if isinstance(items, Sized) else None
    if _quiet:
        yield from items
    elif sys.stderr.isatty():
        yield from _bar(items, description, total, note)
    else:
        yield from _lines(items, description, total, note)


def _bar(items: Iterable[T], description: str, total: int | None, note: Callable[[], str]) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total)
        for item in items:
            yield item
            progress.update(task, advance=1, description=f"{description} {note()}".strip())


def _lines(items: Iterable[T], description: str, total: int | None, note: Callable[[], str]) -> Iterator[T]:
    last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last > _PLAIN_SECONDS:
            last = time.monotonic()
            tell(f"{description}: {done}{f'/{total}' if total else ''} {note()}".strip())
