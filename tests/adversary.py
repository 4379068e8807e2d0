"""The emulated device under a scheduler that knows no mercy: streams and workers run in an order that a test chooses.

Every stream, every worker and the host is a *lane*, a thread; one at a time has the baton. It is handed on before every
piece of work, at every call and at every wait, to the first lane of ``order`` that can go on. So a lane at the end of
the order does everything at the last moment that the events allow, one at the beginning does all it may at once:
what no event orders happens the wrong way round in some order, every time, without a clock. The first lane that can go
on is always the same one: a schedule is a function of the order alone.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_cupy.device.emulated import EmulatedDevice
from moe_cupy.device.threads import ThreadEvent

HOST, COMPUTE, COPY, READ, GIVE = LANES = ("host", "compute", "copy", "expert-read", "give")
Order = Sequence[str] | random.Random  # lanes, the first that can go on; or at random


@dataclass(eq=False)
class Lane:
    """A thread that waits for its turn, and for what it waits besides."""

    kind: str
    ready: Callable[[], Any] = bool
    turn: threading.Event = field(default_factory=threading.Event)
    ended: bool = False


class Baton:
    """Which lane runs. Only the one that has the baton calls anything here."""

    def __init__(self, order: Order):
        self.order, self.lanes, self.stuck = order, [Lane(HOST)], False
        self._mine = threading.local()
        self._mine.lane = self.lanes[0]

    def begin(self, kind: str, serve: Callable[[], None]) -> Lane:
        """A new lane that will run ``serve``."""
        lane = Lane(kind, lambda: True)
        self.lanes.append(lane)

        def run() -> None:
            self._mine.lane = lane
            lane.turn.wait()
            lane.turn.clear()
            serve()
            lane.ended = True
            self._hand_on()

        threading.Thread(target=run, name=kind, daemon=True).start()
        return lane

    def wait(self, ready: Callable[[], Any] = lambda: True) -> None:
        """Go on when ``ready`` and nobody before this lane in the order can go on."""
        me: Lane = self._mine.lane
        me.ready = ready
        if self._hand_on() is not me:
            me.turn.wait()
            me.turn.clear()
        if self.stuck:
            raise AssertionError(f"{me.kind} waits for what nothing will do")

    def _hand_on(self) -> Lane:
        able = [lane for lane in self.lanes if not lane.ended and (self.stuck or lane.ready())]
        self.stuck = self.stuck or not able
        chosen = self._choose(able) if able else self.lanes[0]
        if chosen is not self._mine.lane:
            chosen.turn.set()
        return chosen

    def _choose(self, able: list[Lane]) -> Lane:
        if isinstance(self.order, random.Random):
            return self.order.choice(able)
        return min(able, key=lambda lane: self.order.index(lane.kind) if lane.kind in self.order else len(LANES))


class GatedEvent(ThreadEvent):
    """An event whose waiters hand the baton on."""

    __slots__ = ("_baton",)

    def __init__(self, baton: Baton):
        super().__init__()
        self._baton = baton

    def block(self) -> None:
        self._baton.wait(self.done)

    def synchronize(self) -> None:
        self.block()
        super().synchronize()


class GatedStream:
    """``ThreadStream`` as a lane."""

    def __init__(self, baton: Baton, name: str):
        self.name, self.stalls, self._baton = name, dict[str, float](), baton
        self._work: deque[tuple[Callable[[], Any], Callable[[], None]]] = deque()  # when it can be, what
        self._error: BaseException | None = None
        self._closed = False
        self._lane = baton.begin(name, self._serve)

    def run(self, work: Callable[[], None]) -> None:
        self._put(lambda: True, lambda: self._guarded(work))

    def record(self) -> GatedEvent:
        event = GatedEvent(self._baton)
        self._put(lambda: True, lambda: event.finish(self._error))
        return event

    def wait(self, event: Any, reason: str) -> None:
        self._put(event.done, lambda: setattr(self, "_error", self._error or event.error))

    def clear(self) -> None:
        self._put(lambda: True, lambda: setattr(self, "_error", None))

    def close(self) -> None:
        self._closed = True
        self._baton.wait(lambda: self._lane.ended)

    def _put(self, ready: Callable[[], Any], work: Callable[[], None]) -> None:
        self._work.append((ready, work))
        self._baton.wait()

    def _guarded(self, work: Callable[[], None]) -> None:
        if self._error is None:
            try:
                work()
            except BaseException as error:
                self._error = error

    def _serve(self) -> None:
        while True:
            self._baton.wait(lambda: self._work[0][0]() if self._work else self._closed)
            if not self._work:
                return
            self._work.popleft()[1]()


@dataclass(eq=False)
class Job:
    """Work of a queue."""

    number: int
    urgency: int
    parts: list[Callable[[], None]]
    event: GatedEvent
    left: int
    released: bool = False
    error: BaseException | None = None


class GatedQueue:
    """``ThreadQueue`` as lanes. ``released`` is called with each job when it may begin, and when it is promoted."""

    def __init__(self, baton: Baton, kind: str, count: int):
        self._baton, self.jobs, self._closed, self._number = baton, list[Job](), False, 0
        self.running: Job | None = None
        self.released: Callable[[Job], None] = lambda job: None
        self._lanes = [baton.begin(kind, self._serve) for _ in range(count)]

    def submit(self, work: Any, urgency: int, after: Any = None, name: str = "") -> GatedEvent:
        parts = [work] if callable(work) else list(reversed(work))
        self._number += 1
        job = Job(self._number, urgency, parts, GatedEvent(self._baton), len(parts))
        self.jobs.append(job)
        if after is None:
            self._release(job)
        else:
            after.then(lambda: self._release(job))
        self._baton.wait()
        return job.event

    def promote(self, event: Any, urgency: int) -> None:
        for job in self.jobs:
            if job.event is event and job.parts and urgency < job.urgency:
                job.urgency = urgency
                if job.released:
                    self.released(job)
        self._baton.wait()

    def drain(self) -> None:
        self._baton.wait(lambda: not self.jobs)

    def close(self) -> None:
        self._closed = True
        self._baton.wait(lambda: all(lane.ended for lane in self._lanes))

    def _release(self, job: Job) -> None:
        job.released = True
        self.released(job)

    def _ready(self) -> list[Job]:
        return [job for job in self.jobs if job.released and job.parts]

    def _serve(self) -> None:
        while True:
            self._baton.wait(lambda: self._ready() or (self._closed and not self.jobs))
            if not self._ready():
                return
            job = min(self._ready(), key=lambda one: (one.urgency, one.number))
            self.running, part = job, job.parts.pop()
            try:
                part()
            except BaseException as error:
                job.error = job.error or error
            job.left -= 1
            if not job.left:
                self.jobs.remove(job)
                job.event.finish(job.error)


class AdversarialDevice(EmulatedDevice):
    """See the module."""

    def __init__(self, order: Order, act: str = "f32"):
        self.baton = Baton(order)
        super().__init__(act)

    def stream(self, name: str) -> Any:
        if name not in self._streams:
            self._streams[name] = GatedStream(self.baton, name)  # type: ignore[assignment]
        return self._streams[name]

    def workers(self, name: str, count: int) -> Any:
        self._queues.append(GatedQueue(self.baton, GIVE if name == COPY else name, count))  # type: ignore[arg-type]
        return self._queues[-1]

    def close(self) -> None:
        if self.baton.stuck:
            self._streams.clear()
            self._queues.clear()
        super().close()
