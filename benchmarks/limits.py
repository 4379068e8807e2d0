"""What a measurement needs of Linux: a memory limit, an empty page cache, a disk with a read-ahead of one's choice."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
SECTOR = 512


class MemoryGroup:
    """A control group with a limit for what is run in it; version 2 or 1, whichever this system has. Needs root."""

    def __init__(self, nbytes: int):
        self.v1 = (CGROUP / "memory" / "memory.limit_in_bytes").exists()
        self.path = (CGROUP / "memory" if self.v1 else CGROUP) / f"moe-bench-{os.getpid()}"
        try:
            self.path.mkdir()
            self._write("memory.limit_in_bytes" if self.v1 else "memory.max", nbytes)
            if not self.v1 and (self.path / "memory.swap.max").exists():
                self._write("memory.swap.max", 0)
        except OSError as error:
            self.close()
            raise SystemExit(
                f"no memory limit can be set here ({error}): run this as root, or in a group of the size wanted "
                f"(systemd-run --user --scope -p MemoryMax=… python benchmarks/vs_llama_cpp.py …)"
            ) from error

    def enter(self) -> None:
        """Called in a child before it becomes the program that is measured."""
        self._write("cgroup.procs", os.getpid())

    def begin(self) -> None:
        """Forget the peak, and the pages that an earlier run left."""
        with contextlib.suppress(OSError):
            self._write("memory.force_empty" if self.v1 else "memory.reclaim", 0 if self.v1 else 1 << 40)
        with contextlib.suppress(OSError):
            self._write("memory.max_usage_in_bytes" if self.v1 else "memory.peak", 0)

    def peak(self) -> int:
        """Most bytes at a time since ``begin``, page cache included."""
        return int((self.path / ("memory.max_usage_in_bytes" if self.v1 else "memory.peak")).read_text())

    def close(self) -> None:
        """Remove the group, if it is there."""
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def _write(self, name: str, value: int) -> None:
        (self.path / name).write_text(str(value))


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended: its exit code (negative: the signal), what it printed, and the kernel's peak of its RSS."""

    code: int
    out: str
    err: str
    peak_rss: int


def run(command: Sequence[object], group: MemoryGroup | None, env: dict[str, str], timeout: float) -> Outcome:
    """Run ``command`` to its end, in ``group`` if given; killed after ``timeout`` seconds."""
    with tempfile.TemporaryFile() as err:
        child = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=err, env=os.environ | env,
            preexec_fn=group.enter if group else None,
        )  # fmt: skip
        timer = threading.Timer(timeout, child.kill)
        timer.start()
        assert child.stdout is not None
        out = child.stdout.read().decode()
        _, status, usage = os.wait4(child.pid, 0)
        timer.cancel()
        child.returncode = os.waitstatus_to_exitcode(status)
        err.seek(0)
        return Outcome(child.returncode, out, err.read().decode(errors="replace"), 1024 * usage.ru_maxrss)


def drop_page_cache(*paths: Path) -> None:
    """Of the whole system where that is allowed, otherwise of these files."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        for path in paths:
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_ahead_bytes(path: Path) -> int:
    """What the kernel reads ahead on the disk that holds ``path``; 0 if it does not say."""
    device = os.stat(path).st_dev
    setting = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/read_ahead_kb")
    partition = setting.parent.parent.parent / "queue" / "read_ahead_kb"
    found = next((p for p in (setting, partition) if p.exists()), None)
    return 1024 * int(found.read_text()) if found else 0


@contextlib.contextmanager
def on_disk_with_read_ahead(model: Path, nbytes: int) -> Iterator[Path]:
    """A copy of ``model`` on an ext4 image behind a loop device with direct I/O and this read-ahead. Needs root."""
    with tempfile.TemporaryDirectory(dir=model.parent, prefix=".loop-") as folder:
        image, mount = Path(folder, "image"), Path(folder, "mount")
        mount.mkdir()
        with open(image, "wb") as file:
            file.truncate(int(model.stat().st_size * 1.03) + (64 << 20))
        _call("mkfs.ext4", "-q", "-O", "^has_journal", "-m", "0", image)
        device = _call("losetup", "--direct-io=on", "--find", "--show", image)
        try:
            _call("blockdev", "--setra", nbytes // SECTOR, device)
            _call("mount", device, mount)
            try:
                yield Path(shutil.copy(model, mount))
            finally:
                _call("umount", mount)
        finally:
            _call("losetup", "--detach", device)


def _call(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
    return done.stdout.strip()
