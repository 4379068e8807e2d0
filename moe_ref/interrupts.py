"""Ctrl-C in a command line: the process ends at once with exit code 130, whatever it is doing.

Python's own answer, a KeyboardInterrupt wherever the interpreter happens to be, is lost in a callback of LLVM or in a
destructor, and may become another error in an import. No command needs it: files appear whole or not at all, and what
else must not stay behind (a temporary file, a running compiler) says here how it is undone.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

TYPE_CHECKING = False  # as in typing, which takes as long to import as all of the above
if TYPE_CHECKING:
    from typing import Any, NoReturn

EXIT_CODE = 130  # 128 + SIGINT, as shells have it
_undo: list[Callable[[], Any]] = []
_ending = threading.Lock()
_signals = 0  # heard so far


def run(main: Callable[[], int]) -> NoReturn:
    """A command line from ``main`` to the end of the process, under ``watch``."""
    try:
        code = main()
    except SystemExit as ended:  # argparse's, after --help or a mistake
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    if _signals:
        _end()
    os._exit(code)  # the interpreter's own end would meet a Ctrl-C with a traceback


def watch() -> None:
    """End this process on Ctrl-C from now on; not where its caller ignores it, as ``nohup`` and ``command &`` do.

    A thread hears of the signal: it runs while the main thread is in code that is not Python's.
    """
    open_standard_streams()
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    signal.signal(signal.SIGINT, lambda *_: _exit())
    if os.name != "posix":
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_listen, args=(reader,), name="interrupts", daemon=True).start()
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _heard)
    os.register_at_fork(after_in_child=_leave_alone)


def open_standard_streams() -> None:
    """Whatever of stdin, stdout and stderr the caller has closed becomes the null device.

    Otherwise the next file that is opened would get its number, and what is written to stderr.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def undo(action: Callable[[], Any]) -> None:
    """Have Ctrl-C call ``action`` before the process ends, in the order of these calls; it must not take long."""
    _undo.append(action)


@contextmanager
def undoing(action: Callable[[], Any]) -> Iterator[None]:
    """As ``undo``, while this is open."""
    undo(action)
    try:
        yield
    finally:
        _undo.remove(action)


def _listen(reader: int) -> None:
    os.read(reader, 1)
    _end()


def _heard(*_: object) -> None:
    """On the main thread; the first is for ``_listen``, a second does not wait for what is being undone."""
    global _signals
    _signals += 1
    if _signals > 1:
        _exit()


def _end() -> NoReturn:
    with _ending:  # never released: whoever comes later waits here for the end
        for action in tuple(_undo):
            with suppress(Exception):
                action()
        _exit()


def _exit(message: bytes = b"\ninterrupted\n") -> NoReturn:
    with suppress(OSError):
        os.write(2, message)
    os._exit(EXIT_CODE)


def _leave_alone() -> None:
    """In a forked child: it has no listener, and what is undone is its parent's."""
    _undo.clear()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, lambda *_: _exit(b""))
