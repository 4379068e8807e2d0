"""The lab and the runtime obey the same objects: a decode's counters are those of its own trace, replayed."""

from __future__ import annotations

import numpy as np
import pytest

from moe_cupy.cache import POLICIES
from moe_cupy.engine import Engine
from moe_cupy.lab.machine import Machine
from moe_cupy.lab.record import Recorder
from moe_cupy.lab.replay import make_caches, replay
from moe_cupy.lab.simulator import simulate
from moe_cupy.lab.trace import RouteTrace
from moe_cupy.prefetch import PREFETCHERS
from moe_ref.attention import softmax
from tests.models import Shape, tiny_moe

LAYERS, EXPERTS, USED, TOKENS = 4, 12, 3, 60


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("m") / "m.gguf"
    return tiny_moe(path, Shape(layers=LAYERS, experts=EXPERTS, used=USED), seed=6)


def decoded(model, slots: int, policy: str, prefetch: str = "none") -> tuple[RouteTrace, dict]:
    """The trace and counters of two sequences of random tokens, decoded one by one on the host device."""
    recorder, before = Recorder(EXPERTS, keep_router=True), {}
    with Engine(model, cache=f"slots:{slots}", policy=policy, prefetch=prefetch) as engine:

        def observe(layer, b):
            ahead = before.pop(layer, b.ids)
            before[layer + 1] = (b.ids if b.ahead is None else b.ahead).copy()
            recorder.layer(layer, experts=b.ids, weights=b.weights, router=softmax(b.router), ahead=ahead)

        engine.forward.observe = observe
        for seed in (0, 1):
            recorder.begin_sequence()
            engine.reset()
            for token in np.random.default_rng(seed).integers(0, 96, TOKENS // 2):
                engine.decode(int(token))
                recorder.end_pass(generated=True)
        slab = engine.mover.layout.expert_bytes(0)
        return recorder.trace(), engine.stats.to_dict() | {"slab": slab}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("slots", [3, 14])
def test_replay_counts_what_the_runtime_counted(model, policy, slots):
    trace, stats = decoded(model, slots, policy)
    got = replay(trace, POLICIES[policy], slots)
    assert (got.hits, got.misses, got.evictions) == (stats["hits"], stats["misses"], stats["evictions"])
    assert got.misses * stats["slab"] == stats["bytes_demand"]
    assert slots == 3 or got.hits > 0


@pytest.mark.parametrize("prefetch", PREFETCHERS)
@pytest.mark.parametrize("policy", ["lru", "echo"])
def test_the_simulator_prefetches_what_the_runtime_prefetched(model, policy, prefetch):
    trace, stats = decoded(model, 9, policy, prefetch)
    caches = make_caches(trace, POLICIES[policy], 9, "global", False)
    got = simulate(trace, caches, PREFETCHERS[prefetch](), Machine(), 1, trace.ahead)
    still_unused = got.wasted * stats["slab"] - stats["bytes_wasted"]
    assert (got.hits, got.misses, got.evictions) == (stats["hits"], stats["misses"], stats["evictions"])
    assert got.prefetched * stats["slab"] == stats["bytes_prefetch"]
    assert 0 <= still_unused <= 9 * stats["slab"], "what lies unused at the end is wasted for the simulator alone"
    assert prefetch == "none" or got.prefetched > 0
