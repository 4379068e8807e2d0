"""The compiled policies decide what their definitions decide, key for key, whatever they are told."""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_cupy.cache import POLICIES as DEFINED
from moe_cupy.cache import ExpertCache, Geometry
from moe_cupy.cache.echo import TOKENS, Echo, load_weights
from moe_cupy.compiled import POLICIES
from moe_cupy.compiled.echo import CompiledEcho
from moe_cupy.lab.replay import replay, slots_of
from moe_cupy.lab.trace import RouteTrace, read_trace
from tests.moe_cupy.test_replay import drawn

OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["access", "access", "access", "prefetch", "forget"]),
        st.integers(0, 3),
        st.integers(0, 8),
        st.randoms(use_true_random=False),
    ),
    max_size=120,
)


def both(experts: int, layers: int, slots: int) -> list[ExpertCache]:
    return [ExpertCache(experts, [0] * layers, [slots], table["echo"]) for table in (DEFINED, POLICIES)]


@given(operations=OPERATIONS, shape=st.tuples(st.integers(1, 4), st.sampled_from([3, 9, 70])), slots=st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_any_workload_is_decided_alike(operations, shape, slots):
    """Events of one expert or many, in any order of layers, with others pinned; prefetches; failed loads."""
    layers, experts = shape
    plain, compiled = both(experts, layers, slots)
    for kind, layer, count, rng in operations:
        layer %= layers
        resident = sorted(plain.pools[0].slot_of)
        ids = rng.sample(range(experts), min(count, experts, slots))
        pinned = set(rng.sample(resident, min(len(resident), rng.randint(0, slots - len(ids)))))
        if kind == "forget":
            key = rng.choice([*resident, 0])
            plain.forget(key), compiled.forget(key)
        else:
            wanted, got = (getattr(cache, kind)(layer, ids, pinned) for cache in (plain, compiled))
            assert got == wanted
        assert compiled.pools[0].slot_of == plain.pools[0].slot_of


@pytest.mark.parametrize(("layers", "experts", "used", "slots"), [(1, 6, 2, 3), (3, 8, 2, 7), (2, 130, 8, 40)])
def test_more_tokens_than_are_remembered_are_decided_alike(layers, experts, used, slots):
    """The ring of remembered tokens goes round twice; all tables have been full."""
    trace = drawn(2 * TOKENS + 100, layers, experts, used, 3)
    assert replay(trace, POLICIES["echo"], slots) == replay(trace, DEFINED["echo"], slots)


@pytest.mark.parametrize("name", ["ship/gpt-oss-20b_decode_1", "ship/qwen3-30b-a3b_decode_1"])
def test_real_routes_are_decided_alike(name):
    path = SHARED / "data" / "routes" / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    trace = read_trace(path).part(0, 100)
    for share in (0.05, 0.25):
        slots = slots_of(trace, share)
        for admission in (False, True):
            wanted, got = (replay(trace, table["echo"], slots, "global", admission) for table in (DEFINED, POLICIES))
            assert got == wanted and got.hits > 0
    wanted, got = (replay(trace, table["echo"], slots_of(trace, 0.25), "layer") for table in (DEFINED, POLICIES))
    assert got == wanted


def test_one_call_an_event_is_the_same_as_one_call_a_step():
    """``event`` of the compiled policy against begin, victim, evict and admit of the same."""
    rng = random.Random(5)
    whole, steps = (POLICIES["echo"](Geometry(9, 3, 8)) for _ in range(2))
    resident: list[int] = []
    for event in range(300):
        layer = event % 3
        keys = [8 * layer + e for e in rng.sample(range(8), 3)]
        missing, free = [key for key in keys if key not in resident], 9 - len(resident)
        victims = whole.event(layer, keys, missing, free)
        steps.begin(layer, keys)
        gone = []
        for i, key in enumerate(missing):
            if i >= free:
                gone.append(steps.victim(keys))
                steps.evict(gone[-1])
            steps.admit(key)
        assert victims == gone
        resident = [key for key in resident if key not in victims] + missing
    assert len(resident) == 9


def test_other_weights_are_obeyed():
    """Weights are data, not compiled in: with others the decisions are others, and again those of the definition."""
    weights = load_weights() | {"mix": [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]}
    trace = drawn(200, 3, 16, 3, 1)
    makers = [partial(made, weights=used) for used in (None, weights) for made in (Echo, CompiledEcho)]
    results = [replay(trace, make, 12) for make in makers]
    assert results[0] == results[1] != results[2] == results[3]


def test_an_event_may_use_every_expert_of_a_wide_layer():
    """A prompt's events are unions: 512 experts at once, similarities of 12 bits and more."""
    trace = RouteTrace(np.tile(np.arange(512), (6, 2, 1)), 512, np.array([0]))
    wanted, got = (replay(trace, table["echo"], 700) for table in (DEFINED, POLICIES))
    assert got == wanted
