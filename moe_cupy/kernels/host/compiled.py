"""What Numba has compiled and kept on disk, tidied without importing the kernels (importing compiles)."""

from __future__ import annotations

from pathlib import Path

from moe_cupy.numba_cache import tidy

HERE = Path(__file__).parent


def forget_stale() -> None:
    """Remove what was compiled before any of the kernels changed, or is damaged."""
    tidy(HERE)
