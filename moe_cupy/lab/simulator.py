"""Replay with a clock: what a policy and a prefetcher cost in time on a machine.

Time decides nothing: residency follows from the order of events alone, as in the runtime, so hits and misses are
those of any machine. The clock says how long compute waits. A layer: attention, the router speaks, demand copies of
the misses start, prefetches for the next layer queue behind them, resident experts compute first, then each expert as
it arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_cupy.cache.policies import Scores
from moe_cupy.lab.links import Links
from moe_cupy.lab.machine import Machine
from moe_cupy.lab.replay import Cache, event_scores
from moe_cupy.lab.trace import RouteTrace
from moe_cupy.prefetch import Prefetcher


@dataclass(slots=True)
class Outcome:
    """What happened, in experts and seconds of virtual time."""

    tokens: int = 0
    hits: int = 0  # resident or on their way
    misses: int = 0
    evictions: int = 0
    late: int = 0  # hits that were not here yet
    prefetched: int = 0
    wasted: int = 0  # prefetched, then evicted (or left at the end) unused
    cancelled: int = 0  # of those, never begun: no bytes moved
    predicted: int = 0  # named by the predictor, resident or not
    predicted_right: int = 0
    predictable: int = 0  # used in layers of which something could be predicted
    collisions: int = 0
    disk_reads: int = 0
    stall_s: float = 0.0
    total_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Hits over accesses."""
        return self.hits / max(1, self.hits + self.misses)


class Simulation:
    """The caches of a model's layers and a machine; feed it a trace's events in order."""

    def __init__(self, trace: RouteTrace, caches: Sequence[Cache], machine: Machine, expert_bytes: int):
        self.caches, self._experts, self.out = caches, trace.n_experts, Outcome()
        host = None if machine.host_share >= 1 else max(1, int(machine.host_share * trace.pairs))
        self._links, self._machine = Links(machine, expert_bytes, host), machine
        self._expert_s = machine.expert_s(expert_bytes)
        self._unused: set[int] = set()  # prefetched, not used since
        self._gone: set[int] = set()  # evicted in this pass
        self._now = 0.0

    def begin_sequence(self) -> None:
        """What follows has nothing to do with the tokens so far; residents stay."""
        for cache in {id(cache): cache for cache in self.caches}.values():
            cache.policy.begin_sequence()

    def begin_token(self) -> None:
        """A new pass."""
        self._gone.clear()
        self.out.tokens += 1

    def end_token(self) -> None:
        """The head and sampling."""
        self._now += self._machine.head_s
        self.out.total_s = self._now

    def layer(self, layer: int, event: Sequence[int], scores: Scores | None) -> None:
        """Attention, then the event's experts: resident ones first."""
        self._now += self._machine.attention_s
        cache = self.caches[layer]
        missing, evicted = cache.access(layer, event, scores)
        resident = [key for key in event if key not in missing] if missing else event
        out = self.out
        out.hits += len(resident)
        out.misses += len(missing)
        if missing:
            out.collisions += len(self._gone.intersection(missing))
        self._drop(evicted)
        arrivals = [self._now] * len(resident)  # where nothing is fetched ahead, whoever is resident is here
        if out.prefetched:
            arrivals = [self._links.arrival(key, self._now) for key in resident]
            out.late += sum(at > self._now for at in arrivals)
            self._unused.difference_update(event)
        arrivals += [self._links.demand(key, self._now) for key in missing]
        self._compute_from = self._now
        for at in sorted(arrivals):
            if at > self._now:
                out.stall_s += at - self._now
                self._now = at
            self._now += self._expert_s

    def fetch_ahead(self, layer: int, experts: Sequence[int], event: Sequence[int]) -> None:
        """Queue what the predictor expects of ``layer``; asked for when the router of the layer before had spoken."""
        cache, first = self.caches[layer], layer * self._experts
        keys = [first + e for e in experts][: max(0, cache.slots - len(event))]
        pinned = {*event, *keys}
        for key in keys:
            if key in cache.resident:
                continue
            leaving = cache.policy.exchange([key], cache.slots - len(cache.resident), pinned)
            if not leaving and len(cache.resident) == cache.slots:
                return
            cache.resident.difference_update(leaving)
            self._drop(leaving)
            cache.resident.add(key)
            self._unused.add(key)
            self.out.prefetched += 1
            self._links.prefetch(key, self._compute_from)

    def finish(self) -> Outcome:
        """The outcome; what was fetched ahead and never used is wasted."""
        self.out.wasted += len(self._unused)
        self.out.disk_reads = self._links.disk_reads
        return self.out

    def _drop(self, evicted: Sequence[int]) -> None:
        self.out.evictions += len(evicted)
        self._gone.update(evicted)
        for key in evicted if self.out.prefetched else ():
            cancelled = self._links.cancel(key, self._now)
            if key in self._unused:
                self._unused.remove(key)
                self.out.wasted += 1
                self.out.cancelled += cancelled


def simulate(
    trace: RouteTrace,
    caches: Sequence[Cache],
    prefetcher: Prefetcher,
    machine: Machine,
    expert_bytes: int,
    early: np.ndarray | None = None,
) -> Outcome:
    """Replay ``trace`` through ``caches``, one a layer; ``early`` [T, L, k] is what each router says a layer before.

    Raises ValueError where a predictor needs ``early`` and there is none.
    """
    if prefetcher.needs_next_router and early is None:
        raise ValueError("next-gate: the trace does not hold what routers said early (routes record --ahead)")
    sim = Simulation(trace, caches, machine, expert_bytes)
    starts, ids = set(trace.starts.tolist()), trace.experts.tolist()
    said = ids if early is None else early.tolist()
    rows = zip(trace.key_rows(), event_scores(trace, caches[0].policy.wants_scores), strict=True)
    for token, (row, scores) in enumerate(rows):
        if token in starts:
            sim.begin_sequence()
            prefetcher.begin_sequence()
        sim.begin_token()
        for layer, event in enumerate(row):
            sim.layer(layer, event, scores[layer])
            if prefetcher.predicts:
                prefetcher.observe(layer, [ids[token][layer]])
                if layer + 1 < len(row):
                    expected = prefetcher.predict([said[token][layer + 1]])
                    _judge(sim.out, expected, ids[token][layer + 1])
                    sim.fetch_ahead(layer + 1, expected, event)
        sim.end_token()
    return sim.finish()


def _judge(out: Outcome, expected: Sequence[int], actual: Sequence[int]) -> None:
    out.predicted += len(expected)
    out.predicted_right += len(set(expected) & set(actual))
    out.predictable += len(actual)
