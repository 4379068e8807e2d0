"""The CUDA device: memory, streams, events and compiling by CuPy; ops are the launches that the emulated device runs.

No method but ``upload``, ``synchronize``, ``recover`` and ``close`` waits for the GPU. CuPy compiles each kernel file
at its first launch for the GPU at hand and keeps the result on disk (CUPY_CACHE_DIR, by default ~/.cupy/kernel_cache).
"""

from __future__ import annotations

import ctypes
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from moe_cupy.device.base import DeviceError
from moe_cupy.device.discrete import ARENA, DiscreteDevice, as_bytes
from moe_cupy.device.threads import ThreadQueue
from moe_cupy.kernels.cuda import sources
from moe_cupy.kernels.cuda.launches import Launch
from moe_cupy.kernels.first_use import first_use

SCALARS: dict[str, Callable[[Any], Any]] = {"int": np.int32, "long long": np.int64, "float": np.float32}
NULL = np.uint64(0)
OPTIONS = ("--std=c++17",)


def missing(cupy: Any) -> str:
    """What stands between an imported CuPy and a GPU, or nothing."""
    with suppress(cupy.cuda.runtime.CUDARuntimeError):  # of CuPy 13, where there is no driver
        if cupy.cuda.is_available():
            return ""
    version = cupy.cuda.runtime.driverGetVersion()
    if version == 0:
        return f"CuPy {cupy.__version__} is here, but there is no NVIDIA driver on this machine: install one"
    driver = f"{version // 1000}.{version % 1000 // 10}"
    return f"CuPy {cupy.__version__} and a driver for CUDA {driver} are here, but no GPU"


class CudaEvent:
    """A point in a CUDA stream."""

    __slots__ = ("raw",)
    error = None  # a failed kernel shows where it is waited for

    def __init__(self, raw: Any):
        self.raw = raw

    def done(self) -> bool:
        return bool(self.raw.done)

    def synchronize(self) -> None:
        self.raw.synchronize()


class CudaStream:
    """A stream that does not wait for the default one; the time it waits for events is measured on the GPU."""

    def __init__(self, cupy: Any, name: str):
        self.name, self.raw, self._cuda = name, cupy.cuda.Stream(non_blocking=True), cupy.cuda
        self._waits: deque[tuple[str, Any, Any]] = deque()  # reason, and events before and after
        self._stalled: Counter[str] = Counter()

    def record(self) -> CudaEvent:
        event = self._cuda.Event(disable_timing=True)
        event.record(self.raw)
        return CudaEvent(event)

    def wait(self, event: CudaEvent, reason: str) -> None:
        if event.done():
            return
        before, after = self._cuda.Event(), self._cuda.Event()
        before.record(self.raw)
        self.raw.wait_event(event.raw)
        after.record(self.raw)
        self._waits.append((reason, before, after))

    def stalls(self) -> Counter[str]:
        """Seconds waited so far, by reason; what is not over yet is not counted."""
        while self._waits and self._waits[0][2].done:
            reason, before, after = self._waits.popleft()
            self._stalled[reason] += self._cuda.get_elapsed_time(before, after) / 1e3
        return self._stalled


class CudaDevice(DiscreteDevice):
    """One GPU, the current one of CuPy, which is given so that tests can give another. Raises DeviceError."""

    name = "cuda"

    def __init__(self, cupy: Any, act: str = "f32"):
        if reason := missing(cupy):
            raise DeviceError(f"--device cuda: {reason}; or use --device host")
        super().__init__(act)
        self.cupy, self._runtime = cupy, cupy.cuda.runtime
        digits = cupy.cuda.Device().compute_capability  # "75", "120"
        self.capability = int(digits[:-1]), int(digits[-1])
        self.pinned_bytes = 0  # page-locked so far
        self._pinned: list[int] = []
        self._streams: dict[str, CudaStream] = {}
        self._queues: list[ThreadQueue] = []
        self._modules: dict[sources.Unit, Any] = {}
        self._kernels: dict[str, tuple[Any, list[str]]] = {}
        self._arena = self.pinned(ARENA)

    def alloc(self, nbytes: int) -> Any:
        try:
            pointer = self.cupy.cuda.alloc(max(1, nbytes))
        except MemoryError as error:  # CuPy's OutOfMemoryError is one
            free, total = self.memory()
            raise MemoryError(
                f"{nbytes} bytes do not fit into GPU memory: {free} of {total} are free; lower --cache, -c or -ub"
            ) from error
        return self.cupy.ndarray((nbytes,), np.uint8, pointer)

    def pinned(self, nbytes: int) -> np.ndarray:
        """Exactly as much as asked for: CuPy's own pool would round up to a power of two."""
        try:
            address = self._runtime.hostAlloc(max(1, nbytes), self._runtime.hostAllocPortable)
        except self._runtime.CUDARuntimeError as error:
            raise MemoryError(
                f"{nbytes} bytes more could not be page-locked after {self.pinned_bytes} ({error})"
            ) from error
        self._pinned.append(address)
        self.pinned_bytes += nbytes
        raw: Any = (ctypes.c_uint8 * max(1, nbytes)).from_address(address)
        return np.frombuffer(raw, np.uint8)[:nbytes]

    def stream(self, name: str) -> Any:
        if name not in self._streams:
            self._streams[name] = CudaStream(self.cupy, name)
        return self._streams[name]

    def workers(self, name: str, count: int) -> ThreadQueue:
        self._queues.append(ThreadQueue(name, count))
        return self._queues[-1]

    def copy_async(self, dst: Any, src: Any, stream: Any) -> None:
        to, of = self.address(dst), self.address(src)
        self._runtime.memcpyAsync(to, of, dst.nbytes, self._runtime.memcpyDefault, stream.raw.ptr)

    def upload(self, host: np.ndarray) -> Any:
        """Loading copies from pageable memory, so it waits until the bytes are there."""
        raw, stream = as_bytes(np.ascontiguousarray(host)), self.stream("load")
        memory = self.alloc(raw.nbytes)
        self.copy_async(memory, raw, stream)
        stream.raw.synchronize()
        return memory

    def address(self, array: Any) -> int:
        return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)

    def run(self, launch: Launch, stream: Any) -> None:
        kernel, kinds = self._kernels.get(launch.kernel) or self._first_used(launch.kernel)
        args = tuple(map(_argument, kinds, launch.args))
        with stream.raw:
            kernel(launch.grid, (launch.block, 1, 1), args, shared_mem=launch.shared_bytes)

    @contextmanager
    def capture(self, stream: Any) -> Iterator[SimpleNamespace]:
        graph = SimpleNamespace(raw=None)
        with stream.raw:
            stream.raw.begin_capture()
            try:
                yield graph
            finally:
                graph.raw = stream.raw.end_capture()

    def order(self, before: Any, after: Any) -> None:
        event = self.cupy.cuda.Event(disable_timing=True)
        event.record(before.raw)
        after.raw.wait_event(event)

    def replay(self, graph: Any, stream: Any) -> None:
        graph.raw.launch(stream.raw)

    def memory(self) -> tuple[int, int]:
        free, total = self._runtime.memGetInfo()
        return free + self.cupy.get_default_memory_pool().free_bytes(), total

    def stalls(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        for stream in self._streams.values():
            total.update(stream.stalls())
        return dict(total)

    def synchronize(self) -> None:
        for workers in self._queues:
            workers.drain()
        for stream in self._streams.values():
            stream.raw.synchronize()

    def recover(self) -> None:
        for workers in self._queues:
            workers.drain()
        for stream in self._streams.values():
            self._settle(stream)

    def close(self) -> None:
        for workers in self._queues:
            workers.close()
        for stream in self._streams.values():
            self._settle(stream)
        for address in self._pinned:
            self._runtime.freeHost(address)
        for held in (self._queues, self._streams, self._pinned, self._modules, self._kernels):
            held.clear()

    def _settle(self, stream: CudaStream) -> None:
        """Wait until a stream is idle, whether what it did went well or not."""
        with suppress(self._runtime.CUDARuntimeError):  # whoever waited for the work was told
            stream.raw.synchronize()

    def _first_used(self, name: str) -> tuple[Any, list[str]]:
        with first_use():
            return self._compiled(name)

    def _compiled(self, name: str) -> tuple[Any, list[str]]:
        """A kernel and the kinds of its parameters; compiles its file for this GPU. Raises DeviceError."""
        kernel = sources.kernels()[name]
        if kernel.unit not in self._modules:
            make = partial(self.cupy.RawModule, options=OPTIONS, backend="nvrtc")
            self._modules[kernel.unit] = make(code=sources.program(kernel.unit))
        try:
            function = self._modules[kernel.unit].get_function(name)
        except self.cupy.cuda.compiler.CompileException as error:
            lines = str(error).strip().splitlines()
            raise DeviceError(f"{name}: NVRTC refused {kernel.unit.stem}.cu: {' '.join(lines[:3])}") from error
        self._kernels[name] = function, [kind for _, kind in kernel.parameters]
        return self._kernels[name]


def _argument(kind: str, value: Any) -> Any:
    """As CuPy passes it: a Python int would be taken for a long long, a float for a double."""
    if kind == "pointer":
        return NULL if value is None else value
    return SCALARS[kind](value)
