"""The rules that a kernel can follow, as two tables of integers: what a key is worth, and when it was last touched.

``Tabled(geometry, "lfu")`` decides what ``POLICIES["lfu"]`` decides, key for key. resolve.cu does the same with the
same tables on a device, so that they can be handed over in the middle of a text. A victim costs O(residents): this is
for prompts, and to be read beside the kernel.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from moe_cupy.cache.policies import Geometry, Policy, Scores
from moe_cupy.cache.ranked import one_more_use


class Rule(NamedTuple):
    """What changes the tables; the victim is always the resident of the lowest (uses, last touch)."""

    number: int  # in resolve.cu
    counts: bool = False  # a use is counted,
    decays: bool = False  # and its worth halves
    touched_in_use: str = "residents"  # who is touched when used: "all", "residents" or "nobody"


RULES = {
    "lru": Rule(0),
    "fifo": Rule(1, touched_in_use="nobody"),
    "lfu": Rule(2, counts=True, touched_in_use="all"),
    "decayed-lfu": Rule(3, counts=True, decays=True),
}


class Tabled(Policy):
    """``profile`` (uses of every key, known beforehand) makes of "lru" a static hot set, whose order uses decide."""

    def __init__(self, geometry: Geometry, rule: str, profile: Sequence[int] | None = None) -> None:
        pairs = geometry.layers * geometry.experts
        self.rule = RULES[rule]
        self.uses, self.last = list(profile or [0] * pairs), [0] * pairs
        self.now = self.token = 0
        self.layer = -1
        self.resident: set[int] = set()

    def begin(self, layer: int, keys: Sequence[int], scores: Scores | None = None) -> None:
        self.token += layer <= self.layer
        self.layer = layer
        for key in keys:
            if self.rule.decays:
                self.uses[key] = one_more_use(self.uses[key], self.token)
            else:
                self.uses[key] += self.rule.counts
            who = self.rule.touched_in_use
            if who == "all" or (who == "residents" and key in self.resident):
                self._touch(key)

    def admit(self, key: int) -> None:
        if self.rule.touched_in_use != "all" or not self.last[key]:
            self._touch(key)
        self.resident.add(key)

    def evict(self, key: int) -> None:
        self.resident.remove(key)

    def victim(self, pinned: Collection[int]) -> int | None:
        free = (key for key in self.resident if key not in pinned)
        return min(free, key=lambda key: (self.uses[key], self.last[key]), default=None)

    def _touch(self, key: int) -> None:
        self.now += 1
        self.last[key] = self.now
