"""What Numba has compiled and keeps on disk, asked and tidied without importing what it was compiled from."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

import numba
from numba.core import config

STOP = b"."  # the last byte of any pickle
_LENT: list[tempfile.TemporaryDirectory] = []  # a folder for this process alone


def kept_in(folder: Path) -> Path:
    """Where Numba keeps what is compiled from the sources of ``folder``.

    NUMBA_CACHE_DIR, ``__pycache__`` or the user's cache, the first that can be written; where none can, a temporary
    folder until the process ends.
    """
    space: dict = {"__name__": __name__}
    exec(compile("def probe(): pass", str(folder / "__init__.py"), "exec"), space)
    try:
        return Path(numba.njit(cache=True)(space["probe"]).stats.cache_path)
    except RuntimeError:  # "no locator available"
        _LENT.append(tempfile.TemporaryDirectory(prefix="moe_cupy-"))
        config.CACHE_DIR = _LENT[-1].name
        return kept_in(folder)


def tidy(folder: Path) -> list[Path]:
    """What Numba keeps of the sources of ``folder`` and can be used: indices of functions; the rest is removed.

    Numba looks at the file of a function alone, but a function that it keeps holds the code of all that it calls: so
    what is older than any source goes. A file that a crash or a full disk has cut short would be an exception in Numba.
    """
    newest = max(source.stat().st_mtime for source in folder.glob("*.py"))
    kept = kept_in(folder)
    for file in [*kept.glob("*.nbi"), *kept.glob("*.nbc")]:
        with suppress(OSError):
            if (file.suffix == ".nbi" and file.stat().st_mtime < newest) or _is_cut_short(file):
                file.unlink()
    return list(kept.glob("*.nbi"))


def _is_cut_short(file: Path) -> bool:
    with file.open("rb") as pickled:
        size = pickled.seek(0, 2)
        pickled.seek(max(0, size - 1))
        return pickled.read() != STOP
