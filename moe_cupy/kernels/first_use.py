"""Seconds spent on what happens once in a process, at a kernel's first use: it is compiled, or read from disk.

They are no part of a speed: the engine takes them off the times of its passes and counts them apart.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class FirstUse:
    """What this process has spent so far."""

    seconds: float = 0.0


@contextmanager
def first_use() -> Iterator[None]:
    """Count the time of the block."""
    begun = time.perf_counter()
    try:
        yield
    finally:
        FirstUse.seconds += time.perf_counter() - begun
