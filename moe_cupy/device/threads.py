"""Worker threads as streams and queues: real concurrency, so ordering bugs show without a GPU."""

from __future__ import annotations

import heapq
import itertools
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any


class ThreadEvent:
    """Completion of some work, with the failure that ended it, if any."""

    __slots__ = ("_flag", "error")

    def __init__(self) -> None:
        self._flag = threading.Event()
        self.error: BaseException | None = None

    def finish(self, error: BaseException | None = None) -> None:
        """Mark the work as ended."""
        self.error = error
        self._flag.set()

    def done(self) -> bool:
        return self._flag.is_set()

    def block(self) -> None:
        """Wait for the end without raising."""
        self._flag.wait()

    def synchronize(self) -> None:
        self._flag.wait()
        if self.error is not None:
            raise self.error


class ThreadStream:
    """One worker thread that runs its queue in order. After a failure it skips work until ``clear``."""

    def __init__(self, name: str):
        self.name = name
        self.stalls: defaultdict[str, float] = defaultdict(float)  # seconds waited for events, by reason
        self._error: BaseException | None = None
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=f"stream-{name}", daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], None]) -> None:
        """Enqueue ``work``."""
        self._work.put(lambda: self._guarded(work))

    def record(self) -> ThreadEvent:
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


class ThreadQueue:
    """Worker threads that share a priority queue; equal urgency is served in order of submission."""

    def __init__(self, name: str, count: int):
        self._ready = threading.Condition()
        self._heap: list[tuple[int, int]] = []  # (urgency, number)
        self._jobs: dict[int, tuple[Callable[[], None], ThreadEvent | None, ThreadEvent]] = {}
        self._numbers: dict[int, int] = {}  # id(event) -> number of a job not begun
        self._count = itertools.count()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"{name}-{i}", daemon=True) for i in range(max(1, count))
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self, work: Callable[[], None], urgency: int, after: Any = None, name: str = ""
    ) -> ThreadEvent:
        event = ThreadEvent()
        with self._ready:
            number = next(self._count)
            self._jobs[number] = (work, after, event)
            self._numbers[id(event)] = number
            heapq.heappush(self._heap, (urgency, number))
            self._ready.notify()
        return event

    def promote(self, event: Any, urgency: int) -> None:
        with self._ready:
            number = self._numbers.get(id(event))
            if number is not None:  # its old entry is passed over when it surfaces: the job is gone by then
                heapq.heappush(self._heap, (urgency, number))

    def drain(self) -> None:
        """Wait until nothing is queued or running."""
        with self._ready:
            waiting = [job[2] for job in self._jobs.values()]
        for event in waiting:
            event.block()

    def close(self) -> None:
        """Finish what is queued and end the threads."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        while (job := self._take()) is not None:
            number, work, after, event = job
            event.finish(_outcome(work, after))
            with self._ready:
                del self._jobs[number]  # only now: drain must not overlook a job whose event is still to come

    def _take(self) -> tuple[int, Callable[[], None], ThreadEvent | None, ThreadEvent] | None:
        with self._ready:
            while True:
                while self._heap:
                    _, number = heapq.heappop(self._heap)
                    job = self._jobs.get(number)
                    if job is not None and self._numbers.pop(id(job[2]), None) is not None:
                        return number, *job
                if self._closed:
                    return None
                self._ready.wait()


def _outcome(work: Callable[[], None], after: ThreadEvent | None) -> BaseException | None:
    """Run ``work`` once ``after`` has ended (well or not); returns the failure, if any."""
    try:
        if after is not None:
            after.block()
        work()
    except BaseException as error:  # handed to whoever waits for this job
        return error
    return None
