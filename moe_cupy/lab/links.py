"""Copies in virtual time: one link, one disk before it, demand before prefetch, joined and cancelled."""

from __future__ import annotations

from collections import OrderedDict

from moe_cupy.lab.machine import Machine


class Links:
    """When each copy arrives. A copy that has begun is never interrupted; what waits is overtaken by demand."""

    def __init__(self, machine: Machine, expert_bytes: int, host_slots: int | None):
        self._copy_s = machine.link_latency_s + expert_bytes / machine.link_bytes_s
        self._disk_s = machine.disk_latency_s + expert_bytes / machine.disk_bytes_s
        self._host_slots = host_slots  # None: everything is in host memory
        self._host: OrderedDict[int, None] = OrderedDict()  # least recently copied first
        self._link_free = self._disk_free = 0.0
        self._waiting: OrderedDict[int, float] = OrderedDict()  # prefetches not begun: key -> when they were asked for
        self._arrival: dict[int, float] = {}
        self.disk_reads = 0

    def demand(self, key: int, now: float) -> float:
        """Copy ``key`` next; when it is here."""
        self._begin_until(now)
        return self._copy(key, now)

    def prefetch(self, key: int, now: float) -> None:
        """Copy ``key`` when nothing else is to do."""
        self._begin_until(now)
        self._waiting[key] = now

    def arrival(self, key: int, now: float) -> float:
        """When a resident key is (or was) here; one whose prefetch still waits becomes a demand (it is joined)."""
        self._begin_until(now)
        if key in self._waiting:
            del self._waiting[key]
            return self._copy(key, now)
        return self._arrival.get(key, 0.0)

    def cancel(self, key: int, now: float) -> bool:
        """``key`` was evicted: whether its copy had not begun, so that nothing is moved."""
        self._begin_until(now)
        self._arrival.pop(key, None)
        return self._waiting.pop(key, None) is not None

    def _begin_until(self, now: float) -> None:
        while self._waiting and self._link_free <= now:
            key, asked = next(iter(self._waiting.items()))
            if max(self._link_free, asked) > now:
                return
            del self._waiting[key]
            self._copy(key, asked)

    def _copy(self, key: int, asked: float) -> float:
        begin = max(self._link_free, asked, self._in_host(key, asked))
        self._link_free = self._arrival[key] = begin + self._copy_s
        return self._link_free

    def _in_host(self, key: int, asked: float) -> float:
        """When host memory has ``key``; a read from disk pushes out what was copied longest ago."""
        if self._host_slots is None:
            return 0.0
        if key in self._host:
            self._host.move_to_end(key)
            return 0.0
        self.disk_reads += 1
        self._disk_free = max(self._disk_free, asked) + self._disk_s
        self._host[key] = None
        if len(self._host) > self._host_slots:
            self._host.popitem(last=False)
        return self._disk_free
