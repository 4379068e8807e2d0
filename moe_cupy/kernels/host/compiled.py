"""Whether the host kernels are on disk already, asked without importing them (importing compiles)."""

from __future__ import annotations

from pathlib import Path


def first_run() -> bool:
    """True if Numba's cache beside the kernels is empty, so that the next import takes seconds."""
    return not any(Path(__file__).with_name("__pycache__").glob("*.nbi"))
