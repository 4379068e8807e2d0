"""What a policy costs the decode loop: python benchmarks/policy_cost.py TRACE … [--policy a,b] [--capacity 0.1,0.25].

Microseconds a layer of a token: of ``ExpertCache.access`` as the runtime calls it, and of the policy in it (the same
calls once more, to the policy alone). The first ``--warm`` tokens do not count: they fill the cache.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moe_cupy.cache import POLICIES as DEFINED
from moe_cupy.cache import ExpertCache, Geometry, Policy
from moe_cupy.compiled import POLICIES
from moe_cupy.lab.replay import event_scores, slots_of
from moe_cupy.lab.trace import RouteTrace, read_trace

TABLE = POLICIES | {"echo-definition": DEFINED["echo"]}
Call = Callable[..., Any]


def seconds(call: Call, arguments: Sequence[tuple[Any, ...]], warm: int) -> float:
    """What the calls after the first ``warm`` take."""
    for each in arguments[:warm]:
        call(*each)
    begun = time.perf_counter()
    for each in arguments[warm:]:
        call(*each)
    return time.perf_counter() - begun


def told(cache: ExpertCache) -> list[tuple[Any, ...]]:
    """A list that everything will be added to that the cache's policy is told of an event."""
    calls: list[tuple[Any, ...]] = []
    policy = cache.pools[0].policy
    event = policy.event
    policy.event = lambda *each: (calls.append(each), event(*each))[1]  # type: ignore[method-assign]
    return calls


def cost(trace: RouteTrace, make: Callable[[Geometry], Policy], slots: int, warm: int) -> tuple[float, float, float]:
    """(us a layer of the access, of the policy in it, misses a layer)."""
    tokens, layers, _ = trace.shape
    caches = [ExpertCache(trace.n_experts, [0] * layers, [slots], make) for _ in range(3)]
    scores = event_scores(trace, caches[0].pools[0].policy.wants_scores)
    rows = zip(trace.experts.tolist(), scores, strict=True)
    events = [(layer, ids, (), said[layer]) for row, said in rows for layer, ids in enumerate(row)]
    whole = seconds(caches[0].access, events, warm * layers)
    calls = told(caches[1])
    seconds(caches[1].access, events, warm * layers)
    part = seconds(caches[2].pools[0].policy.event, calls, warm * layers)
    count = (tokens - warm) * layers
    return 1e6 * whole / count, 1e6 * part / count, sum(len(call[2]) for call in calls[warm * layers :]) / count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("routes", nargs="+", metavar="TRACE")
    parser.add_argument("--policy", default="lru,decayed-lfu,echo,echo-definition", help=f"all or {', '.join(TABLE)}")
    parser.add_argument("--capacity", default="0.05,0.1,0.25,0.5")
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--warm", type=int, default=30)
    args = parser.parse_args()
    names = list(TABLE) if args.policy == "all" else args.policy.split(",")
    print(f"{'trace':28} {'capacity':>8}  {'policy':18} {'access us':>9} {'policy us':>9} {'misses a layer':>14}")
    for path in args.routes:
        trace = read_trace(path)
        trace = trace.part(0, min(args.tokens, len(trace.experts)))
        for share in map(float, args.capacity.split(",")):
            for name in names:
                whole, part, misses = cost(trace, TABLE[name], slots_of(trace, share), args.warm)
                print(f"{Path(path).stem[:28]:28} {share:8.0%}  {name:18} {whole:9.2f} {part:9.2f} {misses:14.2f}",
                      flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
