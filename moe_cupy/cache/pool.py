"""The expert cache as integers: which key holds which slot, and what an event must load and evict.

Nothing here knows about bytes in memory, devices or time: the same calls in the same order give the
same decisions in the simulator, in a notebook and in the runtime. *Event-atomic*: one event is one
layer of one forward pass; hits are counted against what was resident when it began.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from moe_cupy.cache.policies import Geometry, Policy, Scores


@dataclass(frozen=True, slots=True)
class Load:
    """Bring ``key`` into ``slot``, which ``evicted`` leaves (None: the slot was free)."""

    key: int
    slot: int
    evicted: int | None


@dataclass(frozen=True, slots=True)
class Plan:
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
        keep = {*keys, *(key for key in pinned if key in self.slot_of)}
        if len(keep) > self.slots:
            raise ValueError(f"{len(keep)} experts are in use at once, but there are only {self.slots} slots")
        hits = tuple((key, self.slot_of[key]) for key in keys if key in self.slot_of)
        missing = [key for key in keys if key not in self.slot_of]
        self.policy.begin(layer, keys, scores)
        self.unused.difference_update(keys)
        loads = tuple(load for key in missing if (load := self._admit(key, keep)) is not None)
        assert len(loads) == len(missing), "the policy gave no victim though there is one"
        self.counters.hits += len(hits)
        self.counters.misses += len(loads)
        return Plan(hits, loads)

    def prefetch(self, keys: Sequence[int], pinned: Collection[int]) -> tuple[Load, ...]:
        """Bring ``keys`` in ahead of their use, in this order, as far as unpinned slots go."""
        keep = {*keys, *pinned}
        loads = []
        for key in keys:
            if key in self.slot_of:
                continue
            load = self._admit(key, keep)
            if load is None:
                break
            self.unused.add(key)
            loads.append(load)
        self.counters.prefetched += len(loads)
        return tuple(loads)

    def forget(self, key: int) -> None:
        """Drop ``key`` without a successor: its slot is free again (a load failed)."""
        if key in self.slot_of:
            self.unused.discard(key)
            self._free.append(self._leave(key))

    def _admit(self, key: int, keep: Collection[int]) -> Load | None:
        evicted = None
        if not self._free:
            evicted = self.policy.victim(keep)
            if evicted is None:
                return None
            self.counters.evictions += 1
            self._free.append(self._leave(evicted))
        slot = self._free.pop()
        self.slot_of[key] = slot
        self.policy.admit(key)
        return Load(key, slot, evicted)

    def _leave(self, key: int) -> int:
        self.policy.evict(key)
        if key in self.unused:
            self.unused.remove(key)
            self.counters.wasted += 1
        return self.slot_of.pop(key)


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
        return self.pool(layer).access(layer, [self.key(layer, e) for e in experts], pinned, scores)

    def prefetch(self, layer: int, experts: Sequence[int], pinned: Collection[int]) -> tuple[Load, ...]:
        """Expect that ``layer`` will use ``experts``, likeliest first."""
        return self.pool(layer).prefetch([self.key(layer, e) for e in experts], pinned)

    def forget(self, key: int) -> None:
        """A load of ``key`` failed: it is not resident."""
        self.pool(key // self.expert_count).forget(key)

    def resident(self) -> int:
        """How many experts are resident (or on their way)."""
        return sum(len(pool.slot_of) for pool in self.pools)
