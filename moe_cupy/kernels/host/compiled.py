"""What Numba has compiled and kept on disk, asked without importing the kernels (importing compiles)."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).parent


def _kept() -> list[Path]:
    return list((HERE / "__pycache__").glob("*.nbi"))


def first_run() -> bool:
    """True if Numba's cache beside the kernels is empty, so that the next import takes a minute."""
    forget_stale()
    return not _kept()


def forget_stale() -> None:
    """Remove what was compiled before any of the kernels changed.

    Numba looks at the file of a function alone, but a function that it keeps holds the code of all that it calls.
    """
    newest = max(source.stat().st_mtime for source in HERE.glob("*.py"))
    for index in _kept():
        with suppress(OSError):
            if index.stat().st_mtime < newest:
                index.unlink()
