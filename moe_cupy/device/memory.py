"""How much memory this process may still take: the machine's, or less where a control group says so."""

from __future__ import annotations

import os
import sys
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def free_and_total() -> tuple[int, int]:
    """(free, total) bytes of RAM; free counts what the system would give up at once, such as file cache."""
    if sys.platform == "win32":
        return _windows()
    free, total = _meminfo() or _sysconf()
    group_free, group_limit = _control_group()
    return min(free, group_free), min(total, group_limit)


def _meminfo() -> tuple[int, int] | None:
    """MemAvailable and MemTotal of Linux."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = {name: int(rest.split()[0]) for name, rest in (line.split(":", 1) for line in lines if ":" in line)}
        return 1024 * kib["MemAvailable"], 1024 * kib["MemTotal"]
    except (OSError, KeyError, ValueError, IndexError):
        return None


def _sysconf() -> tuple[int, int]:
    """POSIX; where free pages are not told (macOS), half of all is taken to be free."""
    page, total = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    try:
        free = os.sysconf("SC_AVPHYS_PAGES")
    except ValueError:
        free = total // 2
    return page * free, page * total


def _control_group() -> tuple[int, int]:
    """What the control group at the root of this process's view leaves, versions 2 and 1; huge if unlimited."""
    for limit_name, used_name in LIMITS:
        try:
            limit, used = (int((CGROUP / name).read_text()) for name in (limit_name, used_name))
        except (OSError, ValueError):  # not there, or "max"
            continue
        return max(0, limit - used), limit
    return sys.maxsize, sys.maxsize


def _windows() -> tuple[int, int]:
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong) for name in "total free page page_free virtual virtual_free extended".split()
        ]

    status = Status(length=ctypes.sizeof(Status))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return status.free, status.total
