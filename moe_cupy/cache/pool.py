"""The expert cache as integers: which key holds which slot, and what an event must load and evict.

Nothing here knows about bytes in memory, devices or time: the same calls in the same order give the
same decisions in the simulator, in a notebook and in the runtime. *Event-atomic*: one event is one
layer of one forward pass; hits are counted against what was resident when it began.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moe_cupy.cache.policies import Geometry, Policy, Scores


class Load(NamedTuple):
    """Bring ``key`` into ``slot``, which ``evicted`` leaves (None: the slot was free)."""

    key: int
    slot: int
    evicted: int | None


class Plan(NamedTuple):
    """What one event needs: ``hits`` are (key, slot) already resident, ``loads`` are the misses."""

    hits: tuple[tuple[int, int], ...]
    loads: tuple[Load, ...]


@dataclass(slots=True)
class Counters:
    """What happened in a pool, in experts."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    prefetched: int = 0
    wasted: int = 0  # prefetched, then evicted unused


class Pool:
    """Slots of one size class under one policy. Slots are numbered from ``first_slot``."""

    def __init__(self, slots: int, policy: Policy, first_slot: int = 0):
        self.slots, self.policy = slots, policy
        self.slot_of: dict[int, int] = {}  # resident key -> slot
        self.unused: set[int] = set()  # prefetched, not used since
        self.counters = Counters()
        self._free = list(range(first_slot + slots - 1, first_slot - 1, -1))

    def access(
        self, layer: int, keys: Sequence[int], pinned: Collection[int] = (), scores: Scores | None = None
    ) -> Plan:
        """One event uses ``keys``; ``pinned`` (beside ``keys``) may not be evicted.

        Raises ValueError, and changes nothing, if ``keys`` and ``pinned`` together do not leave room.
        """
        slot_of = self.slot_of
        in_use = len({*keys, *(key for key in pinned if key in slot_of)}) if pinned else len(keys)
        if in_use > self.slots:
            raise ValueError(f"{in_use} experts are in use at once, but there are only {self.slots} slots")
        hits = tuple([(key, slot_of[key]) for key in keys if key in slot_of])
        missing = [key for key in keys if key not in slot_of] if len(hits) < len(keys) else ()
        victims = self.policy.event(layer, keys, missing, len(self._free), pinned, scores)
        if self.unused:
            self.unused.difference_update(keys)
        loads = self._exchange(missing, victims)
        assert len(loads) == len(missing), "the policy gave no victim though there is one"
        self.counters.hits += len(hits)
        self.counters.misses += len(loads)
        return Plan(hits, loads)

    def prefetch(self, keys: Sequence[int], pinned: Collection[int]) -> tuple[Load, ...]:
        """Bring ``keys`` in ahead of their use, in this order, as far as unpinned slots go."""
        incoming = [key for key in keys if key not in self.slot_of]
        loads = self._exchange(incoming, self.policy.exchange(incoming, len(self._free), {*keys, *pinned}))
        self.unused.update(load.key for load in loads)
        self.counters.prefetched += len(loads)
        return loads

    def forget(self, key: int) -> None:
        """Drop ``key`` without a successor: its slot is free again (a load failed)."""
        if key in self.slot_of:
            self.unused.discard(key)
            self.policy.evict(key)
            self._free.append(self.slot_of.pop(key))

    def restore(self, slot_of: Mapping[int, int], unused: Iterable[int]) -> None:
        """Residents as somebody else has decided, who also told the policy."""
        free = set(self.slot_of.values()) | set(self._free)
        self.slot_of, self.unused = dict(slot_of), set(unused)
        self._free = sorted(free - set(self.slot_of.values()), reverse=True)

    def _exchange(self, incoming: Sequence[int], victims: Sequence[int]) -> tuple[Load, ...]:
        """Who gets which slot: the free ones first, then those of the victims."""
        if not incoming:
            return ()
        slot_of, free = self.slot_of, min(len(self._free), len(incoming))
        slots = [self._free.pop() for _ in range(free)] if free else []
        slots += [slot_of.pop(key) for key in victims]
        who: Sequence[int | None] = [*[None] * free, *victims] if free else victims
        loads = tuple(map(Load._make, zip(incoming, slots, who, strict=False)))  # the last may have found no slot
        slot_of.update(zip(incoming, slots, strict=False))
        self.counters.evictions += len(victims)
        if self.unused:
            self.counters.wasted += len(self.unused.intersection(victims))
            self.unused.difference_update(victims)
        return loads


class ExpertCache:
    """One pool a size class. ``class_of_layer[layer]`` says which pool a layer's experts live in."""

    def __init__(
        self,
        expert_count: int,
        class_of_layer: Sequence[int],
        slots: Sequence[int],
        policy: Callable[[Geometry], Policy],
    ):
        self.expert_count = expert_count
        self.class_of_layer = tuple(class_of_layer)
        first = [sum(slots[:i]) for i in range(len(slots))]
        shape = len(self.class_of_layer), expert_count
        self.pools = tuple(Pool(n, policy(Geometry(n, *shape)), at) for n, at in zip(slots, first, strict=True))
        self._made_of = expert_count, class_of_layer, slots, policy

    def fresh(self) -> ExpertCache:
        """One of the same shape that has seen nothing yet."""
        return ExpertCache(*self._made_of)

    def key(self, layer: int, expert: int) -> int:
        """The integer name of a routed expert."""
        return layer * self.expert_count + expert

    def pool(self, layer: int) -> Pool:
        """The pool that holds this layer's experts."""
        return self.pools[self.class_of_layer[layer]]

    def begin_sequence(self) -> None:
        """A new sequence begins; residents stay."""
        for pool in self.pools:
            pool.policy.begin_sequence()

    def access(
        self, layer: int, experts: Sequence[int], pinned: Collection[int] = (), scores: Scores | None = None
    ) -> Plan:
        """One event: ``layer`` uses ``experts`` (distinct ids)."""
        first = layer * self.expert_count
        return self.pool(layer).access(layer, [first + expert for expert in experts], pinned, scores)

    def prefetch(self, layer: int, experts: Sequence[int], pinned: Collection[int]) -> tuple[Load, ...]:
        """Expect that ``layer`` will use ``experts``, likeliest first."""
        return self.pool(layer).prefetch([self.key(layer, e) for e in experts], pinned)

    def forget(self, key: int) -> None:
        """A load of ``key`` failed: it is not resident."""
        self.pool(key // self.expert_count).forget(key)

    def resident(self) -> int:
        """How many experts are resident (or on their way)."""
        return sum(len(pool.slot_of) for pool in self.pools)
