"""Event-atomic replay: one event is one layer of one token, a set of experts.

Hits are counted against what was resident when the event began; then all misses are fetched; then it is decided
what stays. A policy that admits everything keeps the event's experts and gives up residents. One that may bypass
(``admission``) keeps the best of residents and newcomers together, which takes k more slots than it has for as
long as the event lasts. The cache starts empty and is carried over from one sequence to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from moe_cupy.cache.policies import Geometry, Policy, Scores
from moe_cupy.lab.trace import RouteTrace

Event = Sequence[int]
SCOPES = ("global", "layer")


@dataclass(slots=True)
class Counts:
    """What happened, in experts."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    collisions: int = 0  # misses on an expert that was evicted earlier in the same pass
    compulsory: int = 0  # misses on an expert never used before
    hits_by_layer: list[int] = field(default_factory=list)

    @property
    def hit_rate(self) -> float:
        """Hits over accesses, cold start included."""
        return self.hits / max(1, self.hits + self.misses)


class Cache:
    """Residents of one pool and the policy that chooses among them."""

    def __init__(self, slots: int, policy: Policy, admission: bool = False):
        self.slots, self.policy, self.admission = slots, policy, admission
        self.resident: set[int] = set()

    def access(self, layer: int, event: Event, scores: Scores | None) -> tuple[list[int], list[int]]:
        """(misses, evicted) of one event; a newcomer that is not admitted counts among both."""
        resident = self.resident
        missing = [key for key in event if key not in resident]
        if self.admission:
            self.policy.begin(layer, event, scores)
            return missing, self._admit(missing)
        evicted = self.policy.event(layer, event, missing, self.slots - len(resident), (), scores)
        if missing:
            resident.difference_update(evicted)
            resident.update(missing)
            assert len(resident) <= self.slots, "an event has more experts than there are slots"
        return missing, evicted

    def _admit(self, missing: list[int]) -> list[int]:
        """All newcomers come in, then the worst of all go until the slots suffice."""
        for key in missing:
            self.resident.add(key)
            self.policy.admit(key)
        return [self._evict(()) for _ in range(len(self.resident) - self.slots)]

    def _evict(self, pinned: Event) -> int:
        victim = self.policy.victim(pinned)
        assert victim is not None, "an event has more experts than there are slots"
        self.resident.remove(victim)
        self.policy.evict(victim)
        return victim


def replay(
    trace: RouteTrace,
    make: Callable[[Geometry], Policy],
    slots: int,
    scope: str = "global",
    admission: bool = False,
) -> Counts:
    """Counts of one policy on one trace. Raises ValueError if the slots cannot hold one event."""
    tokens, layers, k = trace.shape
    caches = make_caches(trace, make, slots, scope, admission)
    counts = Counts(hits_by_layer=[0] * layers)
    starts, seen = set(trace.starts.tolist()), set()
    rows = zip(trace.key_rows(), event_scores(trace, caches[0].policy.wants_scores), strict=True)
    for token, (row, said) in enumerate(rows):
        if token in starts:
            for cache in set(caches):
                cache.policy.begin_sequence()
        gone: set[int] = set()
        for layer, event in enumerate(row):
            missing, evicted = caches[layer].access(layer, event, said[layer])
            counts.hits_by_layer[layer] += k - len(missing)
            if missing:
                counts.misses += len(missing)
                counts.evictions += len(evicted)
                counts.collisions += sum(key in gone for key in missing)
                counts.compulsory += sum(key not in seen for key in missing)
                seen.update(missing)
                gone.update(evicted)
    counts.hits = tokens * layers * k - counts.misses
    return counts


def make_caches(
    trace: RouteTrace, make: Callable[[Geometry], Policy], slots: int, scope: str, admission: bool
) -> list[Cache]:
    """The cache of each layer: one and the same for all, or one each of an equal share."""
    _, layers, k = trace.shape
    if scope not in SCOPES:
        raise ValueError(f"scope {scope!r}: use one of {', '.join(SCOPES)}")
    shares = [slots] if scope == "global" else [slots // layers + (i < slots % layers) for i in range(layers)]
    if min(shares) < k:
        raise ValueError(f"{slots} slots ({scope}): an event needs {k} at once in its pool")
    caches = [Cache(n, make(Geometry(n, layers, trace.n_experts)), admission) for n in shares]
    return caches * layers if scope == "global" else caches


def slots_of(trace: RouteTrace, capacity: float) -> int:
    """A share of all (layer, expert) pairs as slots, rounded down (0.05 means 5%, not a float just below)."""
    return math.floor(Fraction(str(capacity)) * trace.pairs)


def event_scores(trace: RouteTrace, wanted: bool) -> Iterator[list[Scores | None]]:
    """For each token, for each layer, what its router said; None where nobody wants it or nothing is known."""
    tokens, layers, _ = trace.shape
    if not wanted or (trace.weights is None and trace.router is None):
        nothing: list[Scores | None] = [None] * layers
        for _ in range(tokens):
            yield nothing
        return
    none = [None] * layers
    for token in range(tokens):
        weights = none if trace.weights is None else trace.weights[token].tolist()
        router = none if trace.router is None else trace.router[token].tolist()
        yield [Scores(w, r) for w, r in zip(weights, router, strict=True)]
