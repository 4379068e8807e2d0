"""Policies that give every resident a number and give up the lowest; equal numbers: the use longest ago.

``Ranked`` does the bookkeeping, a rule is then a few lines: what to remember of a use, and the numbers.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Sequence

from moe_cupy.cache.policies import LRU, Geometry, Heaped, Policy, Scores

GONE = math.inf  # the number of a resident that is no victim any more
HALF_LIFE = 16  # tokens, of the decayed counts
ONE = 1 << 40  # of the fractions of decayed counts
POWERS = [round(ONE * 2 ** (i / HALF_LIFE)) for i in range(HALF_LIFE)]
CLASS_HALF_LIFE, HIGHEST_CLASS = 128, 7  # of llama.cpp's classes of uses


class Ranked(Policy):
    """Bookkeeping for rules that rank: residents in order of last use, numbers made once an event when needed."""

    def __init__(self, geometry: Geometry) -> None:
        self.layers, self.experts = geometry.layers, geometry.experts
        self.resident: dict[int, None] = {}  # in order of last use
        self.now = 0  # events
        self.token = 0  # forward passes
        self.layer = -1
        self._keys: list[int] = []
        self._numbers: list[float] = []  # of self._keys; empty until a victim is asked for
        self._arrived: list[int] = []  # since then, without a number yet

    def begin(self, layer: int, keys: Sequence[int], scores: Scores | None = None) -> None:
        self.now += 1
        self.token += layer <= self.layer
        self.layer = layer
        for key in keys:
            if key in self.resident:
                del self.resident[key]
                self.resident[key] = None
        self._keys, self._numbers, self._arrived = [], [], []
        self.use(keys, scores)

    def use(self, keys: Sequence[int], scores: Scores | None) -> None:
        """Remember that this event uses ``keys``; some rules have nothing to remember."""

    @abstractmethod
    def numbers(self, keys: Sequence[int]) -> list[float]:
        """What each of ``keys`` is worth now."""

    def admit(self, key: int) -> None:
        self.resident[key] = None
        self._arrived.append(key)

    def evict(self, key: int) -> None:
        del self.resident[key]

    def victim(self, pinned: Collection[int]) -> int | None:
        if not self._numbers:
            self._keys = list(self.resident)
            self._numbers = self.numbers(self._keys)
        elif self._arrived:
            self._keys += self._arrived
            self._numbers += self.numbers(self._arrived)
        self._arrived = []
        passed: list[tuple[int, float]] = []
        found = None
        while found is None and self._numbers and (low := min(self._numbers)) < GONE:
            at = self._numbers.index(low)
            self._numbers[at] = GONE
            key = self._keys[at]
            if key in pinned:
                passed.append((at, low))
            elif key in self.resident:
                found = key
        for at, low in passed:
            self._numbers[at] = low
        return found

    def exchange(self, incoming: Sequence[int], free: int, pinned: Collection[int]) -> list[int]:
        """All victims first, since none of ``incoming`` may be one: so nobody who comes needs a number at once."""
        victims: list[int] = []
        while len(victims) < len(incoming) - free and (leaving := self.victim(pinned)) is not None:
            self.evict(leaving)
            victims.append(leaving)
        for key in incoming[: free + len(victims)]:
            self.admit(key)
        return victims

    def distances(self) -> list[int]:
        """Layers until each layer's next turn: 1 for the next layer, L for the current one, which was just here."""
        ahead = self.layers - self.layer
        return [layer + ahead for layer in range(self.layer + 1)] + list(range(1, ahead))


class FIFO(LRU):
    """First in, first out: whoever has been resident longest, used or not."""

    def begin(self, layer: int, keys: Sequence[int], scores: Scores | None = None) -> None:
        """A use changes nothing."""


class LFRU(Ranked):
    """Least of uses / (events since the last use + 1); counts survive eviction (arXiv 2608.07911)."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._uses = [0] * geometry.layers * geometry.experts
        self._last = [0] * geometry.layers * geometry.experts

    def use(self, keys: Sequence[int], scores: Scores | None) -> None:
        for key in keys:
            self._uses[key] += 1
            self._last[key] = self.now

    def numbers(self, keys: Sequence[int]) -> list[float]:
        uses, last, now = self._uses, self._last, self.now + 1
        return [uses[key] / (now - last[key]) for key in keys]


class DecayedLFU(Heaped):
    """Fewest uses, each worth half after HALF_LIFE tokens; counts survive eviction; ties by least recent use.

    Decay spares no one, so it changes no order: kept is the sum of 2^(token / half-life) over all uses, as an integer
    (``one_more_use``), so that all devices agree.
    """

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self._token, self._layer = 0, -1
        self._count = [0] * geometry.layers * geometry.experts
        self._touched = [0] * geometry.layers * geometry.experts  # when it was used or came

    def begin(self, layer: int, keys: Sequence[int], scores: Scores | None = None) -> None:
        self._token += layer <= self._layer
        self._layer = layer
        for key in keys:
            self._count[key] = one_more_use(self._count[key], self._token)
            if key in self._resident:
                self._touch(key)

    def admit(self, key: int) -> None:
        self._touch(key)
        super().admit(key)

    def worth(self, key: int) -> tuple[float, int, int]:
        return self._count[key], self._touched[key], key

    def _touch(self, key: int) -> None:
        self._now += 1
        self._touched[key] = self._now


def one_more_use(count: int, token: int) -> int:
    """A sum of 2^(token / HALF_LIFE) with one more addend. 0 is none; else (e + 1) 2^40 + f says 2^e (1 + f / 2^40).

    Greater sums are greater integers. What is below 2^-40 of the sum is dropped.
    """
    exponent, whole = token // HALF_LIFE, POWERS[token % HALF_LIFE]
    if count:
        before, old = count // ONE - 1, count % ONE + ONE
        higher = max(exponent, before)
        whole, exponent = (whole >> higher - exponent) + (old >> higher - before), higher
    if whole >= 2 * ONE:
        whole, exponent = whole >> 1, exponent + 1
    return exponent * ONE + whole


def one_more(count: float, now: float) -> float:
    """log2 of a decayed count, plus the half-lives passed at its last use, after one more use ``now``."""
    return now + math.log2(1 + 2 ** (count - now))


class UseClass(Ranked):
    """llama.cpp's expert cache: longest unused, its age divided by 2^class; class = log2 of decayed uses, 0 to 7."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._count = [-GONE] * geometry.layers * geometry.experts
        self._last = [0] * geometry.layers * geometry.experts

    def use(self, keys: Sequence[int], scores: Scores | None) -> None:
        for key in keys:
            self._count[key] = one_more(self._count[key], self.token / CLASS_HALF_LIFE)
            self._last[key] = self.now

    def numbers(self, keys: Sequence[int]) -> list[float]:
        now, last, count, decay = self.now, self._last, self._count, self.token / CLASS_HALF_LIFE
        top = HIGHEST_CLASS
        return [
            (last[key] - now) / (1 if (log := count[key] - decay) < 1 else 1 << top if log >= top else 1 << int(log))
            for key in keys
        ]


class LayerDistance(Ranked):
    """The layer whose turn is furthest away gives up its least recently used (the last term of HOBBIT's score)."""

    def numbers(self, keys: Sequence[int]) -> list[float]:
        distance, experts = self.distances(), self.experts
        return [-distance[key // experts] for key in keys]


class LeastStale(Ranked):
    """SpecMD's two tiers: what this pass has not touched goes before what it has; within a tier, LRU."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._touched = [-1] * geometry.layers * geometry.experts

    def use(self, keys: Sequence[int], scores: Scores | None) -> None:
        for key in keys:
            self._touched[key] = self.token

    def admit(self, key: int) -> None:
        self._touched[key] = self.token
        super().admit(key)

    def numbers(self, keys: Sequence[int]) -> list[float]:
        touched, token = self._touched, self.token
        return [float(touched[key] == token) for key in keys]
