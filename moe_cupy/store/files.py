"""Reading byte ranges of a file into aligned memory, past the page cache where the system allows it."""

from __future__ import annotations

import mmap
import os
import threading
import zlib
from pathlib import Path

import numpy as np

ALIGNMENTS = (512, 4096)  # of offset, length and memory, as O_DIRECT may ask; tried in this order
PAGE = 4096
SAMPLES = 16  # pages of a file that tell it from another


class StoreError(OSError):
    """Expert bytes could not be read: names the file, the range and the reason."""


def align_down(n: int, to: int) -> int:
    """The largest multiple of ``to`` that is at most n."""
    return n // to * to


def align_up(n: int, to: int) -> int:
    """The smallest multiple of ``to`` that is at least n."""
    return -(-n // to) * to


class RangeFile:
    """Positioned reads of one file, thread-safe. ``direct`` asks for O_DIRECT; ``how`` says what was got.

    ``alignment`` is 1 for buffered reads, otherwise what offset, length and memory must be multiples of.
    """

    def __init__(self, path: str | os.PathLike, direct: bool = True):
        self.path = Path(path)
        self.alignment, self.how = 1, "buffered reads"
        self._lock = threading.Lock()
        self._fd = self._open(os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self.size = os.fstat(self._fd).st_size
        if direct:
            self._try_direct()
        self._written, self._samples = os.fstat(self._fd).st_mtime_ns, self._sampled()

    def read_into(self, memory: np.ndarray, offset: int, nbytes: int) -> int:
        """Read file bytes offset..offset+nbytes into ``memory``; returns where in memory they begin.

        ``memory`` is uint8, aligned, with room for the aligned range around the wanted one. Raises
        StoreError on an I/O error, where the file ends early and where it was written to since it was opened.
        """
        start = align_down(offset, self.alignment)
        skip = offset - start
        view = memoryview(memory.data)[: align_up(skip + nbytes, self.alignment)]
        done = 0
        while done < skip + nbytes:
            got = done + self._read(view[done:], start + done)
            before, done = done, got if got >= skip + nbytes else align_down(got, self.alignment)
            if done == before:  # nothing, or less than one aligned piece: this is the end of the file
                raise StoreError(
                    f"{self.path}: ends at byte {os.fstat(self._fd).st_size}, but bytes {offset}..{offset + nbytes} "
                    f"were expected; was it truncated or replaced while open?"
                )
        if os.fstat(self._fd).st_mtime_ns != self._written:
            self._check_is_same()
        return skip

    def room(self, nbytes: int) -> int:
        """Memory that ``read_into`` needs for any range of ``nbytes``."""
        return align_up(nbytes, 64) if self.alignment == 1 else align_up(nbytes, self.alignment) + self.alignment

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _check_is_same(self) -> None:
        """Raise StoreError unless what was written to the file since it was opened is what was there before."""
        now = os.fstat(self._fd)
        if now.st_size != self.size:
            found = f"ends at byte {now.st_size}, at {self.size} when it was opened"
            raise StoreError(f"{self.path}: {found}; was it truncated or replaced while open?")
        if self._sampled() != self._samples:
            raise StoreError(f"{self.path}: another file was written over it since it was opened; open the model again")
        self._written = now.st_mtime_ns

    def _sampled(self) -> int:
        """A checksum of pages from all over the file."""
        check = zlib.crc32(str(self.size).encode())
        with mmap.mmap(-1, PAGE) as memory, memoryview(memory) as page:
            for i in range(SAMPLES):
                got = self._read(page, align_down(i * self.size // SAMPLES, PAGE))
                check = zlib.crc32(page[:got], check)
        return check

    def _read(self, view: memoryview, offset: int) -> int:
        try:
            if hasattr(os, "preadv"):
                return os.preadv(self._fd, [view], offset)
            with self._lock:
                os.lseek(self._fd, offset, os.SEEK_SET)
                data = os.read(self._fd, len(view))
            view[: len(data)] = data
            return len(data)
        except OSError as error:
            raise StoreError(
                f"{self.path}: reading {len(view)} bytes at {offset} failed: {error.strerror or error}"
            ) from error

    def _open(self, flags: int) -> int:
        try:
            return os.open(self.path, flags)
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be opened: {error.strerror or error}") from error

    def _try_direct(self) -> None:
        """Switch to O_DIRECT with the finest alignment that works; otherwise stay buffered and say why."""
        flag = getattr(os, "O_DIRECT", 0)
        if not flag or not hasattr(os, "preadv"):
            self.how = "buffered reads (this system has no O_DIRECT)"
            return
        try:
            fd = os.open(self.path, os.O_RDONLY | flag)
        except OSError as error:
            self.how = f"buffered reads (the filesystem refuses O_DIRECT: {error.strerror})"
            return
        alignment = next((a for a in ALIGNMENTS if _direct_read_works(fd, a)), 0)
        if not alignment:
            os.close(fd)
            self.how = "buffered reads (O_DIRECT reads fail on this filesystem)"
            return
        os.close(self._fd)
        self._fd, self.alignment, self.how = fd, alignment, f"O_DIRECT, aligned to {alignment} bytes"


def _direct_read_works(fd: int, alignment: int) -> bool:
    """Whether a read with offset, length and memory aligned to no more than ``alignment`` succeeds."""
    with mmap.mmap(-1, 2 * PAGE) as memory, memoryview(memory) as view, view[alignment : 2 * alignment] as part:
        try:
            return os.preadv(fd, [part], alignment) >= 0
        except OSError:
            return False
