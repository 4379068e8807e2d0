"""What a command prints beside its result, on stderr: remarks, warnings, and how far a long piece of work is.

The result alone is on stdout, so that it can be piped. ``--quiet`` leaves only warnings and errors.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")
DELAY_S = 2.0  # work that takes no longer shows no progress
EVERY_S = 10.0  # between two lines of progress where there is no bar
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} passed, {remaining} left"


class Settings:
    """How this process prints; a command line sets it once, before its command runs."""

    quiet: bool = False
    bar: Any = None  # tqdm.tqdm, or nothing: draws progress on a terminal


def note(message: str) -> None:
    """A remark or a statistic on stderr; nothing with ``--quiet``."""
    if not Settings.quiet:
        _print(message)


def warn(message: str) -> None:
    """On stderr even with ``--quiet``: the result is not what one might take it for."""
    _print(f"warning: {message}")


def _print(message: str) -> None:
    if sys.stderr is None:  # the caller closed it; print would take stdout instead
        return
    if Settings.bar is not None and sys.stderr.isatty():
        Settings.bar.write(message, file=sys.stderr)  # above a bar that is there
    else:
        print(message, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON object as one line on stdout (the last, by contract)."""
    print(json.dumps(value), flush=True)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """A function to call with the number of steps just done, of ``total``.

    From DELAY_S on, a bar with the time left on a terminal, a line every EVERY_S elsewhere; nothing with ``--quiet``.
    """
    if Settings.quiet or sys.stderr is None:
        yield lambda count: None
    elif Settings.bar is not None and sys.stderr.isatty():
        with Settings.bar(total=total, desc=what, delay=DELAY_S, leave=False, bar_format=BAR, file=sys.stderr) as bar:
            yield bar.update
    else:
        yield _Lines(what, total).update


class _Lines:
    """Progress as a line now and then."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.begun = time.monotonic()
        self.due = self.begun + DELAY_S

    def update(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now >= self.due and self.done < self.total:
            self.due = now + EVERY_S
            left = (now - self.begun) / self.done * (self.total - self.done)
            note(f"{self.what}: {self.done / self.total:.0%}, about {duration(left)} left")


def duration(seconds: float) -> str:
    """As a person says it: 40 s, 3 min, 2 h 5 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def with_progress(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """Yield ``items``, and show how many of ``total`` are done."""
    with progress(what, total) as done:
        for item in items:
            yield item
            done(1)
