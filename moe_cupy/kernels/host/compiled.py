"""What Numba has compiled and kept on disk, tidied without importing the kernels (importing compiles)."""

from __future__ import annotations

import sys
from pathlib import Path

from moe_cupy.numba_cache import release, tidy

HERE = Path(__file__).parent


def forget_stale() -> None:
    """Remove what was compiled before any of the kernels changed, or is damaged."""
    tidy(HERE)


def forget_sources() -> int:
    """Give back what is held of compiled functions of this package beside their machine code; how many there were."""
    return release([module for name, module in sys.modules.items() if name.startswith("moe_cupy.")])
