"""How expert bytes get into a slot: straight from the file, or through page-locked memory of the host.

A transport executes loads; which expert goes into which slot was decided before. A load never blocks the caller and
never writes into a slot (or slab) before what touched it last is over. ``Arrival`` and a queue's event look alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

from moe_cupy.cache import ExpertCache, Load, Pool
from moe_cupy.device.base import Device, DeviceError, Event
from moe_cupy.device.threads import ThreadEvent
from moe_cupy.store import ExpertStore

DEMAND, PREFETCH = 0, 1  # urgency of a load
CHUNK = 1 << 30  # bytes of page-locked memory asked for at once
IN_SLOT, READ = "slot in use", "expert-read"


class Transport(Protocol):
    """Executes loads; the events are of its own kind. ``pools`` are those of a tier before the device's, if any."""

    @property
    def pools(self) -> tuple[Pool, ...]: ...

    def start(self, key: int, memory: Any, urgency: int, touched: Any) -> Any:
        """Bring expert ``key`` into a slot's ``memory`` once the event ``touched`` (or None) is over."""

    def promote(self, event: Any, urgency: int) -> None:
        """Make a load that has not begun more urgent."""

    def wait(self, stream: Any, event: Any, reason: str) -> None:
        """Work of ``stream`` from here on waits for a load."""

    def recover(self) -> None:
        """After a failure, with everything idle: forget loads that failed."""

    def empty(self) -> None:
        """With everything idle: forget what was loaded."""


class Direct:
    """Slots are host memory: a worker reads the file into them."""

    pools: tuple[Pool, ...] = ()

    def __init__(self, device: Device, store: ExpertStore, in_flight: int):
        self._store = store
        self.queue = device.workers(READ, in_flight)

    def start(self, key: int, memory: Any, urgency: int, touched: Any) -> Event:
        return self.queue.submit(self._store.parts(key, memory), urgency, touched, f"load {key}")

    def promote(self, event: Event, urgency: int) -> None:
        self.queue.promote(event, urgency)

    def wait(self, stream: Any, event: Event, reason: str) -> None:
        stream.wait(event, reason)

    def recover(self) -> None:
        pass

    def empty(self) -> None:
        pass


class Arrival:
    """An expert on its way to the device: read by a worker (perhaps), given to the copy stream by another, copied."""

    def __init__(self, key: int, read: ThreadEvent | None):
        self.key, self.read = key, read
        self.issued: Any  # ThreadEvent: the copy is in the copy stream, or has failed before
        self.copied: Event | None = None  # known once issued

    @property
    def error(self) -> BaseException | None:
        return self.issued.error or getattr(self.copied, "error", None)

    def done(self) -> bool:
        return self.issued.done() and (self.copied is None or self.copied.done())

    def synchronize(self) -> None:
        self.issued.synchronize()
        assert self.copied is not None
        self.copied.synchronize()


def after_all(events: Iterable[ThreadEvent | None]) -> ThreadEvent | None:
    """An event that happens once all of these have; None if all have."""
    pending = [event for event in events if event is not None and not event.done()]
    if len(pending) < 2:
        return pending[0] if pending else None
    joined, left = ThreadEvent(), iter(pending[1:])

    def next_one() -> None:
        event = next(left, None)
        event.then(next_one) if event is not None else joined.finish()

    pending[0].then(next_one)
    return joined


class HostTier:
    """Experts in page-locked memory under a policy of their own; it sees what the device's slots miss."""

    def __init__(self, device: Device, store: ExpertStore, slabs: list[Any], cache: ExpertCache, in_flight: int):
        self.cache, self._store, self.slabs = cache, store, slabs
        self._queue = device.workers(READ, in_flight)
        self._reading: dict[int, Any] = {}  # key -> its read, until seen done
        self._left_by: dict[int, Arrival] = {}  # slab -> the last copy out of it

    def find(self, key: int, urgency: int) -> tuple[int, Any, ThreadEvent | None]:
        """(slab, its memory, the read that fills it or None) of an expert; reads it if it is not here."""
        layer, expert = divmod(key, self.cache.expert_count)
        plan = self.cache.access(layer, [expert])
        if plan.hits:
            read = self._reading.get(key)
            if read is not None and read.done():
                del self._reading[key]
                read = read if read.error is not None else None
            return plan.hits[0][1], self.slabs[plan.hits[0][1]], read
        return self._read(plan.loads[0], urgency)

    def find_all(self, layer: int, experts: Sequence[int]) -> list[Any]:
        """The reads that bring those of ``experts`` that are not here, all of which will be here together."""
        return [self._read(load, DEMAND)[2] for load in self.cache.access(layer, experts).loads]

    def _read(self, load: Load, urgency: int) -> tuple[int, Any, ThreadEvent | None]:
        """The same of an expert that has to be read."""
        key = load.key
        memory, last = self.slabs[load.slot], self._left_by.get(load.slot)
        older = self._reading.pop(load.evicted, None) if load.evicted is not None else None
        if older is not None:
            self._queue.promote(older, urgency)
        after = after_all([older, last.issued if last is not None else None])
        self._reading[key] = self._queue.submit(self._parts(key, memory, last), urgency, after, f"load {key}")
        return load.slot, memory, self._reading[key]

    def leaves(self, slab: int, arrival: Arrival) -> None:
        """``arrival`` is copied out of this slab, which until then must stay as it is."""
        self._left_by[slab] = arrival

    def promote(self, read: ThreadEvent | None, urgency: int) -> None:
        if read is not None:
            self._queue.promote(read, urgency)

    def recover(self) -> None:
        """With everything idle: forget experts whose read failed."""
        for key, read in self._reading.items():
            if read.error is not None:
                self.cache.forget(key)
        self._reading.clear()
        self._left_by.clear()

    def empty(self) -> None:
        """With everything idle: no expert is here."""
        self.cache = self.cache.fresh()
        self._reading.clear()
        self._left_by.clear()

    def _parts(self, key: int, memory: Any, last: Arrival | None) -> list[Callable[[], None]]:
        """The reads into a slab, each of which waits, on a worker's time, until the slab is copied out of."""

        def when_copied(part: Callable[[], None]) -> None:
            if last is not None and last.copied is not None:
                last.copied.synchronize()
            part()

        return [partial(when_copied, part) for part in self._store.parts(key, memory)]


class TwoTiers:
    """File -> page-locked memory -> slots of the device, the second by a copy stream, one expert a copy.

    A worker gives copies to the stream, the most urgent first. It lets one prefetch be over before it takes the next
    copy, so a demand load is never behind more than one of them.
    """

    def __init__(self, device: Device, tier: HostTier):
        self.tier, self._device = tier, device
        self._stream = device.stream("copy")
        self._queue = device.workers("copy", 1)

    @property
    def pools(self) -> tuple[Pool, ...]:
        return self.tier.cache.pools

    def start(self, key: int, memory: Any, urgency: int, touched: Any) -> Arrival:
        slab, source, read = self.tier.find(key, urgency)
        arrival = Arrival(key, read)
        earlier = touched.issued if isinstance(touched, Arrival) else None  # of the same stream: that is all
        kernel = None if isinstance(touched, Arrival) else touched

        def give() -> None:
            if read is not None and read.error is not None:
                raise read.error
            if kernel is not None:
                self._stream.wait(kernel, IN_SLOT)
            self._device.copy_async(memory, source, self._stream)
            arrival.copied = self._stream.record()
            if urgency == PREFETCH:
                arrival.copied.synchronize()

        arrival.issued = self._queue.submit(give, urgency, after_all([read, earlier]), f"copy {key}")
        self.tier.leaves(slab, arrival)
        return arrival

    def promote(self, event: Arrival, urgency: int) -> None:
        self.tier.promote(event.read, urgency)
        self._queue.promote(event.issued, urgency)

    def wait(self, stream: Any, event: Arrival, reason: str) -> None:
        """The host waits until the copy is in its stream, which takes long only if the file has to be read."""
        event.issued.synchronize()
        assert event.copied is not None
        stream.wait(event.copied, reason)

    def recover(self) -> None:
        self.tier.recover()

    def empty(self) -> None:
        self.tier.empty()


def page_locked(device: Device, size: int, count: int, least: int) -> list[Any]:
    """Up to ``count`` slabs of ``size`` bytes, as many as the system locks; raises DeviceError below ``least``."""
    slabs: list[Any] = []
    step = max(1, CHUNK // size)
    while len(slabs) < count:
        step = min(step, count - len(slabs))
        try:
            memory = device.pinned(size * step)
        except (DeviceError, MemoryError) as error:
            if step == 1:
                if len(slabs) >= least:
                    break
                raise DeviceError(
                    f"only {len(slabs)} of at least {least} experts of {size} bytes could be page-locked: {error}; "
                    f"free memory, or raise the limit (ulimit -l)"
                ) from error
            step //= 2
            continue
        slabs += [memory[i * size : (i + 1) * size] for i in range(step)]
    return slabs
