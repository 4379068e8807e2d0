"""What devices with memory of their own share: ops as kernel launches, small arrays sent and fetched, no waiting.

A subclass has memory (``alloc``, ``pinned``), streams, ``copy_async`` and ``run``, which launches one kernel. The host
may go on as soon as a method returns: what is sent was copied to pinned memory that is used again only once the copy
out of it is done; what is fetched is there after the stream's next event.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from moe_cupy.device.base import DeviceError, Event
from moe_cupy.kernels.cuda.launches import Launch
from moe_cupy.kernels.cuda.sources import FORMATS
from moe_cupy.kernels.matrix import Matrix
from moe_cupy.kernels.table import OPS

SMALLEST_BLOCK = 256  # bytes of pinned memory; blocks are powers of two
ARENA = 4 << 20  # bytes of them, page-locked before the experts can take all there is
FIRST_NUMBERS = 1 << 16
READS_X = ("linear", "linear_add", "linear_heads", "experts")  # ops that leave ``x`` as it is, and may round it


def as_bytes(array: Any) -> Any:
    """The same memory as uint8 [nbytes]; ``array`` is contiguous."""
    return array.reshape(-1).view(np.uint8)


class DeviceWorkspace:
    """``kernels.cuda.ops.Workspace`` for the launches of one stream."""

    def __init__(self, device: DiscreteDevice, stream: Any):
        self._device, self._stream = device, stream
        self._arrays: dict[tuple[Any, ...], Any] = {}
        self._rounded: tuple[Any, Any] | None = None  # an activation and its Q8 blocks
        self.position: Any = None  # int32 [1]: where the one token of a pass is, if launches are to be used again

    def scratch(self, name: str, *shape: int, dtype: Any = np.float32) -> Any:
        """Device memory under this name and shape; holds what was last written."""
        key = name, shape, np.dtype(dtype)
        if key not in self._arrays:
            self._arrays[key] = self._device.array(shape, dtype)
        return self._arrays[key]

    def put(self, name: str, values: np.ndarray) -> Any:
        """``values``, which may change at once, in device memory under this name and shape."""
        target = self.scratch(name, *values.shape, dtype=values.dtype)
        self._device.put(target, values, self._stream)
        return target

    @property
    def act(self) -> str:
        """How the device takes activations."""
        return self._device.act

    @property
    def capability(self) -> tuple[int, int]:
        """The device's compute capability."""
        return self._device.capability

    def rounding(self, x: Any) -> tuple[Any, bool]:
        """Room for the Q8 blocks of x, uint8 [..., cols / 32, 40], and whether they are there since x was written."""
        if self._rounded is not None and self._rounded[0] is x:
            return self._rounded[1], True
        blocks = self.scratch("rounded", *x.shape[:-1], x.shape[-1] // 32, 40, dtype=np.uint8)
        self._rounded = x, blocks
        return blocks, False

    def written(self, arrays: Iterable[Any]) -> None:
        """Forget the blocks of an x that shares memory with one of these; what is no array does not matter."""
        if self._rounded is None:
            return
        begin = self._device.address(self._rounded[0])
        end = begin + self._rounded[0].nbytes
        for array in arrays:
            if hasattr(array, "nbytes") and not isinstance(array, (np.generic, Matrix)):
                first = self._device.address(array)
                if first < end and begin < first + array.nbytes:
                    self._rounded = None
                    return

    def numbers(self, first: int, count: int) -> Any:
        """int32 [count] in device memory: first, first + 1, …"""
        return self._device.numbers(first, count)

    def positions(self, first: int, count: int) -> Any:
        """int32 [count] in device memory: first, first + 1, …, or whatever the fixed position is."""
        return self.numbers(first, count) if self.position is None else self.position

    def horizon(self, seen: int, capacity: int) -> int:
        """For how many positions attention is launched: with a fixed position, for all there can be."""
        return seen if self.position is None else capacity

    def constant(self, name: str, values: np.ndarray) -> Any:
        """``values``, always the same under this name and shape, in device memory."""
        known = (name, values.shape, values.dtype) in self._arrays
        return self.scratch(name, *values.shape, dtype=values.dtype) if known else self.put(name, values)

    def addresses(self, arrays: Sequence[Any]) -> np.ndarray:
        """uint64 [n]: where arrays begin in device memory."""
        return np.array([self._device.address(array) for array in arrays], np.uint64)


class DiscreteDevice(ABC):
    """See the module."""

    is_unified = False
    binds = False
    formats = FORMATS
    capability: tuple[int, int]  # of the GPU, major and minor: decides which kernels are launched
    _arena: np.ndarray  # page-locked by the subclass when it begins

    def __init__(self, act: str) -> None:
        self.act = act  # "q8": activations are rounded to 8 bits where they meet block formats; "f32": they are not
        self._workspaces: dict[str, DeviceWorkspace] = {}
        self._blocks: defaultdict[int, deque[tuple[Event, np.ndarray]]] = defaultdict(deque)
        self._fetched: dict[tuple[Any, ...], np.ndarray] = {}
        self._numbers: Any = None
        self._arena_used = 0

    # What a subclass has.

    @abstractmethod
    def alloc(self, nbytes: int) -> Any:
        """Uninitialised uint8 [nbytes] in device memory."""

    @abstractmethod
    def pinned(self, nbytes: int) -> np.ndarray:
        """Page-locked uint8 [nbytes] in host memory."""

    @abstractmethod
    def copy_async(self, dst: Any, src: Any, stream: Any) -> None:
        """Copy src into dst in stream order."""

    @abstractmethod
    def upload(self, host: np.ndarray) -> Any:
        """The bytes of ``host`` as uint8 in device memory."""

    @abstractmethod
    def address(self, array: Any) -> int:
        """Where ``array`` begins in device memory."""

    @abstractmethod
    def run(self, launch: Launch, stream: Any) -> None:
        """Launch one kernel in stream order."""

    # What follows from it.

    def array(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Uninitialised device memory of this shape."""
        return self.alloc(int(np.prod(shape)) * np.dtype(dtype).itemsize).view(dtype).reshape(shape)

    def bind(self, calls: Any, stream: Any) -> Callable[[int], None]:
        """Raises DeviceError: here no function is sooner done than its launches (``binds`` is False)."""
        raise DeviceError("this device makes no function of launches; ask `binds` first, and launch them one by one")

    def bind_experts(self, three: Any, stream: Any, **buffers: Any) -> Callable[..., None]:
        """Raises DeviceError, as ``bind`` does."""
        return self.bind((), stream)

    def bind_token(self, parts: Any, places: Any) -> Any:
        """Raises DeviceError, as ``bind`` does."""
        return self.bind((), None)

    def launch(self, op: str, stream: Any, **buffers: Any) -> None:
        self.launch_all(OPS[op].cuda, stream, op in READS_X, **buffers)

    def launch_all(
        self, launches: Callable[..., Iterable[Launch]], stream: Any, reads_x: bool = True, **buffers: Any
    ) -> None:
        """Run what ``launches`` makes of a workspace and buffers, of which it may write all but ``x`` if it reads_x."""
        work = self.workspace(stream)
        for launch in launches(work, **buffers):
            self.run(launch, stream)
        work.written(value for name, value in buffers.items() if not (reads_x and name == "x"))

    def workspace(self, stream: Any) -> DeviceWorkspace:
        """What the launches of a stream share."""
        if stream.name not in self._workspaces:
            self._workspaces[stream.name] = DeviceWorkspace(self, stream)
        return self._workspaces[stream.name]

    @abstractmethod
    def capture(self, stream: Any) -> AbstractContextManager[Any]:
        """Inside, launches of ``stream``, and of those that ``order`` puts behind it, become the graph that this gives.

        In the end ``stream`` has to be behind all of them.
        """

    @abstractmethod
    def replay(self, graph: Any, stream: Any) -> None:
        """Run a graph in stream order."""

    @abstractmethod
    def order(self, before: Any, after: Any) -> None:
        """Work of the stream ``after`` from here on comes after all of ``before`` so far, in a graph too."""

    def put(self, dst: Any, values: np.ndarray, stream: Any) -> None:
        size = max(SMALLEST_BLOCK, 1 << (values.nbytes - 1).bit_length())
        free = self._blocks[size]
        block = free.popleft()[1] if free and free[0][0].done() else self._staging(size)
        block[: values.nbytes] = as_bytes(np.ascontiguousarray(values))
        self.copy_async(as_bytes(dst), block[: values.nbytes], stream)
        free.append((stream.record(), block))
        self.workspace(stream).written([dst])

    def fetch(self, name: str, src: Any, stream: Any) -> np.ndarray:
        key, rows = (name, src.shape[1:], np.dtype(src.dtype)), len(src)
        kept = self._fetched.get(key)
        if kept is None or len(kept) < rows:  # it is not given back: so not one for each length of prompt
            room = 1 << (rows - 1).bit_length()
            memory = self._staging(room * (src.nbytes // rows))
            kept = self._fetched[key] = memory.view(src.dtype).reshape(room, *src.shape[1:])
        self.copy_async(as_bytes(kept[:rows]), as_bytes(src), stream)
        return kept[:rows]

    def _staging(self, nbytes: int) -> np.ndarray:
        """Host memory for small copies: page-locked, or what there is (a copy then waits, and is right)."""
        begin, self._arena_used = self._arena_used, self._arena_used + -(-nbytes // SMALLEST_BLOCK) * SMALLEST_BLOCK
        if self._arena_used <= len(self._arena):
            return self._arena[begin : begin + nbytes]
        self._arena_used = begin
        try:
            return self.pinned(nbytes)
        except MemoryError:
            return np.empty(nbytes, np.uint8)

    def numbers(self, first: int, count: int) -> Any:
        """int32 [count] in device memory: first, first + 1, …"""
        if self._numbers is None or first + count > len(self._numbers):
            some = np.arange(max(FIRST_NUMBERS, 2 * (first + count)), dtype=np.int32)
            self._numbers = self.upload(some).view(np.int32)
        return self._numbers[first : first + count]
