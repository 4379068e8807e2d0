"""What this machine has, measured rather than read off a data sheet where that is possible."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moe_cupy.device import missing_for_cuda
from moe_cupy.device.host import usable_cores
from moe_cupy.device.memory import free_and_total
from moe_cupy.kernels.host.simd.isa import VARIABLE, chosen, usable
from moe_cupy.store import RangeFile
from moe_ref.interrupts import undoing

MIB = 1 << 20


def cpu_name() -> str:
    """The processor's name, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_features() -> str:
    """The vector extensions that matter to kernels, of those present."""
    from llvmlite.binding import get_host_cpu_features

    features = get_host_cpu_features()
    wanted = ("avx2", "fma", "f16c", "avx512f", "avx512vnni", "avx512vbmi", "neon", "dotprod")
    return ", ".join(name for name in wanted if features.get(name)) or "none of interest"


def memory_gbps(size: int = 256 * MIB) -> float:
    """Bandwidth of a plain copy, bytes read plus bytes written, best of five, one thread."""
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    best = min(_seconds(lambda: np.copyto(target, source)) for _ in range(5))
    return 2 * size / best / 1e9


def disk_gbps(folder: str, size: int = 64 * MIB, piece: int = MIB) -> tuple[float, str]:
    """Rate of 1 MiB reads, one at a time, from a scratch file in ``folder``, and how they were read."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".moe-doctor-") as scratch, undoing(scratch.close):
        scratch.write(os.urandom(MIB) * (size // MIB))
        scratch.flush()
        os.fsync(scratch.fileno())
        file = RangeFile(scratch.name)
        room = np.empty(file.room(piece) + 4096, np.uint8)
        room = room[-room.ctypes.data % 4096 :]
        seconds = _seconds(lambda: [file.read_into(room, at, piece) for at in range(0, size, piece)])
        file.close()
    return size / seconds / 1e9, file.how


def _seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def pin_limit() -> str:
    """How much memory a process may lock, which bounds pinned memory on some systems."""
    try:
        import resource
    except ImportError:
        return "not known on this system"
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit / MIB:.0f} MiB (ulimit -l)"


def facts(folder: str) -> Iterator[tuple[str, str]]:
    """(name, finding) pairs, each measured when asked for."""
    yield "system", f"{platform.platform()}, Python {platform.python_version()}"
    packages = ("numpy", "numba", "llvmlite", "tokenizers")
    yield "packages", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    yield "processor", f"{cpu_name()}, {usable_cores()} cores; {cpu_features()}"
    yield "instructions", f"{chosen().name}, of {', '.join(usable())}; {VARIABLE}=NAME in the environment forces one"
    free, total = (n / 2**30 for n in free_and_total())
    yield "memory", f"{total:.1f} GiB, {free:.1f} free; one-thread copy {memory_gbps():.1f} GB/s (read + write)"
    rate, how = disk_gbps(folder)
    yield "disk", f"{rate:.2f} GB/s in 1 MiB reads one at a time, {how} ({Path(folder).resolve()})"
    yield "pinned memory", f"limit {pin_limit()}"
    yield from facts_of_gpu()


def has_gpu() -> bool:
    """Whether CuPy is here and finds a GPU."""
    return not missing_for_cuda()


def facts_of_gpu() -> Iterator[tuple[str, str]]:
    """Name, memory, driver and bus of the first GPU, and CuPy's version; what is missing where there is none."""
    if not has_gpu():
        yield "GPU", missing_for_cuda()
        return
    import cupy

    runtime = cupy.cuda.runtime
    about = runtime.getDeviceProperties(0)
    sizes = f"{about['totalGlobalMem'] / 2**30:.1f} GiB, L2 {about['l2CacheSize'] / MIB:.0f} MiB"
    yield "GPU", f"{about['name'].decode()}, compute {about['major']}.{about['minor']}, {sizes}"
    driver, used = (f"{v // 1000}.{v % 1000 // 10}" for v in (runtime.driverGetVersion(), runtime.runtimeGetVersion()))
    yield "CUDA", f"driver for {driver}, runtime {used}, CuPy {cupy.__version__}"
    yield "PCIe", pcie_link(runtime.deviceGetPCIBusId(0))


def pcie_link(bus: str, devices: Path = Path("/sys/bus/pci/devices")) -> str:
    """Speed and width of a device's link, now (idle GPUs slow it down) and at most."""
    folder = devices / bus.lower()
    try:
        now, most = (
            f"{(folder / f'{kind}_link_speed').read_text().split(' PCIe')[0].strip()} x"
            f"{(folder / f'{kind}_link_width').read_text().strip()}"
            for kind in ("current", "max")
        )
    except OSError:
        return f"{bus}; this system does not say how fast its link is"
    return f"{bus}, now {now}, at most {most}"
