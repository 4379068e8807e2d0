"""Policies that decide what those of ``cache`` decide, compiled: for the decode loop and for long replays.

The definitions stay in ``cache``, which knows no compiler. Who runs them hands this table to whoever obeys it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moe_cupy.cache import POLICIES as DEFINED
from moe_cupy.cache import Geometry, Policy
from moe_cupy.numba_cache import tidy

tidy(Path(__file__).parent)

from moe_cupy.compiled.echo import CompiledEcho  # noqa: E402  (importing compiles)

POLICIES: dict[str, Callable[[Geometry], Policy]] = DEFINED | {"echo": CompiledEcho}
