"""Published claims about expert caches, repeated on recorded routes. Each function gives lines: claimed, and seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from moe_cupy.cache import POLICIES, Geometry, Policy
from moe_cupy.cache.policies import Scores
from moe_cupy.cache.ranked import Ranked
from moe_cupy.lab.belady import NEVER
from moe_cupy.lab.info import union_growth
from moe_cupy.lab.machine import Machine, expert_bytes_of
from moe_cupy.lab.replay import Cache, make_caches, replay, slots_of
from moe_cupy.lab.simulator import simulate
from moe_cupy.lab.trace import RouteTrace
from moe_cupy.prefetch import NextGate, NoPrefetch

Passes = list[list[list[int]]]  # [pass][layer] -> keys, any number of them
Make = Callable[[Geometry], Policy]
RESIDENT = 0.4  # of arXiv 2608.07911's comparisons


def batched(trace: RouteTrace, batch: int) -> Passes:
    """Passes of ``batch`` sequences side by side; an event is the union of their experts. Ends when a lane is empty."""
    keys, queue = trace.key_rows(), [list(range(a, b)) for a, b in trace.sequences()]
    lanes, passes = [queue.pop(0) for _ in range(min(batch, len(queue)))], []
    while all(lanes):
        tokens = [lane.pop(0) for lane in lanes]
        passes.append([sorted({key for t in tokens for key in keys[t][layer]}) for layer in range(trace.shape[1])])
        lanes = [lane or (queue.pop(0) if queue else []) for lane in lanes]
    return passes


class Future(Ranked):
    """Belady for events of any size; it is told the next use of each key of the events in turn."""

    def __init__(self, geometry: Geometry, coming: Iterator[list[int]]) -> None:
        super().__init__(geometry)
        self._coming = coming
        self._next = [NEVER] * geometry.layers * geometry.experts

    def use(self, keys: Sequence[int], scores: Scores | None) -> None:
        for key, event in zip(keys, next(self._coming), strict=True):
            self._next[key] = event

    def numbers(self, keys: Sequence[int]) -> list[float]:
        return [-self._next[key] for key in keys]


def next_uses(passes: Passes) -> Passes:
    """The pass that next uses each key, in the shape of ``passes``."""
    following: dict[int, int] = {}
    answer: Passes = []
    for number in range(len(passes) - 1, -1, -1):
        answer.append([[following.get(key, NEVER) for key in event] for event in passes[number]])
        following |= {key: number for event in passes[number] for key in event}
    return answer[::-1]


def miss_share(
    trace: RouteTrace, passes: Passes, make: Make | None, *, serial: bool = False, admit: bool = False
) -> float:
    """Misses over accesses with a pool of RESIDENT of each layer's experts; ``make`` None is Belady.

    ``serial`` serves an event's experts one at a time, so that they may evict each other.
    """
    _, layers, _ = trace.shape
    slots = max(int(RESIDENT * trace.n_experts), *(len(event) for row in passes for event in row))
    geometry = Geometry(slots, layers, trace.n_experts)
    future = next_uses(passes) if make is None else []
    missed = 0
    for layer in range(layers):
        policy = make(geometry) if make else Future(geometry, iter([row[layer] for row in future]))
        cache = Cache(slots, policy, admit)
        for row in passes:
            for part in [[key] for key in row[layer]] if serial else [row[layer]]:
                missed += len(cache.access(layer, part, None)[0])
    return missed / sum(len(event) for row in passes for event in row)


def atomic(trace: RouteTrace) -> Iterator[str]:
    """Claim: serving experts one at a time inflates recency policies' misses by 27-29%, frequency's by under 4%."""
    for batch in (1, 8):
        passes = batched(trace, batch)
        yield f"batch {batch}: {len(passes)} passes, {RESIDENT:.0%} a layer resident; misses %, atomic -> one by one"
        for name in ("lru", "lfu", "lfru"):
            whole, parts = (miss_share(trace, passes, POLICIES[name], serial=serial) for serial in (False, True))
            yield f"  {name:5} {100 * whole:6.2f} -> {100 * parts:6.2f}  ({100 * (parts / whole - 1):+.1f}%)"


def lfru(trace: RouteTrace) -> Iterator[str]:
    """Claim: LFRU is the best causal policy (18.0% misses, LFU 19.1); Belady spares 45% of them, by its victims."""
    for batch in (1, 2, 8):
        passes = batched(trace, batch)
        causal = {name: miss_share(trace, passes, make) for name, make in POLICIES.items()}
        published = {name: share for name, share in causal.items() if name != "echo"}
        best = min(published, key=lambda name: published[name])
        forced, bypass = (miss_share(trace, passes, None, admit=admit) for admit in (False, True))
        gap = max(published[best] - bypass, 1e-12)
        yield (
            f"batch {batch}: lru {100 * causal['lru']:.2f}, lfu {100 * causal['lfu']:.2f}, "
            f"lfru {100 * causal['lfru']:.2f}, best published {best} {100 * published[best]:.2f}, "
            f"echo {100 * causal['echo']:.2f}, "
            f"belady {100 * bypass:.2f}; gap {100 * gap / max(published[best], 1e-12):.1f}% of the misses, "
            f"{100 * (published[best] - forced) / gap:.1f}% of it choice of victims"
        )


def least_stale(trace: RouteTrace) -> Iterator[str]:
    """Claims: Least-Stale has up to 85x fewer collisions than LRU and hits 88-92% at 5%; or, it is LRU."""
    machine, size = Machine(), expert_bytes_of(trace.meta)
    for share in (0.05, 0.1, 0.25):
        slots = slots_of(trace, share)
        yield f"{share:.0%} = {slots} slots: hits % / collisions on demand; the same with the next layer foretold"
        for name in ("lru", "least-stale", "layer-distance", "echo"):
            row = []
            for predictor in (NoPrefetch(), NextGate()):
                caches = make_caches(trace, POLICIES[name], slots, "global", False)
                out = simulate(trace, caches, predictor, machine, size, trace.experts)
                row.append(f"{100 * out.hit_rate:6.2f} / {out.collisions:7d}")
            yield f"  {name:14} {row[0]}   {row[1]}"


def unions(trace: RouteTrace) -> Iterator[str]:
    """Claim: j tokens together use fewer experts than independent choices would: E (1 - (1 - k/E)^j)."""
    k, experts = trace.shape[2], trace.n_experts
    yield f"{experts} experts, top-{k}; distinct experts in j tokens of a layer: measured, independent uniform"
    for j, seen in union_growth(trace).items():
        yield f"  {j:3d} tokens {seen:7.2f} {experts * (1 - (1 - k / experts) ** j):7.2f}"


def small_cache(trace: RouteTrace) -> Iterator[str]:
    """Claim: 85-96% of the experts hit with little memory."""
    for name in ("lru", "decayed-lfu", "echo"):
        rates = [replay(trace, POLICIES[name], slots_of(trace, share)).hit_rate for share in (0.1, 0.25, 0.5, 0.75)]
        yield f"  {name:12} at 10, 25, 50, 75%: " + ", ".join(f"{100 * rate:.1f}" for rate in rates)


ON_ROUTES: dict[str, Callable[[RouteTrace], Iterator[str]]] = {
    "atomic": atomic,
    "lfru": lfru,
    "least-stale": least_stale,
    "unions": unions,
    "small-cache": small_cache,
}
