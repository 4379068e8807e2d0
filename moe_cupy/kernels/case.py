"""One launch of one op, and how far float32 may be from float64 on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Case:
    """One launch: ``buffers`` by name, ``outputs`` among them, ``allowed()`` -> error bound per output."""

    op: str
    label: str
    buffers: dict[str, Any]
    outputs: tuple[str, ...]
    allowed: Callable[[], dict[str, np.ndarray | float]]
