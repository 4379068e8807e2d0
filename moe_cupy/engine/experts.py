"""Transport of experts: executes what the cache decides. One owner, the engine thread, holds all state here.

Three rules keep it safe: a load waits for whatever touched its slot last; a kernel waits for its load's
event; what the current event uses is pinned. One rule keeps it fast: demand loads go before queued
prefetches, and a prefetch that is wanted before it has begun becomes a demand load (it is *joined*).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from moe_cupy.cache import ExpertCache, Load, Scores
from moe_cupy.device.base import Device, Event
from moe_cupy.engine.transport import DEMAND, PREFETCH, Transport
from moe_cupy.kernels.host.products import address_of
from moe_cupy.kernels.matrix import Matrix
from moe_cupy.store import MATRICES, ExpertStore


class Held(NamedTuple):
    """An expert on loan to the current event: wait for ``ready``, then read ``matrices``."""

    key: int
    expert: int
    slot: int
    ready: Any  # an event of the transport, for ``ExpertMover.wait``; None: already here
    matrices: dict[str, Matrix]


class ExpertMover:
    """Slots in device memory, the loads under way into them, and who touched each slot last."""

    def __init__(self, device: Device, store: ExpertStore, cache: ExpertCache, transport: Transport):
        self.store, self.cache, self.layout, self.transport = store, cache, store.layout, transport
        self.late = 0
        self.bytes_demand = self.bytes_prefetch = 0
        self._slots: list[Any] = []  # slot -> uint8 [slot_bytes]
        self.cache_bytes = self._allocate(device)
        self._loading: dict[int, Any] = {}  # key -> its load, until seen done
        self._touched: dict[int, Any] = {}  # slot -> the last load into it or kernel that reads it
        self._matrices: dict[int, dict[str, Matrix]] = {}  # slot -> what lies in it
        keys = len(self.layout.layers) * self.layout.expert_count
        self.places = np.zeros((keys, 3), np.int64)  # key -> where its matrices are, once one used it; 0: ask
        self._notes = device.binds

    @property
    def slots(self) -> Sequence[Any]:
        """The memory of each slot, uint8 [slot_bytes]."""
        return self._slots

    def _allocate(self, device: Device) -> int:
        total = 0
        for index, pool in enumerate(self.cache.pools):
            size = self.store.slot_bytes(index)
            memory = device.alloc(size * pool.slots)
            self._slots += [memory[i * size : (i + 1) * size] for i in range(pool.slots)]
            total += size * pool.slots
        return total

    def waves(self, layer: int, experts: Sequence[int]) -> list[list[int]]:
        """Split an event's experts so that two consecutive waves fit the pool: one computes, one loads.

        What is resident comes first. One wave suffices whenever all of them fit (always, for one token).
        """
        pool = self.cache.pool(layer)
        if len(experts) <= pool.slots:
            return [list(experts)]
        ordered = sorted(experts, key=lambda e: self.cache.key(layer, e) not in pool.slot_of)
        size = max(1, pool.slots // 2)
        return [ordered[i : i + size] for i in range(0, len(ordered), size)]

    def acquire(
        self, layer: int, experts: Sequence[int], pinned: Collection[int] = (), scores: Scores | None = None
    ) -> list[Held]:
        """Make ``experts`` available to this event; those already here come first. Never blocks."""
        plan = self.cache.access(layer, experts, pinned, scores)
        if plan.loads:
            self.bytes_demand += len(plan.loads) * self.layout.expert_bytes(layer)
        loads = [self._start(load, DEMAND) for load in plan.loads]
        hits = [self._hold(key, slot) for key, slot in plan.hits]
        return sorted(hits, key=lambda held: held.ready is not None) + loads

    def prefetch(self, layer: int, experts: Sequence[int], pinned: Collection[int]) -> None:
        """Start loading what ``layer`` is expected to use, as far as unpinned slots go."""
        room = self.cache.pool(layer).slots - len(pinned)
        loads = self.cache.prefetch(layer, experts[: max(0, room)], pinned)
        self.bytes_prefetch += len(loads) * self.layout.expert_bytes(layer)
        for load in loads:
            self._start(load, PREFETCH)

    def used(self, held: Iterable[Held], event: Event) -> None:
        """The kernels that read ``held`` come before ``event``: until then their slots are not overwritten."""
        for one in held:
            self._touched[one.slot] = event
            if self._notes:
                self.places[one.key] = [address_of(one.matrices[name]) for name in MATRICES]

    def seen(self, layer: int, experts: Sequence[int]) -> None:
        """An event has used ``experts``, which all had ``places``."""
        plan = self.cache.access(layer, experts)
        assert not plan.loads, "an expert had a place and was not resident"

    def wait(self, stream: Any, ready: Any, reason: str) -> None:
        """Work of ``stream`` from here on waits for a load; raises what kept it from being begun."""
        self.transport.wait(stream, ready, reason)

    def counters(self) -> dict[str, int]:
        """Hits, misses, evictions and bytes over all size classes since they were last reset.

        A load is a hit of page-locked memory unless it had to be read first; it is not asked where the device decides.
        """
        pools, before = self.cache.pools, self.transport.pools
        loads, read = (sum(p.counters.misses + p.counters.prefetched for p in some) for some in (pools, before))
        return {
            "host_hits": max(0, loads - read) if before else 0,
            "host_misses": read,
            "hits": sum(p.counters.hits for p in pools),
            "misses": sum(p.counters.misses for p in pools),
            "evictions": sum(p.counters.evictions for p in pools),
            "late": self.late,
            "bytes_demand": self.bytes_demand,
            "bytes_prefetch": self.bytes_prefetch,
            "bytes_wasted": sum(p.counters.wasted * self.layout.slab_bytes(i) for i, p in enumerate(pools)),
        }

    def recover(self) -> None:
        """After a failure, with the queue idle: forget experts whose load failed, and all events."""
        for key, event in self._loading.items():
            if getattr(event, "error", None) is not None:
                self.cache.forget(key)
                self.places[key] = 0
        self._loading.clear()
        self._touched.clear()
        self.transport.recover()

    def settle(self) -> None:
        """Wait until all loads have ended. What failed was fetched ahead and is forgotten: nobody has missed it yet."""
        for event in self._loading.values():
            with suppress(OSError):
                event.synchronize()
        self.recover()

    def adopt(self) -> None:
        """With the device idle: in the slots is what the cache says, whoever brought it."""
        for pool in self.cache.pools:
            self._matrices |= {slot: self._describe(key, self._slots[slot]) for key, slot in pool.slot_of.items()}

    def empty(self) -> None:
        """With the queue idle: no expert is resident, and the policy has seen nothing."""
        self.cache = self.cache.fresh()
        self.places[:] = 0
        self._loading.clear()
        self._touched.clear()
        self.transport.empty()

    def _hold(self, key: int, slot: int) -> Held:
        event = self._loading.get(key)
        if event is not None and event.done():
            if event.error is not None:
                raise event.error
            del self._loading[key]
            event = None
        if event is not None:
            self.late += 1
            self.transport.promote(event, DEMAND)
        return Held(key, key % self.cache.expert_count, slot, event, self._matrices[slot])

    def _start(self, load: Load, urgency: int) -> Held:
        self.places[load.key] = 0
        if load.evicted is not None:
            self.places[load.evicted] = 0
            pending = self._loading.pop(load.evicted, None)
            if pending is not None:  # an unused prefetch not here yet: it must not queue behind its successor
                self.transport.promote(pending, urgency)
        memory = self._slots[load.slot]
        event = self.transport.start(load.key, memory, urgency, self._touched.get(load.slot))
        self._loading[load.key] = self._touched[load.slot] = event
        self._matrices[load.slot] = self._describe(load.key, memory)
        return Held(load.key, load.key % self.cache.expert_count, load.slot, event, self._matrices[load.slot])

    def _describe(self, key: int, memory: Any) -> dict[str, Matrix]:
        tensors = self.layout.layers[key // self.layout.expert_count]
        views = self.store.views(key, memory)
        return {name: Matrix(t.type, t.rows, t.cols, views[name]) for name, t in zip(MATRICES, tensors, strict=True)}
