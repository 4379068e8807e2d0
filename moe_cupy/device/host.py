"""The host device: RAM is device memory, Numba kernels are its ops, worker threads its streams."""

from __future__ import annotations

import mmap
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from moe_cupy.device.crew import Crew
from moe_cupy.device.memory import free_and_total
from moe_cupy.device.threads import InlineStream, ThreadQueue, ThreadStream
from moe_cupy.device.unified import Unified
from moe_cupy.kernels.host import bound, products
from moe_cupy.kernels.host.bound_experts import BoundExperts
from moe_cupy.kernels.host.experts import MATRICES
from moe_cupy.kernels.host.matmul import SUPPORTED
from moe_cupy.kernels.host.simd.isa import chosen
from moe_cupy.kernels.host.token import BoundToken, as_steps
from moe_cupy.kernels.table import OPS

SPLIT_WORK = 1 << 20  # multiply-adds below which a second thread costs more than it brings (about 100 us)
HUGE_PAGE = 2 << 20  # bytes; of memory read from end to end, fewer addresses need to be looked up
ARENA = 64 << 20  # bytes taken at a time for what is loaded, so that small tensors share large pages too
MOST_THREADS = 4  # a core; more take minutes to hand over to one another
CALL_WORK = 1 << 28  # multiply-adds in one call at most (about 0.1 s), so that an interrupt is heard in between


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class RowSplitter:
    """Splits a kernel's range of rows over threads. Kernels release the interpreter lock."""

    def __init__(self, threads: int, act: str = "f32"):
        self.threads, self.crew = threads, Crew(threads, act)
        self._pool = ThreadPoolExecutor(threads - 1, "kernel") if threads > 1 else None

    @property
    def cancelled(self) -> bool:
        """While set, what is left of a range is skipped: its result will not be used."""
        return self.crew.cancelled

    @cancelled.setter
    def cancelled(self, value: bool) -> None:
        self.crew.cancelled = value

    def __call__(self, kernel: Callable[..., None], rows: int, work_per_row: int, *args: Any) -> None:
        """kernel(*args, first, last) over 0..rows, in one piece if the work is small. Raises DeviceError in a fork."""
        self.crew.check_process()

        def piece(first: int, last: int) -> None:
            while first < last and not self.cancelled:
                until = min(last, first + step)
                kernel(*args, first, until)
                first = until

        step = max(1, CALL_WORK // max(1, work_per_row))
        pieces = min(self.threads, rows * work_per_row // SPLIT_WORK + 1, rows)
        if self._pool is None or pieces <= 1:
            piece(0, rows)
            return
        cuts = [rows * i // pieces for i in range(pieces + 1)]
        others = [self._pool.submit(piece, a, b) for a, b in zip(cuts[1:-1], cuts[2:], strict=True)]
        piece(0, cuts[1])
        for other in others:
            other.result()

    def close(self) -> None:
        """End the threads."""
        self.crew.close()
        if self._pool is not None and self.crew.is_here:
            self._pool.shutdown()


class HostDevice(Unified):
    """Runs everything on this machine's cores. ``threads`` is llama.cpp's ``-t``, up to MOST_THREADS a core.

    ``act`` "q8" rounds activations to 8 bits where they meet quantized weights, as llama.cpp does; "f32" does not.
    Not ``inline``: the stream "compute" is a thread too, as on a GPU.
    """

    name = "host"
    formats = SUPPORTED
    is_unified = True
    binds = True

    def __init__(self, threads: int | None = None, act: str = "f32", inline: bool = True):
        most = MOST_THREADS * usable_cores()
        self.asked, self.act, self.inline = threads or usable_cores(), act, inline
        self.threads = min(self.asked, most)
        self.split = RowSplitter(self.threads, act)
        self._streams: dict[str, ThreadStream | InlineStream] = {}
        self._queues: list[ThreadQueue] = []
        self._arena = np.empty(0, np.uint8)  # what is left of the last one

    @property
    def how(self) -> str:
        """How it computes, for the report."""
        rounded = f"rounded to 8 bits ({chosen().name} instructions)" if self.act == "q8" else "exact (float32)"
        fewer = f" instead of {self.asked}: {MOST_THREADS} a core are the most" if self.threads < self.asked else ""
        return f"{self.threads} thread{'s' * (self.threads > 1)}{fewer}, activations {rounded}"

    def alloc(self, nbytes: int) -> np.ndarray:
        """Uninitialised uint8 [nbytes], page-aligned; pages count against memory when first touched."""
        own = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        pages = mmap.mmap(-1, max(1, nbytes), **own)  # by default it is shared, and shared pages are seldom large
        if hasattr(mmap, "MADV_HUGEPAGE") and nbytes >= HUGE_PAGE:
            with suppress(OSError):  # a kernel without them
                pages.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(pages, np.uint8)[:nbytes]

    pinned = alloc

    def upload(self, host: np.ndarray) -> np.ndarray:
        """A copy of ``host`` as uint8 [nbytes] that begins a cache line."""
        if host.nbytes > ARENA // 8:
            return super().upload(host)
        size = -(-host.nbytes // 64) * 64
        if size > len(self._arena):
            self._arena = self.alloc(ARENA)
        memory, self._arena = self._arena[: host.nbytes], self._arena[size:]
        memory[...] = np.ascontiguousarray(host).reshape(-1).view(np.uint8)
        return memory

    def stream(self, name: str) -> ThreadStream | InlineStream:
        """A thread of its own, but "compute" runs on the caller's: its work is what the caller waits for anyway."""
        if name not in self._streams:
            self._streams[name] = InlineStream(name) if name == "compute" and self.inline else ThreadStream(name)
        return self._streams[name]

    def workers(self, name: str, count: int) -> ThreadQueue:
        self._queues.append(ThreadQueue(name, count))
        return self._queues[-1]

    def copy_async(self, dst: Any, src: Any, stream: Any) -> None:
        stream.run(lambda: np.copyto(dst, src))

    def launch(self, op: str, stream: Any, **buffers: Any) -> None:
        stream.run(partial(OPS[op].host, self.split, **buffers))

    def bind(self, calls: Sequence[tuple[str, dict[str, Any]]], stream: Any) -> Callable[[int], None]:
        run = bound.bind(self.split, calls, lambda op, **buffers: OPS[op].host(self.split, **buffers))
        return run if isinstance(stream, InlineStream) else lambda position: stream.run(partial(run, position))

    def bind_experts(self, three: dict[str, Any], stream: Any, **buffers: Any) -> Callable[..., None]:
        if all(products.takes(w, self.act) for w in three.values()):
            run: Callable[..., None] = BoundExperts(self.split.crew, three, **buffers)
        else:
            run = self._launch_experts(buffers)
        if isinstance(stream, InlineStream):
            return run
        return lambda *given: stream.run(partial(run, *given))

    def _launch_experts(self, buffers: dict[str, Any]) -> Callable[..., None]:
        def run(wanted: Sequence[int], matrices: Sequence[dict[str, Any]]) -> None:
            three = {name: [one[name] for one in matrices] for name in MATRICES}
            OPS["experts"].host(self.split, wanted=np.array(wanted), **three, **buffers)

        return run

    def bind_token(self, parts: Sequence[Any], places: np.ndarray) -> BoundToken:
        return BoundToken(self.split.crew, [as_steps(part) for part in parts], places)

    def memory(self) -> tuple[int, int]:
        return free_and_total()

    def stalls(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        for stream in self._streams.values():
            total.update(dict(stream.stalls))  # a copy: the stream's thread may be adding a reason
        return dict(total)

    def synchronize(self) -> None:
        ends = [stream.record() for stream in self._streams.values()]
        for end in ends:
            end.block()
        for workers in self._queues:
            workers.drain()
        for end in ends:
            end.synchronize()

    def recover(self) -> None:
        self.split.cancelled = True
        for stream in self._streams.values():
            stream.record().block()
        for workers in self._queues:
            workers.drain()
        for stream in self._streams.values():
            stream.clear()
        self.split.cancelled = False

    def close(self) -> None:
        for workers in self._queues:
            workers.close()
        for stream in self._streams.values():
            stream.close()
        self.split.close()
        self._queues.clear()
        self._streams.clear()
        self._arena = self._arena[:0].copy()
