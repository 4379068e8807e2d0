"""Threads that help with lists of jobs: they look for work for a while after the last one, then sleep."""

from __future__ import annotations

import threading

from moe_cupy.device.process import OfOneProcess
from moe_cupy.kernels.host import jobs, steps
from moe_cupy.kernels.host.simd.isa import chosen


class Crew(OfOneProcess):
    """The caller and ``threads - 1`` helpers. ``act`` says how activations are rounded: "f32" not at all, or "q8"."""

    def __init__(self, threads: int = 1, act: str = "f32"):
        super().__init__()
        self.act, self.helpers = act, threads - 1
        self.state = steps.new_state(self.helpers, chosen().columns)
        self._work = threading.Semaphore(0)
        self._closed = False
        self._threads = [threading.Thread(target=self._help, name=f"crew-{i}", daemon=True) for i in range(1, threads)]
        for thread in self._threads:
            thread.start()

    @property
    def cancelled(self) -> bool:
        """While set, what is left of a list is skipped."""
        return bool(self.state[jobs.CANCELLED])

    @cancelled.setter
    def cancelled(self, value: bool) -> None:
        self.state[jobs.CANCELLED] = value

    def wake(self) -> None:
        """Have those who sleep look for work again, and all stay awake until the last list of the op has begun."""
        self.check_process()
        self.state[jobs.MORE] = 1
        if self.helpers and self.state[jobs.ASLEEP]:
            for _ in range(jobs.take_all(self.state, jobs.ASLEEP)):
                self._work.release()

    def close(self) -> None:
        """End the helpers, also where an op was broken off between ``wake`` and its last list."""
        if not self.is_here:
            return
        self._closed, self.state[jobs.MORE] = True, 0
        for _ in self._threads:
            self._work.release()
        for thread in self._threads:
            thread.join()

    def _help(self) -> None:
        while True:
            self._work.acquire()
            if self._closed:
                return
            jobs.serve(self.state, jobs.IDLE_TURNS)
