"""The pools of the expert cache, where the device decides: its integers there, and how they come and go.

The host's cache (``mover``) and the device's tables are the same pools at different times. ``to_device`` and
``to_host`` hand them over with everything that the rule remembers, so that neither sees that the other was at work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from moe_cupy.cache import Pool
from moe_cupy.cache.ranked import POWERS
from moe_cupy.cache.tabled import Tabled
from moe_cupy.compiled.echo import CompiledEcho
from moe_cupy.engine.echo_memory import EchoMemory, take
from moe_cupy.engine.experts import ExpertMover
from moe_cupy.engine.transport import DEMAND, TwoTiers
from moe_cupy.kernels.cuda import launches as to
from moe_cupy.kernels.cuda.expert_ops import Resident
from moe_cupy.kernels.cuda.launches import BY_KEY, NO_HALT, STATE, Halt, Launch, Residency
from moe_cupy.kernels.matrix import Matrix
from moe_cupy.store import MATRICES, Packed

SLOT, USES, LAST, UNUSED = (BY_KEY.index(name) for name in ("slot", "uses", "last", "unused"))


@dataclass(frozen=True, slots=True)
class DevicePool:
    """The slots of one size class, and the integers that say what is in them."""

    residency: Residency
    resident: Resident
    slots: int
    first_slot: int  # of the host's numbers
    slot_at: Any  # uint64 [slots]: where slots begin
    source_of: Any  # uint64 [keys]: where experts lie in host memory
    slab_bytes: int
    echo: EchoMemory | None  # where that policy decides

    def fill(self, loads: Any, late: bool = False) -> Launch:
        """Bring loads [1 + 3 used] into their slots."""
        return to.fill(self.slot_at, self.source_of, loads, self.slab_bytes, late)


class DevicePools:
    """All size classes. ``may_halt``: page-locked memory does not hold every expert."""

    def __init__(self, device: Any, packed: Packed, mover: ExpertMover, used: int):
        assert isinstance(mover.transport, TwoTiers)
        self.device, self.mover, self.tier, self._layout = device, mover, mover.transport.tier, packed.layout
        self.stream, self._keys = device.stream("compute"), len(packed.layout.layers) * packed.layout.expert_count
        self.may_halt = sum(pool.slots for pool in self.tier.cache.pools) < packed.layout.expert_total()
        self._sources = self._sent(np.zeros(self._keys, np.uint64))
        self.halt = self._halt(used) if self.may_halt else NO_HALT
        self._told: tuple[np.ndarray, ...] = ()  # halt and log as last fetched
        self._powers = self._sent(np.array(POWERS, np.int64))
        self._pools = [self._device_pool(packed, index) for index in range(len(packed.layout.classes))]
        self._is_here = False  # whether the device decides now
        self.fill_tier()

    def of_layer(self, layer: int) -> DevicePool:
        """Where a layer's experts live."""
        return self._pools[self._layout.class_of_layer[layer]]

    def fill_tier(self) -> None:
        """Where all experts can be in page-locked memory: read them all."""
        if not self.may_halt:
            reads = [self.tier.find(key, DEMAND)[2] for key in self._all_keys()]
            for read in reads:
                if read is not None:
                    read.synchronize()
            self.tier.recover()

    def empty(self) -> None:
        """The mover was emptied: so is all that is here."""
        self._is_here = False
        self.fill_tier()

    def recover(self) -> None:
        """After a failure, with everything idle: a read that failed may have taken the place of an expert."""
        if self._is_here and self.may_halt:
            self._send_sources()

    # The two ways.

    def to_device(self) -> None:
        """From here on the device decides."""
        if self._is_here:
            return
        self.mover.settle()
        for pool, there in zip(self.mover.cache.pools, self._pools, strict=True):
            for target, values in zip(_arrays(there.residency), tables_of(pool, there), strict=True):
                self.device.put(target, values, self.stream)
            if there.echo is not None:
                there.echo.give(pool.policy, self.stream)  # type: ignore[arg-type]
        self._send_sources()
        self._is_here = True

    def to_host(self) -> None:
        """From here on the host decides; waits for the device."""
        if not self._is_here:
            return
        fetch = partial(self.device.fetch, stream=self.stream)
        got = [
            [fetch(f"table {j} of pool {i}", table) for j, table in enumerate(_arrays(pool.residency))]
            for i, pool in enumerate(self._pools)
        ]
        echoes = [p.echo.fetch(f"echo {i}", self.stream) if p.echo else None for i, p in enumerate(self._pools)]
        self.stream.record().synchronize()
        for pool, memory in zip(self.mover.cache.pools, echoes, strict=True):
            if memory is not None:
                take(pool.policy, *memory)  # type: ignore[arg-type]
        for index, (arrays, there) in enumerate(zip(got, self._pools, strict=True)):
            counted = take_tables(self.mover.cache.pools[index], there, *arrays)
            slab = self._layout.slab_bytes(index)
            self.mover.bytes_demand += slab * counted["misses"]
            self.mover.bytes_prefetch += slab * counted["prefetched"]
        self.mover.adopt()
        self._is_here = False

    # Where a token may halt.

    def begin_token(self) -> None:
        """Nothing is missing, nothing was loaded."""
        if self.may_halt:
            for array in (self.halt.halt, self.halt.log):
                self.device.put(array, np.zeros(array.shape, np.int32), self.stream)

    def halted_at(self) -> int | None:
        """The layer that lacked an expert, if there may be one; waits, and tells the tier what was loaded before."""
        if not self.may_halt:
            return None
        arrays = ("halt", self.halt.halt), ("log", self.halt.log)
        self._told = halt, log = tuple(self.device.fetch(name, array, self.stream) for name, array in arrays)
        self.stream.record().synchronize()
        for key in log[1 : 1 + log[0]].tolist():
            self.tier.find(key, DEMAND)
        return int(halt[0]) - 1 if halt[0] else None

    def read_missing(self, layer: int) -> None:
        """Read what an event wants and memory lacks, with the device idle; the token may go on then."""
        experts = [int(e) for e in self._told[0][1:] if e >= 0]
        for read in self.tier.find_all(layer, experts):
            read.synchronize()
        self.tier.recover()
        self._send_sources()
        self.begin_token()

    def _halt(self, used: int) -> Halt:
        most = 2 * used * len(self._layout.layers)  # loads of a token, those ahead too
        return Halt(self._sources, *(self.device.array((1 + n,), np.int32) for n in (used, most)))

    def _send_sources(self) -> None:
        sources = np.zeros(self._keys, np.uint64)
        for pool in self.tier.cache.pools:
            for key, slab in pool.slot_of.items():
                sources[key] = self.device.address(self.tier.slabs[slab])
        self.device.put(self._sources, sources, self.stream)

    # Making.

    def _all_keys(self) -> list[int]:
        experts = self._layout.expert_count
        return [layer * experts + e for layer, some in enumerate(self._layout.layers) if some for e in range(experts)]

    def _sent(self, values: np.ndarray) -> Any:
        return self.device.upload(values).view(values.dtype).reshape(values.shape)

    def _device_pool(self, packed: Packed, index: int) -> DevicePool:
        pool, size, at = self.mover.cache.pools[index], packed.slot_bytes(index), packed.offsets(index)
        first = sum(p.slots for p in self.mover.cache.pools[:index])
        memory = self.mover.slots[first : first + pool.slots]
        begins = np.array([self.device.address(slot) for slot in memory], np.uint64)
        shapes = {n: Matrix(t.type, t.rows, t.cols, memory[0][: t.nbytes])
                  for n, t in zip(MATRICES, packed.layout.classes[index], strict=True)}  # fmt: skip
        tables: Mapping[str, Any] = {n: self._sent(begins + np.uint64(at[i])) for i, n in enumerate(MATRICES)}
        echo = EchoMemory(self.device, pool.policy) if isinstance(pool.policy, CompiledEcho) else None
        residency = Residency(
            self._sent(np.zeros(len(STATE), np.int64)), self._sent(np.zeros((self._keys, len(BY_KEY)), np.int64)),
            self._sent(np.zeros(pool.slots, np.int32)), self._powers,
            pool.policy.rule.number if isinstance(pool.policy, Tabled) else 0, echo.arrays if echo else None,
        )  # fmt: skip
        return DevicePool(
            residency, Resident(tables, shapes), pool.slots, first, self._sent(begins), self._sources, size, echo
        )


def _arrays(residency: Residency) -> tuple[Any, Any, Any]:
    return residency.state, residency.by_key, residency.key_of


def tables_of(pool: Pool, there: DevicePool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A pool of the host as the device's ``state``, ``by_key`` and ``key_of``."""
    policy, state = pool.policy, np.zeros(len(STATE), np.int64)
    by_key, key_of = np.zeros(there.residency.by_key.shape, np.int64), np.full(there.slots, -1, np.int32)
    by_key[:, SLOT] = -1
    if isinstance(policy, Tabled):
        by_key[:, USES], by_key[:, LAST] = policy.uses, policy.last
        state[:3] = policy.now, policy.token, policy.layer
    for key, slot in pool.slot_of.items():
        by_key[key, SLOT] = slot - there.first_slot
        key_of[slot - there.first_slot] = key
    by_key[list(pool.unused), UNUSED] = 1
    return state, by_key, key_of


def take_tables(
    pool: Pool, there: DevicePool, state: np.ndarray, by_key: np.ndarray, key_of: np.ndarray
) -> dict[str, int]:
    """The other way; what was counted meanwhile is added to the pool's counters, and returned."""
    policy, counted = pool.policy, dict(zip(STATE, state.tolist(), strict=True))
    slot_of = {int(key): slot + there.first_slot for slot, key in enumerate(key_of) if key >= 0}
    if isinstance(policy, Tabled):
        policy.now, policy.token, policy.layer = state[:3].tolist()
        policy.uses, policy.last, policy.resident = by_key[:, USES].tolist(), by_key[:, LAST].tolist(), set(slot_of)
    pool.restore(slot_of, np.flatnonzero(by_key[:, UNUSED]).tolist())
    for name in ("hits", "misses", "evictions", "prefetched", "wasted"):
        setattr(pool.counters, name, getattr(pool.counters, name) + counted[name])
    return counted
