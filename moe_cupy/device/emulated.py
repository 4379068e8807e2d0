"""The emulated device: the CUDA kernels themselves, compiled for the CPU; worker threads are its streams.

Slow, and exact about everything but time: launches, copies and events happen in the order of streams that really run
beside each other, and memory that nothing was written to yet reads as NaN.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from moe_cupy.device.base import DeviceError
from moe_cupy.device.discrete import ARENA, DiscreteDevice, as_bytes
from moe_cupy.device.host import HostDevice
from moe_cupy.kernels.cuda.emulation.build import BuildError
from moe_cupy.kernels.cuda.emulation.library import Library, emulated
from moe_cupy.kernels.cuda.launches import Launch

SILENT = 2.0  # seconds before a build says what it does


def library() -> Library:
    """The compiled kernels; says on stderr how long compiling takes. Raises DeviceError."""
    made, start, beside = threading.Event(), time.monotonic(), sys.stderr

    def tell() -> None:
        while not made.wait(SILENT):
            print(f"compiling the CUDA kernels for the CPU (first run only): {time.monotonic() - start:.0f} s",
                  file=beside, flush=True)  # fmt: skip

    teller = threading.Thread(target=tell, name="build-progress", daemon=True)
    teller.start()
    try:
        return emulated()
    except BuildError as error:
        raise DeviceError(f"--device emulated: {' '.join(str(error).split())[:500]}") from error
    finally:
        made.set()
        teller.join()


@dataclass(frozen=True, slots=True)
class Work:
    """Launches of one stream, one after the other."""

    stream: Any
    launches: list[Launch]


@dataclass(frozen=True, slots=True)
class Order:
    """From here on ``after`` is behind all of ``before`` so far."""

    before: Any
    after: Any


class Graph:
    """What was captured: work of streams that orders join, as CUDA lets them join a capture."""

    def __init__(self, stream: Any):
        self._stream, self.items = stream, list[Work | Order]()
        self._joined = {stream}
        self._open: set[Any] = set()  # streams with work that the first is not behind of

    def launch(self, launch: Launch, stream: Any) -> None:
        """One more kernel."""
        if stream not in self._joined:
            raise DeviceError(f"stream {stream.name} is not part of the graph: nothing orders it behind the first")
        self._open |= {stream} - {self._stream}
        last = self.items[-1] if self.items else None
        if isinstance(last, Work) and last.stream is stream:
            last.launches.append(launch)
        else:
            self.items.append(Work(stream, [launch]))

    def order(self, before: Any, after: Any) -> None:
        """One more order."""
        if before not in self._joined:
            raise DeviceError(f"stream {before.name} is not part of the graph: what is behind it would not be either")
        self._joined.add(after)
        self._open |= {after} - {self._stream}
        self._open -= {before} if after is self._stream else set()
        self.items.append(Order(before, after))

    def check(self) -> None:
        """Raises DeviceError if some work may be left when the first stream is done."""
        if self._open:
            raise DeviceError(f"the graph does not wait for {', '.join(s.name for s in self._open)}")


class EmulatedDevice(DiscreteDevice, HostDevice):
    """``memory`` is RAM; what is a copy over the bus on a GPU is a copy here. It poses as any ``capability``."""

    name = "emulated"
    formats = DiscreteDevice.formats

    def __init__(self, act: str = "f32", capability: tuple[int, int] = (12, 0)) -> None:
        self.kernels, self.capability = library(), capability
        self._graph: Graph | None = None  # that is being captured
        DiscreteDevice.__init__(self, act)
        HostDevice.__init__(self, 1, act, inline=False)
        self._arena = self.pinned(ARENA)

    def alloc(self, nbytes: int) -> np.ndarray:
        if self._graph is not None:
            raise DeviceError("memory asked for inside a graph: it has to be there before")
        memory = HostDevice.alloc(self, nbytes)
        memory[...] = 0xFF  # NaN as any float
        return memory

    def pinned(self, nbytes: int) -> np.ndarray:
        return HostDevice.alloc(self, nbytes)

    def copy_async(self, dst: Any, src: Any, stream: Any) -> None:
        if self._graph is not None:
            raise DeviceError("a copy inside a graph: what is sent would be what it was when the graph was made")
        HostDevice.copy_async(self, dst, src, stream)

    def upload(self, host: np.ndarray) -> np.ndarray:
        memory = HostDevice.alloc(self, host.nbytes)
        memory[...] = as_bytes(np.ascontiguousarray(host))
        return memory

    def address(self, array: np.ndarray) -> int:
        return array.ctypes.data

    def run(self, launch: Launch, stream: Any) -> None:
        if self._graph is not None:
            self._graph.launch(launch, stream)
        else:
            stream.run(lambda: self.kernels.launch(launch))

    def order(self, before: Any, after: Any) -> None:
        if self._graph is not None:
            self._graph.order(before, after)
        else:
            after.wait(before.record(), "branch")

    @contextmanager
    def capture(self, stream: Any) -> Iterator[Graph]:
        self._graph = graph = Graph(stream)
        try:
            yield graph
        finally:
            self._graph = None
        graph.check()

    def replay(self, graph: Graph, stream: Any) -> None:
        for item in graph.items:
            if isinstance(item, Order):
                item.after.wait(item.before.record(), "branch")
            else:
                item.stream.run(partial(self._run_all, item.launches))

    def _run_all(self, launches: list[Launch]) -> None:
        for launch in launches:
            self.kernels.launch(launch)
