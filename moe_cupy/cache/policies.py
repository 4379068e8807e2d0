"""Replacement policies: which resident expert to give up. Integers and floats, no clock, no threads.

A key is ``layer * experts + expert``. The cache tells a policy four things: a sequence begins
(``begin_sequence``), an event is about to use these keys (``begin``), a key became resident (``admit``),
a key left (``evict``). It asks one: whom to give up (``victim``). ``event`` is all of that for a whole event, in one
call. The simulator, the notebooks and the runtime use these same objects. This file holds what a policy is and the
two textbook rules.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import NamedTuple


class Geometry(NamedTuple):
    """What a policy is made for: slots of its pool, layers and experts a layer of the model."""

    slots: int
    layers: int
    experts: int


class Scores(NamedTuple):
    """What the router of an event said, where that is known; an event of several tokens has none."""

    weights: Sequence[float] | None = None  # of the event's keys, in their order
    router: Sequence[float] | None = None  # probability of every expert of the layer


class Policy(ABC):
    """A replacement rule, as a pool of slots needs to know it."""

    wants_scores = False  # whether ``begin`` has a use for scores

    def begin_sequence(self) -> None:  # noqa: B027
        """What follows has nothing to do with the tokens so far; most rules do not care."""

    @abstractmethod
    def begin(self, layer: int, keys: Sequence[int], scores: Scores | None = None) -> None:
        """One event: a layer of a forward pass is about to use ``keys`` (resident or not).

        A layer that does not come after the one before begins a new pass (decoding: a new token).
        """

    @abstractmethod
    def admit(self, key: int) -> None:
        """``key`` became resident, by demand or by prefetch."""

    @abstractmethod
    def evict(self, key: int) -> None:
        """``key`` is no longer resident."""

    @abstractmethod
    def victim(self, pinned: Collection[int]) -> int | None:
        """A resident key to give up, never one of ``pinned``; None if there is none."""

    def exchange(self, incoming: Sequence[int], free: int, pinned: Collection[int]) -> list[int]:
        """``incoming`` come in one after the other, ``free`` of them into free slots, each other one for a victim.

        Returns the victims in order; those who find none (all that is left is ``pinned``) stay out. ``incoming`` are
        among ``pinned``.
        """
        victims: list[int] = []
        for i, key in enumerate(incoming):
            if i >= free:
                leaving = self.victim(pinned)
                if leaving is None:
                    break
                self.evict(leaving)
                victims.append(leaving)
            self.admit(key)
        return victims

    def event(
        self,
        layer: int,
        keys: Sequence[int],
        missing: Sequence[int],
        free: int,
        pinned: Collection[int] = (),
        scores: Scores | None = None,
    ) -> list[int]:
        """``begin`` with ``keys``, then ``exchange`` for those ``missing``; nobody of ``keys`` or ``pinned`` leaves."""
        self.begin(layer, keys, scores)
        return self.exchange(missing, free, {*keys, *pinned} if pinned else keys) if missing else []


class LRU(Policy):
    """Least recently used first (the textbook); in an event hits count as used before misses, each in order of ids."""

    def __init__(self, geometry: Geometry) -> None:
        del geometry  # the rule does not depend on it
        self._order: OrderedDict[int, None] = OrderedDict()  # residents, oldest use first

    def begin(self, layer: int, keys: Sequence[int], scores: Scores | None = None) -> None:
        for key in keys:
            if key in self._order:
                self._order.move_to_end(key)

    def admit(self, key: int) -> None:
        self._order[key] = None

    def evict(self, key: int) -> None:
        del self._order[key]

    def victim(self, pinned: Collection[int]) -> int | None:
        return next((key for key in self._order if key not in pinned), None)


class Heaped(Policy):
    """For rules by which only its own uses and arrivals change what a resident is worth, and only upwards.

    The heap holds one live entry a resident. One that is out of date is replaced when it surfaces, so a use costs
    nothing and a victim O(log n).
    """

    def __init__(self) -> None:
        self._now = 0
        self._resident: set[int] = set()
        self._heap: list[tuple[float, int, int]] = []

    @abstractmethod
    def worth(self, key: int) -> tuple[float, int, int]:
        """What a resident is worth, what decides between equals, and the key; the lowest goes first."""

    def admit(self, key: int) -> None:
        self._resident.add(key)
        if len(self._heap) > 2 * len(self._resident) + 8:  # entries of those that left, never surfaced
            self._heap = [self.worth(k) for k in self._resident]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, self.worth(key))

    def evict(self, key: int) -> None:
        self._resident.remove(key)

    def victim(self, pinned: Collection[int]) -> int | None:
        passed: list[tuple[float, int, int]] = []
        found = None
        while self._heap and found is None:
            entry = heapq.heappop(self._heap)
            key = entry[2]
            if key not in self._resident:
                continue
            if entry != (worth := self.worth(key)):
                heapq.heappush(self._heap, worth)
                continue
            passed.append(entry)
            found = None if key in pinned else key
        for entry in passed:
            heapq.heappush(self._heap, entry)
        return found


class LFU(Heaped):
    """Least frequently used first, ties by least recent use; counts survive eviction."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        del geometry
        self._uses: dict[int, int] = {}
        self._last: dict[int, int] = {}

    def begin(self, layer: int, keys: Sequence[int], scores: Scores | None = None) -> None:
        for key in keys:
            self._now += 1
            self._uses[key] = self._uses.get(key, 0) + 1
            self._last[key] = self._now

    def admit(self, key: int) -> None:
        if key not in self._last:  # a prefetch of something never used: recent, but without uses
            self._now += 1
            self._last[key] = self._now
        super().admit(key)

    def worth(self, key: int) -> tuple[float, int, int]:
        return self._uses.get(key, 0), self._last[key], key
