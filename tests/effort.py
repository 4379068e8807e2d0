"""How much work something is, measured so that a slow or busy machine changes nothing."""

from __future__ import annotations

import cProfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def calls_of(work: Callable[[], object]) -> int:
    """How many functions ``work()`` calls, those of the interpreter included."""
    profile = cProfile.Profile()
    profile.runcall(work)
    return sum(entry.callcount for entry in profile.getstats())


@contextmanager
def little_computing(most: float) -> Iterator[None]:
    """For what runs inside one call, as a regular expression: fails above ``most`` seconds of this thread's own time.

    Other processes do not count. ``most`` is a hundred times what is usual: only another order of effort exceeds it.
    """
    begun = time.thread_time()
    yield
    spent = time.thread_time() - begun
    assert spent < most, f"{spent:.1f} s of computing"
