"""How much memory this process may still take: the machine's, or less where a control group says so."""

from __future__ import annotations

import os
import sys
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
# Version -> where its groups are mounted, and the files of a group: limit, use, and the line of memory.stat that says
# how much of the use is file cache that goes at once.
VERSIONS = {
    2: ("", "memory.max", "memory.current", "inactive_file"),
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


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
    """What this process's control group and those above it leave, versions 2 and 1; huge if unlimited."""
    rooms = [(sys.maxsize, sys.maxsize)]
    for version, group in _memberships():
        mount, *files = VERSIONS[version]
        top = CGROUP / mount
        path = top / group.strip("/")
        rooms += [_room(folder, *files) for folder in (path, *path.parents) if folder.is_relative_to(top)]
    return min(free for free, _ in rooms), min(limit for _, limit in rooms)


def _memberships() -> list[tuple[int, str]]:
    """(version, path) of this process's groups that count memory; the top of each hierarchy where that is not told."""
    found = {2: "/", 1: "/"}
    try:
        for line in MEMBERSHIP.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" or "memory" in controllers.split(","):
                found[2 if number == "0" else 1] = path
    except (OSError, ValueError):
        pass
    return list(found.items())


def _room(folder: Path, limit_file: str, used_file: str, cached_line: str) -> tuple[int, int]:
    """(free, limit) of one group; huge where it has no limit or cannot be read."""
    try:
        limit, used = (int((folder / name).read_text()) for name in (limit_file, used_file))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(stat.get(cached_line, 0))), limit
    except (OSError, ValueError):  # not there, or "max"
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
