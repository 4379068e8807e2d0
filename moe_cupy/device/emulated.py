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


class EmulatedDevice(DiscreteDevice, HostDevice):
    """``memory`` is RAM; what is a copy over the bus on a GPU is a copy here. It poses as any ``capability``."""

    name = "emulated"
    formats = DiscreteDevice.formats

    def __init__(self, act: str = "f32", capability: tuple[int, int] = (12, 0)) -> None:
        self.kernels, self.capability = library(), capability
        self._graph: list[Launch] | None = None  # that is being captured
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
            self._graph.append(launch)
        else:
            stream.run(lambda: self.kernels.launch(launch))

    @contextmanager
    def capture(self, stream: Any) -> Iterator[list[Launch]]:
        graph: list[Launch] = []
        self._graph = graph
        try:
            yield graph
        finally:
            self._graph = None

    def replay(self, graph: list[Launch], stream: Any) -> None:
        def run() -> None:
            for launch in graph:
                self.kernels.launch(launch)

        stream.run(run)
