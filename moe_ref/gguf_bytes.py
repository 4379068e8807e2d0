"""The bytes below `gguf.py`: positional reads of a regular file, and the cursor that walks a header within its caps.

No mmap: a file cut short behind our back becomes an error message, not SIGBUS.
"""

from __future__ import annotations

import os
import stat
import threading
from array import array
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np

# Caps that bound the time and memory one header can cost; each is several times what the largest published models use.
MAX_HEADER_BYTES = 64 << 20
MAX_NAME_BYTES = 65_535  # one key or tensor name, as in the GGUF specification
MAX_TEXT_BYTES = 16 << 20  # all keys, tensor names and string values (not arrays) together
MAX_ARRAY_ITEMS = 1 << 22  # of all arrays together
MAX_ARRAY_STRINGS = 1 << 21  # of all string arrays together

U32, U64 = Struct("<I"), Struct("<Q")
_WINDOW_BYTES = 1 << 20
_READ_BYTES = 1 << 30  # per system call: macOS refuses more than 2 GiB
_PREADV: Callable[..., int] | None = getattr(os, "preadv", None)  # absent on Windows
_REMEDY = "the file is damaged or cut short: download or convert it again"


class GGUFError(ValueError):
    """A file that cannot be used: its message gives path, field, what was found, what is accepted and what to do."""


class Cursor:
    """Walks the header; any step past its end, or past a cap, raises GGUFError naming ``field``."""

    def __init__(self, source: Source):
        self.source, self.field, self.pos = source, "magic", 0
        self.limit = min(source.size, MAX_HEADER_BYTES)
        self._text_bytes = self._items = self._strings = self._base = 0
        self._window = memoryview(b"")  # the file's bytes from _base on

    def fault(self, found: object, accepted: object, remedy: str = _REMEDY) -> GGUFError:
        return self.source.fault(self.field, found, accepted, remedy)

    def skip(self, nbytes: int) -> None:
        if nbytes > self.limit - self.pos:
            capped = self.limit < self.source.size
            what = "the cap on a header" if capped else "the end of the file"
            raise self.fault(f"{nbytes} bytes at byte {self.pos}", f"at most {self.limit - self.pos} before {what}")
        self.pos += nbytes

    def take(self, nbytes: int) -> memoryview:
        at = self._ahead(nbytes)
        self.pos += nbytes
        return self._window[at : at + nbytes]

    def unpack(self, layout: Struct) -> tuple[Any, ...]:
        at = self._ahead(layout.size)
        self.pos += layout.size
        return layout.unpack_from(self._window, at)

    def name(self) -> str:
        name = self.text(MAX_NAME_BYTES)
        if not name:
            raise self.fault("an empty name", "at least one character")
        return name

    def text(self, cap: int) -> str:
        nbytes = self.unpack(U64)[0]
        cap = min(cap, MAX_TEXT_BYTES - self._text_bytes)
        if nbytes > cap:
            raise self.fault(f"a string of {nbytes} bytes", f"at most {cap}")
        self._text_bytes += nbytes
        try:
            return str(self.take(nbytes), "utf-8")
        except UnicodeDecodeError as error:
            raise self.fault(f"a string with {error}", "UTF-8") from error

    def count_items(self, count: int, strings: bool) -> None:
        self._items += count
        self._strings += count * strings
        if self._items > MAX_ARRAY_ITEMS or self._strings > MAX_ARRAY_STRINGS:
            cap = f"{MAX_ARRAY_ITEMS} elements, {MAX_ARRAY_STRINGS} strings, over all arrays of a header"
            raise self.fault(f"an array of {count} elements", f"at most {cap}")

    def skip_strings(self, count: int) -> array[int]:
        """Pass an array of strings; returns where each one's length lies in it, and where it ends."""
        key, start, marks = self.field, self.pos, array("q")
        while len(marks) < count:
            self.field = f"{key}[{len(marks)}]"
            self._ahead(8)
            self._scan(marks, count, start)
            length = self.pos - start - marks[-1] - 8  # of the last string: the only one that can reach past the window
            self.field, self.pos = f"{key}[{len(marks) - 1}]", self.pos - length
            self.skip(length)
        self.field = key
        marks.append(self.pos - start)
        return marks

    def _scan(self, marks: array[int], count: int, start: int) -> None:
        """Follow lengths to the end of the window: the one loop that runs once per token of a vocabulary."""
        window, at, last = self._window, self.pos - self._base, len(self._window) - 8
        length_at, mark, shift = U64.unpack_from, marks.append, self._base - start
        for _ in range(count - len(marks)):
            if at > last:
                break
            mark(at + shift)
            at += 8 + length_at(window, at)[0]
        self.pos = self._base + at

    def _ahead(self, nbytes: int) -> int:
        """Where in the window the next ``nbytes`` begin, refilling it if they are not all there."""
        at = self.pos - self._base
        if at + nbytes > len(self._window):
            self.skip(nbytes)
            self.pos -= nbytes
            wanted = max(nbytes, min(_WINDOW_BYTES, self.limit - self.pos))
            self._window, self._base, at = self.source.read(self.pos, wanted, self.field).data, self.pos, 0
        return at


class Source:
    """A regular file read at given places; whatever the system answers becomes GGUFError naming ``field``."""

    def __init__(self, path: str | os.PathLike[str]):
        try:
            self.path = Path(os.fsdecode(path))
            self.file = FileIO(self.path, opener=_open_without_waiting)
            status = os.fstat(self.file.fileno())
        except (OSError, ValueError, TypeError) as error:
            found = getattr(error, "strerror", None) or error
            raise GGUFError(f"{path}: cannot be opened as a GGUF file: {found}; check the path") from error
        self.size, self._lock = status.st_size, threading.Lock()
        if not stat.S_ISREG(status.st_mode):
            self.file.close()
            raise _fault(path, "file", "a pipe, socket or device", "a regular file", "copy it to a file first")

    def fault(self, field: str, found: object, accepted: object, remedy: str = _REMEDY) -> GGUFError:
        return _fault(self.path, field, found, accepted, remedy)

    def read(self, offset: int, nbytes: int, field: str) -> np.ndarray:
        """A new uint8 array of exactly ``nbytes``."""
        try:
            out = np.empty(nbytes, np.uint8)
            view, done = out.data, 0
            while done < nbytes and (got := self._read_some(view[done : done + _READ_BYTES], offset + done)):
                done += got
        except (OSError, ValueError, MemoryError) as error:
            found = "the file closed" if self.file.closed else f"{type(error).__name__}: {error}"
            raise self.fault(field, found, "an open, readable file", "read before close() or check the disk") from error
        if done < nbytes:
            raise self.fault(field, f"the file ending at byte {offset + done}", f"{nbytes} bytes from byte {offset}")
        return out

    def _read_some(self, view: memoryview, offset: int) -> int:
        if _PREADV:
            return _PREADV(self.file.fileno(), [view], offset)
        with self._lock:
            self.file.seek(offset)
            return self.file.readinto(view) or 0


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # else opening a pipe waits for its writer


def _fault(path: object, field: str, found: object, accepted: object, remedy: str = _REMEDY) -> GGUFError:
    return GGUFError(f"{path}: {field}: found {found}; accepted: {accepted}; {remedy}")


def show(name: str) -> str:
    return name if name.isprintable() and len(name) <= 100 else repr(name[:100])
