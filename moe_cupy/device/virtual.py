"""A device whose time is computed, not spent: the same engine, ops run at once, clocks advance by cost.

Every launch and every piece of host work has a cost in seconds that the caller chooses. What overlaps
with what then follows from the engine's own calls alone (streams, events, urgencies), so a schedule can
be tested and drawn exactly, on any machine. The host itself costs nothing; it advances when it waits.

Ops run on the host kernels when they are enqueued, in the order of the program, which is always a
correct order: this device shows schedules, it cannot show races.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from moe_cupy.device.base import Work
from moe_cupy.device.host import HostDevice, RowSplitter
from moe_cupy.device.memory import free_and_total
from moe_cupy.device.unified import Unified
from moe_cupy.kernels.table import OPS


class Span(NamedTuple):
    """One bar of the time line: ``lane`` was busy with ``name`` from ``start`` to ``end`` (seconds)."""

    lane: str
    name: str
    start: float
    end: float


class VirtualEvent:
    """A point in virtual time, known once the simulation has reached it."""

    def __init__(self, device: VirtualDevice):
        self._device = device
        self.time: float | None = None
        self.error: BaseException | None = None

    def done(self) -> bool:
        """Whether the point lies in the host's past."""
        self._device.settle()
        return self.time is not None and self.time <= self._device.now

    def synchronize(self) -> None:
        self._device.run_until(self)
        if self.error is not None:
            raise self.error


@dataclass(slots=True)
class _Item:
    """Something in a stream: work of some cost, a wait for an event, or the recording of one."""

    issued: float
    cost: float = 0.0
    name: str = ""
    wait: VirtualEvent | None = None
    record: VirtualEvent | None = None


class VirtualStream:
    """Items in order; ``clock`` is when the last one simulated ended."""

    def __init__(self, device: VirtualDevice, name: str):
        self._device, self.name = device, name
        self.clock = 0.0
        self.items: list[_Item] = []

    def record(self) -> VirtualEvent:
        event = VirtualEvent(self._device)
        self.items.append(_Item(self._device.now, record=event))
        return event

    def wait(self, event: Any, reason: str) -> None:
        if event.error is not None:
            raise event.error
        self.items.append(_Item(self._device.now, wait=event, name=reason))

    def progress(self) -> bool:
        """Simulate items as far as the events they wait for are known; returns whether any was."""
        count = 0
        for item in self.items:
            if item.wait is not None and item.wait.time is None:
                break
            self._do(item)
            count += 1
        del self.items[:count]
        return count > 0

    def _do(self, item: _Item) -> None:
        start = max(self.clock, item.issued)
        if item.wait is not None:
            assert item.wait.time is not None
            self._device.stalled[item.name] += max(0.0, item.wait.time - start)
            self.clock = max(start, item.wait.time)
        elif item.record is not None:
            self.clock = item.record.time = start
        else:
            self.clock = start + item.cost
            self._device.spans.append(Span(self.name, item.name, start, self.clock))


@dataclass(slots=True)
class _Job:
    """A piece of host work that has not begun."""

    number: int
    issued: float
    urgency: int
    after: VirtualEvent | None
    event: VirtualEvent
    name: str
    promotions: list[tuple[float, int]] = field(default_factory=list)

    def ready(self) -> float:
        """When it may begin: issued, and what it waits for has happened; infinite while that is not known."""
        if self.after is None:
            return self.issued
        return float("inf") if self.after.time is None else max(self.issued, self.after.time)

    def urgency_at(self, time: float) -> int:
        """The urgency as known at ``time``."""
        return min([self.urgency, *(urgency for at, urgency in self.promotions if at <= time)])


class VirtualQueue:
    """``count`` lanes that serve jobs by urgency, then age, each job taking ``cost(name)``."""

    def __init__(self, device: VirtualDevice, name: str, count: int):
        self._device, self.name = device, name
        self._lanes = [0.0] * count
        self._pending: list[_Job] = []
        self._count = itertools.count()

    def submit(self, work: Work, urgency: int, after: Any = None, name: str = "") -> VirtualEvent:
        event = VirtualEvent(self._device)
        try:
            for part in [work] if callable(work) else work:
                part()
        except BaseException as error:  # handed to whoever waits for this job
            event.error = error
        self._pending.append(_Job(next(self._count), self._device.now, urgency, after, event, name))
        return event

    def promote(self, event: Any, urgency: int) -> None:
        for job in self._pending:
            if job.event is event:
                job.promotions.append((self._device.now, urgency))

    def begin_time(self) -> float:
        """When the next job would begin; infinite if none can."""
        return max(min(self._lanes), min((job.ready() for job in self._pending), default=float("inf")))

    def step(self) -> bool:
        """Give the next job to the lane that is free first; returns whether there was one that can begin."""
        time = self.begin_time()
        if time == float("inf"):
            return False
        ready = [job for job in self._pending if job.ready() <= time]
        job = min(ready, key=lambda j: (j.urgency_at(time), j.number))
        lane = self._lanes.index(min(self._lanes))
        self._lanes[lane] = job.event.time = time + self._device.read_cost(job.name)
        self._device.spans.append(Span(f"{self.name}-{lane}", job.name, time, self._lanes[lane]))
        self._pending.remove(job)
        return True


class VirtualDevice(Unified):
    """See the module. ``op_cost(op, buffers)`` and ``read_cost(name)`` give seconds."""

    name = "virtual"
    formats = HostDevice.formats
    is_unified = True

    def __init__(self, op_cost: Callable[[str, dict[str, Any]], float], read_cost: Callable[[str], float]):
        self.op_cost, self.read_cost = op_cost, read_cost
        self.now = 0.0  # the host's clock
        self.spans: list[Span] = []
        self.stalled: defaultdict[str, float] = defaultdict(float)
        self._split = RowSplitter(1)
        self._streams: dict[str, VirtualStream] = {}
        self._queues: list[VirtualQueue] = []

    def alloc(self, nbytes: int) -> np.ndarray:
        return HostDevice.alloc(self, nbytes)  # type: ignore[arg-type]

    pinned = alloc

    def memory(self) -> tuple[int, int]:
        return free_and_total()

    def stream(self, name: str) -> VirtualStream:
        return self._streams.setdefault(name, VirtualStream(self, name))

    def workers(self, name: str, count: int) -> VirtualQueue:
        self._queues.append(VirtualQueue(self, name, count))
        return self._queues[-1]

    def copy_async(self, dst: Any, src: Any, stream: Any) -> None:
        np.copyto(dst, src)
        stream.items.append(_Item(self.now, self.op_cost("copy", {"dst": dst, "src": src}), "copy"))

    def launch(self, op: str, stream: Any, **buffers: Any) -> None:
        OPS[op].host(self._split, **buffers)
        stream.items.append(_Item(self.now, self.op_cost(op, buffers), op))

    def stalls(self) -> dict[str, float]:
        return dict(self.stalled)

    def settle(self) -> None:
        """Simulate everything that begins no later than the host's present."""
        self._advance(lambda: min((q.begin_time() for q in self._queues), default=float("inf")) >= self.now)

    def run_until(self, event: VirtualEvent) -> None:
        """The host waits for ``event``: simulate until its time is known, then move there."""
        self._advance(lambda: event.time is not None)
        if event.time is None:
            raise RuntimeError("the schedule cannot go on: something waits for what nothing will do")
        self.now = max(self.now, event.time)

    def _advance(self, enough: Callable[[], bool]) -> None:
        while True:
            moved = sum(stream.progress() for stream in self._streams.values())  # all of them, not the first
            if enough():
                return
            queues = sorted(self._queues, key=VirtualQueue.begin_time)
            if not any(queue.step() for queue in queues) and not moved:
                return

    def synchronize(self) -> None:
        for stream in self._streams.values():
            stream.record().synchronize()

    def recover(self) -> None:
        self._advance(lambda: False)

    def close(self) -> None:
        self._streams.clear()
        self._queues.clear()
