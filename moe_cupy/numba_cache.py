"""What Numba has compiled and keeps on disk, asked and tidied without importing what it was compiled from."""

from __future__ import annotations

import ctypes
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

import numba
from numba.core import caching, config, event
from numba.core.ccallback import CFunc
from numba.core.dispatcher import Dispatcher

from moe_ref.interrupts import undo

STOP = b"."  # the last byte of any pickle
LONG_AGO = 600  # seconds: a file that was begun before is not being written any more
_LENT: list[tempfile.TemporaryDirectory] = []  # a folder for this process alone
_WARNED: list[OSError] = []


def kept_in(folder: Path) -> Path | None:
    """Where Numba keeps what is compiled from the sources of ``folder``.

    NUMBA_CACHE_DIR, ``__pycache__`` or the user's cache, the first that can be written; where none can, a temporary
    folder until the process ends; None, with a warning, where there cannot be one.
    """
    space: dict = {"__name__": __name__}
    exec(compile("def probe(): pass", str(folder / "__init__.py"), "exec"), space)
    try:
        path = numba.njit(cache=True)(space["probe"]).stats.cache_path
    except RuntimeError:  # "no locator available"
        _lend_folder()
        return kept_in(folder)
    return Path(path) if path else None


def _lend_folder() -> None:
    try:
        _LENT.append(tempfile.TemporaryDirectory(prefix="moe_cupy-"))
    except OSError as error:
        not_kept(error)
        for kind in (Dispatcher, CFunc):
            kind.enable_caching = lambda self: None  # type: ignore[method-assign]
    else:
        undo(_LENT[-1].cleanup)
        config.CACHE_DIR = _LENT[-1].name


def not_kept(error: OSError) -> None:
    """Warn, once a process, that what is compiled cannot be kept on disk."""
    if not _WARNED:
        _WARNED.append(error)
        warnings.warn(
            f"compiled kernels cannot be kept on disk ({error.strerror}): this run goes on, the next compiles them "
            "again; make room, or name another folder in NUMBA_CACHE_DIR",
            RuntimeWarning,
            stacklevel=2,
        )


@contextmanager
def _without_failing(cache: caching.Cache) -> Iterator[None]:
    """Reading and writing the cache of one of our functions: a full disk costs the cache, not the run."""
    try:
        yield
    except OSError as error:
        if not cache._py_func.__module__.startswith("moe_cupy"):
            raise
        not_kept(error)


caching.Cache._guard_against_spurious_io_errors = _without_failing  # type: ignore[method-assign]


def tidy(folder: Path) -> list[Path]:
    """What Numba keeps of the sources of ``folder`` and can be used: indices of functions; the rest is removed.

    Numba looks at the file of a function alone, but a function that it keeps holds the code of all that it calls: so
    what is older than any source goes; so does code whose new index was written by a process that ended before the new
    code was. A file that a crash or a full disk has cut short would be an exception in Numba.
    """
    newest = max(source.stat().st_mtime for source in folder.glob("*.py"))
    kept = kept_in(folder)
    if kept is None:
        return []
    for file in [*kept.glob("*.nbi"), *kept.glob("*.nbc")]:
        with suppress(OSError):
            if file.stat().st_mtime < newest or _is_cut_short(file):
                file.unlink()
    remove_begun(kept.glob("*.tmp.*"))
    return list(kept.glob("*.nbi"))


def remove_begun(files: Iterable[Path]) -> None:
    """Remove temporary files that a process which was ended has left behind."""
    for file in files:
        with suppress(OSError):
            if time.time() - file.stat().st_mtime > LONG_AGO:
                file.unlink()


def _is_cut_short(file: Path) -> bool:
    with file.open("rb") as pickled:
        size = pickled.seek(0, 2)
        pickled.seek(max(0, size - 1))
        return pickled.read() != STOP


def release(modules: Iterable[ModuleType]) -> int:
    """Give back what Numba holds of functions that came from disk beside their machine code; how many there were.

    It is their code in LLVM's own form, for functions that call them and are compiled later. There are none: a module's
    functions are compiled when it is imported. It is a fifth of the interpreter's memory.
    """
    released = 0
    for library in (library for module in modules for thing in vars(module).values() for library in _libraries(thing)):
        if getattr(library, "_shared_module", None) is not None:
            library._shared_module = None
            released += 1
    with suppress(OSError, AttributeError):  # where the C library is another one
        ctypes.CDLL(None).malloc_trim(0)
    return released


def _libraries(thing: object) -> list[Any]:
    if isinstance(thing, Dispatcher):
        return [overload.library for overload in thing.overloads.values()]
    return [vars(thing)["_library"]] if isinstance(thing, CFunc) else []


class _Counted(event.Listener):
    """How many functions have been begun."""

    count = 0

    def on_start(self, event: event.Event) -> None:
        self.count += 1

    def on_end(self, event: event.Event) -> None:
        pass


@contextmanager
def compilation_told(out: TextIO) -> Iterator[None]:
    """Meanwhile, say on ``out`` that functions are compiled, if any are: each second on a terminal, else once."""
    counted, ended = _Counted(), threading.Event()
    teller = threading.Thread(target=_tell, args=(counted, ended, out), name="compilation", daemon=True)
    with event.install_listener("numba:compile", counted):
        teller.start()
        try:
            yield
        finally:
            ended.set()
            teller.join()


def _tell(counted: _Counted, ended: threading.Event, out: TextIO) -> None:
    """On a terminal one line is written over; elsewhere there is one before and one after, by the same clock."""
    on_terminal, begun = out.isatty(), 0.0
    while not ended.wait(1.0 if begun else 0.2):
        if counted.count and (on_terminal or not begun):
            begun = begun or time.monotonic()
            so_far = f": {counted.count} functions, {time.monotonic() - begun:.0f} s" if on_terminal else ""
            line = f"compiling host kernels (first run only, about a minute){so_far}"
            print(f"\r{line}" if on_terminal else line, end="" if on_terminal else "\n", file=out, flush=True)
    if begun:
        functions = f"{counted.count} function{'s' * (counted.count != 1)}"
        done = f"compiled the host kernels in {time.monotonic() - begun:.0f} s ({functions}); they are kept on disk"
        print(f"\r{done:<90}" if on_terminal else done, file=out)
