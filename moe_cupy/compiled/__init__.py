"""Policies that decide what those of ``cache`` decide, compiled: for the decode loop and for long replays.

The definitions stay in ``cache``, which knows no compiler. Who runs them hands this table to whoever obeys it.
"""

from __future__ import annotations

from collections.abc import Callable

from moe_cupy.cache import POLICIES as DEFINED
from moe_cupy.cache import Geometry, Policy
from moe_cupy.compiled.echo import CompiledEcho

POLICIES: dict[str, Callable[[Geometry], Policy]] = DEFINED | {"echo": CompiledEcho}
