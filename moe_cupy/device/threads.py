"""Worker threads as streams and queues: real concurrency, so ordering bugs show without a GPU."""

from __future__ import annotations

import heapq
import itertools
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_cupy.device.base import Work
from moe_cupy.device.process import OfOneProcess


class ThreadEvent:
    """Completion of some work, with the failure that ended it, if any."""

    __slots__ = ("_callbacks", "_flag", "error")
    _lock = threading.Lock()  # one for all events: held for a moment, and only where callbacks are concerned

    def __init__(self) -> None:
        self._flag = threading.Event()
        self._callbacks: list[Callable[[], None]] = []
        self.error: BaseException | None = None

    def finish(self, error: BaseException | None = None) -> None:
        """Mark the work as ended."""
        self.error = error
        with self._lock:
            self._flag.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def then(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once the work has ended: at once if it has."""
        with self._lock:
            if not self._flag.is_set():
                self._callbacks.append(callback)
                return
        callback()

    def done(self) -> bool:
        return self._flag.is_set()

    def block(self) -> None:
        """Wait for the end without raising."""
        self._flag.wait()

    def synchronize(self) -> None:
        self._flag.wait()
        if self.error is not None:
            raise self.error


DONE = ThreadEvent()  # of work that has ended
DONE.finish()


class InlineStream:
    """Runs work at once on the thread that asks for it: no queue, nothing to wait for but events of others."""

    def __init__(self, name: str):
        self.name = name
        self.stalls: defaultdict[str, float] = defaultdict(float)  # seconds waited for events, by reason

    def run(self, work: Callable[[], None]) -> None:
        work()

    def record(self) -> ThreadEvent:
        return DONE

    def wait(self, event: Any, reason: str) -> None:
        """Block until ``event``; raises what its work raised."""
        if not event.done():
            start = time.perf_counter()
            event.block()
            self.stalls[reason] += time.perf_counter() - start
        event.synchronize()

    def clear(self) -> None:
        """There is no failure to forget: it was raised."""

    def close(self) -> None:
        """There is nothing to end."""


class ThreadStream(OfOneProcess):
    """One worker thread that runs its queue in order. After a failure it skips work until ``clear``."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self.stalls: defaultdict[str, float] = defaultdict(float)  # seconds waited for events, by reason
        self._error: BaseException | None = None
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=f"stream-{name}", daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], None]) -> None:
        """Enqueue ``work``."""
        self.check_process()
        self._work.put(lambda: self._guarded(work))

    def record(self) -> ThreadEvent:
        self.check_process()
        event = ThreadEvent()
        self._work.put(lambda: event.finish(self._error))
        return event

    def wait(self, event: Any, reason: str) -> None:
        if not (event.done() and event.error is None):  # what is done and well needs no place in the queue
            self._work.put(lambda: self._stall(event, reason))

    def clear(self) -> None:
        """Forget a failure, in queue order."""
        self._work.put(self._forget)

    def close(self) -> None:
        """Let the queue run out and end the thread."""
        if not self.is_here:
            return
        self._work.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    def _guarded(self, work: Callable[[], None]) -> None:
        if self._error is not None:
            return
        try:
            work()
        except BaseException as error:  # handed to whoever waits for this stream
            self._error = error

    def _forget(self) -> None:
        self._error = None

    def _stall(self, event: ThreadEvent, reason: str) -> None:
        """Wait even after a failure: what is recorded behind this must still mean that ``event`` has happened."""
        if not event.done():
            start = time.perf_counter()
            event.block()
            self.stalls[reason] += time.perf_counter() - start
        self._error = self._error or event.error


@dataclass(slots=True)
class _Job:
    """Work in a queue, in parts that any workers may take once it is ``released``."""

    number: int
    urgency: int
    parts: list[Callable[[], None]]  # not begun, in reverse order
    left: int  # parts that have not ended
    event: ThreadEvent
    released: bool = False
    error: BaseException | None = None  # of the first part that failed


class ThreadQueue(OfOneProcess):
    """Worker threads that share a priority queue; equal urgency is served in order of submission.

    Work that must wait for an event occupies no worker meanwhile, so what it waits for can run. Work in parts has
    ended when all of them have, whatever fails.
    """

    def __init__(self, name: str, count: int):
        super().__init__()
        self._ready = threading.Condition()
        self._heap: list[tuple[int, int, _Job]] = []  # (urgency, number, job) of what is released
        self._jobs: dict[ThreadEvent, _Job] = {}  # what has not ended
        self._count = itertools.count()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"{name}-{i}", daemon=True) for i in range(max(1, count))
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Work, urgency: int, after: Any = None, name: str = "") -> ThreadEvent:
        self.check_process()
        parts = [work] if callable(work) else list(reversed(work))
        job = _Job(next(self._count), urgency, parts, len(parts), ThreadEvent())
        with self._ready:
            self._jobs[job.event] = job
        if after is None:
            self._release(job)
        else:
            after.then(lambda: self._release(job))
        return job.event

    def promote(self, event: Any, urgency: int) -> None:
        with self._ready:
            job = self._jobs.get(event)
            if job is None or not job.parts or urgency >= job.urgency:
                return
            job.urgency = urgency
            if job.released:  # its old entry is passed over when it surfaces
                heapq.heappush(self._heap, (urgency, job.number, job))

    def drain(self) -> None:
        """Wait until nothing is queued or running."""
        self.check_process()
        with self._ready:
            waiting = list(self._jobs)
        for event in waiting:
            event.block()

    def close(self) -> None:
        """Finish what is queued and end the threads."""
        if not self.is_here:
            return
        with self._ready:
            self._closed = True
            self._ready.notify_all()
        for thread in self._threads:
            thread.join()

    def _release(self, job: _Job) -> None:
        with self._ready:
            job.released = True
            heapq.heappush(self._heap, (job.urgency, job.number, job))
            self._ready.notify(len(job.parts))

    def _serve(self) -> None:
        while (taken := self._take()) is not None:
            job, part = taken
            error = _outcome(part)
            with self._ready:
                job.error, job.left = job.error or error, job.left - 1
                if job.left:
                    continue
            job.event.finish(job.error)
            with self._ready:
                del self._jobs[job.event]  # only now: drain must not overlook a job whose event is still to come
                if self._closed:
                    self._ready.notify_all()

    def _take(self) -> tuple[_Job, Callable[[], None]] | None:
        with self._ready:
            while True:
                while self._heap:
                    job = self._heap[0][2]
                    part = job.parts.pop() if job.parts else None
                    if not job.parts:
                        heapq.heappop(self._heap)
                    if part is not None:
                        return job, part
                if self._closed and not self._jobs:
                    return None
                self._ready.wait()


def _outcome(work: Callable[[], None]) -> BaseException | None:
    """Run ``work``; returns the failure, if any."""
    try:
        work()
    except BaseException as error:  # handed to whoever waits for this job
        return error
    return None
