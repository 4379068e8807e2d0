"""What a device must offer. No method takes a policy or a model: a device moves bytes and runs ops.

Buffers are array objects with NumPy's slicing, views and dtypes (numpy.ndarray on the host,
cupy.ndarray on a GPU). Work goes to streams; a stream runs its work in order; events order work
between streams and let the host wait. A failure inside a stream travels along its events: whoever
waits is told, and the stream runs nothing more until ``recover``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # the command line reads the names of devices without it
    import numpy as np

Work = Callable[[], None] | Sequence[Callable[[], None]]  # one piece, or parts that may run at the same time


class DeviceError(RuntimeError):
    """The device asked for is not usable here; says what is missing and what to do."""

    is_request = True  # for the command line: the request was wrong, not the work


class Event(Protocol):
    """A point in a stream's work."""

    def done(self) -> bool:
        """Whether everything before the point has run (or failed)."""

    def synchronize(self) -> None:
        """Block the host until ``done``; raises what the work raised."""


class Stream(Protocol):
    """Work that runs in order."""

    name: str

    def record(self) -> Event:
        """An event after all work enqueued so far."""

    def wait(self, event: Event, reason: str) -> None:
        """Later work waits for ``event``; time lost is booked under ``reason``."""


class WorkQueue(Protocol):
    """Workers that run independent pieces of host work, the most urgent first (disk reads)."""

    def submit(self, work: Work, urgency: int, after: Event | None = None, name: str = "") -> Event:
        """Run ``work`` on some worker, its parts on any, lower ``urgency`` first; not before ``after``.

        Returns the completion of all of it.
        """

    def promote(self, event: Event, urgency: int) -> None:
        """Make work that has not begun more urgent; no effect once it runs."""


class Device(Protocol):
    """Memory, streams and the ops of the kernel table on one device."""

    name: str
    formats: tuple[str, ...]  # tensor types that its matrix ops take
    is_unified: bool  # device memory is host memory: nothing has to be sent or fetched
    binds: bool  # launches that come again gain by ``bind``

    def alloc(self, nbytes: int) -> Any:
        """Uninitialised uint8 [nbytes] in device memory."""

    def pinned(self, nbytes: int) -> Any:
        """Page-aligned uint8 [nbytes] in host memory that copies to the device can read directly."""

    def stream(self, name: str) -> Stream:
        """The stream of this name, made on first use."""

    def workers(self, name: str, count: int) -> WorkQueue:
        """A queue of host work served by ``count`` workers."""

    def copy_async(self, dst: Any, src: Any, stream: Stream) -> None:
        """Copy src into dst (same shape and dtype) in stream order."""

    def upload(self, host: np.ndarray) -> Any:
        """A copy of ``host`` in device memory, uint8 [nbytes]; for loading: returns when it is there."""

    def put(self, dst: Any, values: np.ndarray, stream: Stream) -> None:
        """Copy a small host array into dst in stream order; ``values`` may change at once."""

    def fetch(self, name: str, src: Any, stream: Stream) -> np.ndarray:
        """Host memory that holds what src does at this point of the stream, once the stream has got here.

        The next fetch of this name and shape uses the same memory.
        """

    def launch(self, op: str, stream: Stream, **buffers: Any) -> None:
        """Run an op of the kernel table on buffers in stream order."""

    def bind(self, calls: Sequence[tuple[str, dict[str, Any]]], stream: Stream) -> Callable[[int], None]:
        """Launches (op, buffers by name) as one function of the position at which the buffers are to be used."""

    def bind_experts(self, three: dict[str, Any], stream: Stream, **buffers: Any) -> Callable[..., None]:
        """The op ``experts`` as a function of experts and their matrices, which are like ``three``; of one token."""

    def bind_token(self, parts: Sequence[Any], places: np.ndarray) -> Any:
        """A function of layers (first, last) and a position that does them as far as their experts have places.

        ``parts`` are, of each layer, what ``bind`` made up to its routes, what ``bind_experts`` made, and the rest (or
        None); ``places`` int64 [keys, 3] says where gate, up and down of an expert are. It returns the first layer that
        is left, and whether for want of an expert; its ``chosen`` [L, k] are the experts that the others have used.
        """

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of device memory."""

    def stalls(self) -> dict[str, float]:
        """Seconds that streams have waited, by reason."""

    def synchronize(self) -> None:
        """Block until all streams and queues are idle; raises the first failure."""

    def recover(self) -> None:
        """After a failure: wait until everything is idle, then forget it, so that work can go on."""

    def close(self) -> None:
        """End all workers; the device is not usable afterwards."""
