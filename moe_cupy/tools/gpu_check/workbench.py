"""A device to measure on: launches on NumPy arrays, repeated launches, copies."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moe_cupy.device import open_device
from moe_cupy.device.discrete import as_bytes
from moe_cupy.kernels.cuda.emulation.library import arrays_of
from moe_cupy.kernels.cuda.launches import Launch, Pointers

MOST_REPEATS = 10_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the things are that are measured; small ones for tests."""

    columns: int = 4096  # of matrices, whose rows are as many
    experts: int = 64
    positions: int = 8192  # cached
    prompt: int = 512
    slab_bytes: int = 8 << 20
    copy_bytes: int = 256 << 20  # also what kernels go through before they see the same bytes again: no cache has it
    hidden: int = 2048  # of the route-replay model, 2 GB with the trace of data/
    ffn: int = 3072
    tokens: int = 128  # of it that are decoded
    shares: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125)  # of its routed experts that are resident
    formats: tuple[str, ...] = ()  # of the kernels checked; all if empty
    models: int = 1000  # at most
    least_seconds: float = 0.05  # what is timed is repeated until it takes so long


SMALL = Sizes(256, 4, 64, 40, 1 << 16, 1 << 20, 256, 256, 4, (0.25,), ("F16", "Q8_0", "Q4_K"), 1, 0.0)


class Workbench:
    """One open device, ``choice`` as of ``--device``. Everything runs on its stream "gpu-check" unless said."""

    def __init__(self, choice: str, sizes: Sizes):
        self.choice, self.sizes = choice, sizes
        opened, _ = open_device(choice)
        self.device: Any = opened
        self.stream = self.device.stream("gpu-check")
        self._pinned = self.device.pinned(1 << 20)

    def close(self) -> None:
        """End the device."""
        self.device.close()

    def send(self, array: np.ndarray) -> Any:
        """A copy of ``array`` in device memory."""
        if not array.size:
            return self.device.alloc(0).view(array.dtype)
        return self.device.upload(np.ascontiguousarray(array)).view(array.dtype).reshape(array.shape)

    def unset(self, *shape: int, dtype: Any = np.float32) -> Any:
        """Device memory that nothing was written to."""
        return self.device.alloc(int(np.prod(shape)) * np.dtype(dtype).itemsize).view(dtype).reshape(shape)

    def table(self, arrays: Any) -> Any:
        """Addresses of device arrays, in device memory."""
        return self.send(np.array([self.device.address(array) for array in arrays], np.uint64))

    def ready(self, launch: Launch) -> Launch:
        """A launch on device arrays with its tables of addresses in device memory, to be run again and again."""
        args = (self.table(value.arrays) if isinstance(value, Pointers) else value for value in launch.args)
        return replace(launch, args=tuple(args))

    def on_device(self, launch: Launch, sent: dict[int, Any]) -> Launch:
        """The launch with its NumPy arrays in device memory; ``sent`` gets them by id."""
        for array in arrays_of(launch):
            if id(array) not in sent:
                sent[id(array)] = self.send(array)

        def there(value: Any) -> Any:
            if isinstance(value, Pointers):
                return Pointers([sent[id(array)] for array in value.arrays])
            return sent[id(value)] if isinstance(value, np.ndarray) else value

        return self.ready(replace(launch, args=tuple(there(value) for value in launch.args)))

    def run(self, launch: Launch) -> None:
        """Launch on copies of NumPy arrays, which then get what the kernel wrote."""
        sent: dict[int, Any] = {}
        self.device.run(self.on_device(launch, sent), self.stream)
        arrays = {id(array): array for array in arrays_of(launch) if array.size}
        places = zip(arrays, self._places(arrays.values()), strict=True)
        back = {key: self._fetched(sent[key], at) for key, at in places}
        self.finish()
        for key, array in arrays.items():
            array[...] = back[key].view(array.dtype).reshape(array.shape)

    def _places(self, arrays: Collection[np.ndarray]) -> list[int]:
        """Where in pinned memory each array is fetched to; makes room for all of them."""
        ends = list(itertools.accumulate(-(-array.nbytes // 16) * 16 for array in arrays))
        if ends and ends[-1] > self._pinned.nbytes:
            self._pinned = self.device.pinned(2 * ends[-1])
        return [0, *ends[:-1]]

    def _fetched(self, there: Any, at: int) -> np.ndarray:
        """Pinned memory, uint8 [nbytes], that holds a device array once the stream is finished."""
        here = self._pinned[at : at + there.nbytes]
        self.device.copy_async(here, as_bytes(there), self.stream)
        return here

    def finish(self) -> None:
        """Wait for the stream; raises what went wrong in it."""
        self.stream.record().synchronize()

    def seconds(self, work: Callable[[], None]) -> float:
        """What one ``work`` (that enqueues) takes: once to warm up, then repeated, the mean; best of three."""
        work()
        self.finish()
        once = self._batch(work, 1)
        repeats = min(MOST_REPEATS, max(1, int(self.sizes.least_seconds / max(once, 1e-7))))
        return min(self._batch(work, repeats) for _ in range(3)) / repeats

    def launch_seconds(self, ready: Iterable[Launch]) -> float:
        """What one of these launches takes, each after the other and again."""
        turns = itertools.cycle(ready)
        return self.seconds(lambda: self.device.run(next(turns), self.stream))

    def _batch(self, work: Callable[[], None], repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        self.finish()
        return time.perf_counter() - start

    def copy_gbps(self, dst: Any, src: Any) -> float:
        """Bytes of a copy in its stream over its time, in GB/s."""
        return dst.nbytes / self.seconds(lambda: self.device.copy_async(dst, src, self.stream)) / 1e9
