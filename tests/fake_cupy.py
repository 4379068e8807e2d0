"""A stand-in for CuPy: the calls that ``device/cuda.py`` makes, over RAM, threads and the emulated kernels.

Stricter than it has to be: device memory cannot be read or written by NumPy, kernels take scalars of their very type,
pinned memory ends where it was asked to end. ``log`` has (call, thread, detail) of everything that orders or waits.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np

from moe_cupy.device.threads import ThreadStream
from moe_cupy.kernels.cuda import sources
from moe_cupy.kernels.cuda.emulation.library import emulated
from moe_cupy.kernels.cuda.launches import Launch

TOTAL = 1 << 32


class CUDARuntimeError(RuntimeError):
    pass


class CompileException(Exception):
    pass


class Array:
    """cupy.ndarray as far as it is used; ``numpy`` is for the stand-in alone."""

    def __init__(self, shape: Any, dtype: Any = float, memptr: Any = None, *, _numpy: Any = None):
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize if _numpy is None else 0
        self.numpy = memptr.memory[:count].view(dtype).reshape(shape) if _numpy is None else _numpy

    shape = property(lambda self: self.numpy.shape)
    dtype = property(lambda self: self.numpy.dtype)
    size = property(lambda self: self.numpy.size)
    ndim = property(lambda self: self.numpy.ndim)
    nbytes = property(lambda self: self.numpy.nbytes)
    data = property(lambda self: SimpleNamespace(ptr=self.numpy.ctypes.data))

    def __len__(self) -> int:
        return len(self.numpy)

    def __getitem__(self, where: Any) -> Array:
        return self._like(self.numpy[where])

    def reshape(self, *shape: Any) -> Array:
        return self._like(self.numpy.reshape(*shape))

    def view(self, dtype: Any) -> Array:
        return self._like(self.numpy.view(dtype))

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def _like(self, part: np.ndarray) -> Array:
        if not np.shares_memory(part, self.numpy):
            raise AssertionError("a copy where a view was meant")
        return Array((), _numpy=part)


VERSIONS = {13: "13.6.0", 14: "14.2.0"}  # that were looked at; what is used of them differs in ``is_available``


class Cupy:
    """The module. ``pinned_limit`` is how much may be page-locked, ``driver`` its version (0: none)."""

    ndarray = Array

    def __init__(self, pinned_limit: int = 1 << 40, driver: int = 12090, gpu: bool = True, free: int = TOTAL,
                 version: int = 14):  # fmt: skip
        self.log: list[tuple[str, str, Any]] = []
        self.pinned: dict[int, np.ndarray] = {}
        self.limit, self.free = pinned_limit, free
        self.__version__, self._version, self._driver, self._gpu = VERSIONS[version], version, driver, gpu
        self._by_pointer: dict[int, Stream] = {}
        self.current = threading.local()
        self.cuda = SimpleNamespace(
            is_available=self._is_available, alloc=self._alloc, get_elapsed_time=elapsed,
            Device=lambda: SimpleNamespace(compute_capability="120"),
            Stream=self._stream, Event=lambda **options: Event(self, **options),
            compiler=SimpleNamespace(CompileException=CompileException),
            runtime=SimpleNamespace(
                CUDARuntimeError=CUDARuntimeError, driverGetVersion=lambda: driver, hostAllocPortable=1,
                memcpyDefault=4, hostAlloc=self._host_alloc, freeHost=self.pinned.pop, memcpyAsync=self._memcpy,
                memGetInfo=lambda: (self.free, TOTAL),
            ),
        )  # fmt: skip

    def _is_available(self) -> bool:
        """14 catches whatever goes wrong; 13 only that there is no GPU, not that there is no driver."""
        if self._driver == 0 and self._version == 13:
            raise CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime")
        return self._gpu and self._driver > 0

    def note(self, call: str, detail: Any = None) -> None:
        self.log.append((call, threading.current_thread().name, detail))

    def get_default_memory_pool(self) -> Any:
        return SimpleNamespace(free_bytes=lambda: 0)

    def RawModule(self, *, code: str, options: tuple[str, ...], backend: str) -> Any:
        assert backend == "nvrtc" and isinstance(options, tuple)
        return Module(self, code)

    def _alloc(self, nbytes: int) -> Any:
        assert all(s.captured is None for s in self._by_pointer.values()), "memory while a stream is captured"
        if nbytes > self.free:
            raise MemoryError(f"Out of memory allocating {nbytes} bytes")
        self.free -= nbytes
        return SimpleNamespace(memory=np.full(nbytes, 0xFF, np.uint8))

    def _host_alloc(self, nbytes: int, flags: int) -> int:
        if sum(memory.nbytes for memory in self.pinned.values()) + nbytes > self.limit:
            raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")
        room = np.full(nbytes + 8192, 0xFF, np.uint8)
        memory = room[-room.ctypes.data % 4096 :][:nbytes]
        self.pinned[memory.ctypes.data] = memory
        return memory.ctypes.data

    def _memcpy(self, dst: int, src: int, size: int, kind: int, stream: int) -> None:
        assert kind == 4 and size > 0
        assert all(s.captured is None for s in self._by_pointer.values()), "a copy while a stream is captured"
        self.note("copy", (dst, src, size, self._by_pointer[stream].number))
        self._by_pointer[stream].thread.run(lambda: ctypes.memmove(dst, src, size))

    def _stream(self, *, non_blocking: bool) -> Stream:
        assert non_blocking, "such a stream waits for the default stream"
        made = Stream(self)
        self._by_pointer[made.ptr] = made
        return made


class Stream:
    """cupy.cuda.Stream; its work runs on a thread."""

    numbers = itertools.count()

    def __init__(self, cupy: Cupy):
        self._cupy, self.number = cupy, next(self.numbers)
        self.ptr, self.thread = id(self), ThreadStream(f"cuda-{self.number}")
        self.captured: Capture | None = None  # since begin_capture, or since it waits for what is captured

    def __enter__(self) -> Stream:
        self._cupy.current.stream = self
        return self

    def __exit__(self, *error: object) -> None:
        self._cupy.current.stream = None

    def wait_event(self, event: Event) -> None:
        assert event.point is not None or event.capture, "an event that was never recorded orders nothing"
        self._cupy.note("wait", (self.number, event.number))
        if event.capture is not None:
            event.capture.join(event, self)
        elif self.captured is not None:
            raise CUDARuntimeError("cudaErrorStreamCaptureIsolation: an event from outside the graph")
        else:
            self.thread.wait(event.point, "")

    def begin_capture(self) -> None:
        assert self._cupy.current.stream is self
        self.captured = Capture(self)

    def end_capture(self) -> Any:
        assert self.captured is not None and self.captured.first is self
        captured = self.captured.end()
        return SimpleNamespace(launch=lambda stream: captured.replay(self._cupy, stream))

    def synchronize(self) -> None:
        assert self.captured is None, "a stream that is being captured cannot be waited for"
        self._cupy.note("Stream.synchronize", self.number)
        self.thread.record().synchronize()


class Capture:
    """A graph in the making: launches of streams, and which event puts which stream behind which."""

    def __init__(self, first: Stream):
        self.first, self.items, self.streams = first, list[tuple[Stream, Any]](), {first}
        self.unjoined: dict[Stream, int] = {}  # streams that the first is not behind of, and where their last item is

    def launch(self, stream: Stream, launch: Launch) -> None:
        self.items.append((stream, launch))
        self._note(stream)

    def join(self, event: Event, stream: Stream) -> None:
        """``stream`` is behind ``event`` from here on, and part of the graph if it was not."""
        if stream is self.first and self.unjoined.get(event.stream, -1) < event.at:
            self.unjoined.pop(event.stream, None)
        stream.captured = self
        self.streams.add(stream)
        self.items.append((stream, event.stream))
        self._note(stream)

    def end(self) -> Capture:
        for stream in self.streams:
            stream.captured = None
        if self.unjoined:
            raise CUDARuntimeError("cudaErrorStreamCaptureUnjoined")
        return self

    def replay(self, cupy: Cupy, stream: Stream) -> None:
        launches = [what for _, what in self.items if isinstance(what, Launch)]
        cupy.note("graph", (len(launches), stream.number))
        for one, what in self.items:  # an event was recorded at the latest item before: to be behind more is legal
            if isinstance(what, Launch):
                one.thread.run(lambda launch=what: emulated().launch(launch))
            else:
                one.thread.wait(what.thread.record(), "")

    def _note(self, stream: Stream) -> None:
        if stream is not self.first:
            self.unjoined[stream] = len(self.items) - 1


class Event:
    """cupy.cuda.Event."""

    numbers = itertools.count()

    def __init__(self, cupy: Cupy, block: bool = False, disable_timing: bool = False):
        self._cupy, self.point, self.time, self.is_timed = cupy, None, 0.0, not disable_timing
        self.capture: Capture | None = None  # that it was recorded in, on stream, behind so many items
        self.stream: Any = None
        self.at = 0
        self.number = next(self.numbers)

    def record(self, stream: Stream) -> None:
        self._cupy.note("record", (stream.number, self.number))
        if stream.captured is not None:
            self.capture, self.stream, self.at = stream.captured, stream, len(stream.captured.items)
            return
        stream.thread.run(lambda: setattr(self, "time", time.perf_counter()))
        self.point = stream.thread.record()

    @property
    def done(self) -> bool:
        self._ask()
        is_over = self.point.done()
        if is_over:
            self._cupy.note("done", self.number)
        return is_over

    def synchronize(self) -> None:
        self._ask()
        self._cupy.note("Event.synchronize", self.number)
        self.point.synchronize()

    def _ask(self) -> None:
        if self.capture is not None:
            raise CUDARuntimeError("cudaErrorCapturedEvent: operation not permitted on an event last recorded in a "
                                   "capturing stream")  # fmt: skip


def elapsed(before: Event, after: Event) -> float:
    assert before.is_timed and after.is_timed and after.done
    return 1e3 * (after.time - before.time)


class Module:
    """cupy.RawModule of one kernel file; ``#error`` in the text stands for all that NVRTC refuses."""

    def __init__(self, cupy: Cupy, code: str):
        self._cupy, self._code = cupy, code

    def get_function(self, name: str) -> Any:
        if "#error" in self._code:
            raise CompileException("x.cu(1): error: #error\n1 error detected")
        kernel = sources.kernels()[name]
        assert self._code == sources.program(kernel.unit), f"{name} is not in this module"
        return lambda grid, block, args, *, shared_mem=0: self._launch(kernel, grid, block, args, shared_mem)

    def _launch(self, kernel: Any, grid: Any, block: Any, args: Any, shared_bytes: int) -> None:
        stream = self._cupy.current.stream
        given = tuple(plain(kind, value) for (_, kind), value in zip(kernel.parameters, args, strict=True))
        launch = Launch(kernel.name, grid, block[0], given, shared_bytes)
        if stream.captured is not None:
            stream.captured.launch(stream, launch)
            return
        self._cupy.note("launch", (kernel.name, stream.number))
        stream.thread.run(lambda: emulated().launch(launch))


def plain(kind: str, value: Any) -> Any:
    """An argument for the emulation; refuses what a GPU would misread."""
    wanted = {"int": np.int32, "long long": np.int64, "float": np.float32}.get(kind, Array)
    if kind == "pointer" and isinstance(value, np.uint64) and value == 0:
        return None
    assert type(value) is wanted, f"{value!r} for a {kind}"
    return value.numpy if kind == "pointer" else value.item()
