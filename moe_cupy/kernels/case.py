"""One launch of one op, and how far float32 may be from float64 on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

U = 2.0**-24


@dataclass(frozen=True, slots=True)
class Case:
    """One launch: ``buffers`` by name, ``outputs`` among them, ``allowed()`` -> error bound per output."""

    op: str
    label: str
    buffers: dict[str, Any]
    outputs: tuple[str, ...]
    allowed: Callable[[], dict[str, np.ndarray | float]]


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(0, 1, shape).astype(np.float32)


def empty(*shape: int) -> np.ndarray:
    """An output that nothing has been written to yet."""
    return np.full(shape, np.nan, np.float32)
