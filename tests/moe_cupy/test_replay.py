"""Replay on real and made-up routes: published rates, Belady never beaten, each policy by its own rule."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_cupy.cache import POLICIES, ExpertCache
from moe_cupy.cache.echo import Similar, last_bits
from moe_cupy.cache.policies import Geometry, Scores
from moe_cupy.cache.published import high_precision
from moe_cupy.lab.belady import knowing
from moe_cupy.lab.replay import Counts, replay, slots_of
from moe_cupy.lab.trace import RouteTrace, read_trace
from tests.conftest import SHARED

ROUTES = SHARED / "data" / "routes"
needs_routes = pytest.mark.skipif(not ROUTES.is_dir(), reason=f"{ROUTES} is absent")
COLUMNS = {"lru": 5, "lfu": 6, "decayed-lfu": 7, "layer-distance": 9, "belady": 10}  # of BASELINE.md's tables


def drawn(tokens: int, layers: int, experts: int, k: int, seed: int) -> RouteTrace:
    """Routes with habits: each layer has favourites, and a token often repeats the one before."""
    rng = np.random.default_rng(seed)
    favour = rng.gumbel(size=(layers, experts))
    ids = np.empty((tokens, layers, k), np.int64)
    for t in range(tokens):
        noise = rng.gumbel(size=(layers, experts)) * 0.7
        if t:
            np.put_along_axis(noise, ids[t - 1], noise.max() * rng.random(), axis=1)
        ids[t] = np.argsort(-(favour + noise), axis=1)[:, :k]
    return RouteTrace(ids, experts, np.array([0]))


def counts(trace: RouteTrace, name: str, slots: int, scope: str = "global") -> Counts:
    return replay(trace, (POLICIES | knowing(trace))[name], slots, scope, name.endswith("-admit"))


def published() -> dict[tuple[str, int, str], float]:
    """(file, percent, policy) -> hit rate in percent, from both tables of BASELINE.md; "-" is left out."""
    rates, name = {}, ""
    for line in (ROUTES / "BASELINE.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 11 and cells[4].endswith("%"):
            name = cells[0] or name
            for policy, column in COLUMNS.items():
                if cells[column] != "-":
                    rates[name, int(cells[4].rstrip(" %")), policy] = float(cells[column])
    return rates


@needs_routes
@pytest.mark.parametrize(
    "name",
    [
        "qwen3-30b-a3b_decode_1",
        "mixtral-8x7b_decode_1",
        "qwen1.5-moe-a2.7b-5layers_decode_1",
        *(pytest.param(f"gpt-oss-20b_decode_{i}", marks=pytest.mark.slow) for i in (1, 2, 3)),
        pytest.param("deepseek-v2-lite_prefill_1", marks=pytest.mark.slow),
    ],
)
def test_replay_reproduces_the_published_hit_rates(name):
    """LRU, LFU and Belady to 0.002."""
    expected = {key[1:]: rate for key, rate in published().items() if key[0] == name}
    assert len(expected) == 20, f"{name}: {len(expected)} figures in BASELINE.md"
    (path,) = ROUTES.glob(f"*/{name}.npz")
    trace = read_trace(path)
    for (percent, policy), want in expected.items():
        got = 100 * counts(trace, policy, slots_of(trace, percent / 100)).hit_rate
        allowed = 0.2 if policy in ("lru", "lfu", "belady") else 0.6  # the others' ties are not told
        assert got == pytest.approx(want, abs=allowed), f"{policy} at {percent}%: {got:.2f}, BASELINE.md says {want}"


TRACES = st.builds(
    drawn, st.integers(2, 25), st.integers(1, 4), st.integers(4, 9), st.integers(1, 3), st.integers(0, 99)
)


@given(trace=TRACES, extra=st.integers(0, 12))
@settings(max_examples=40, deadline=None)
def test_belady_is_never_beaten(trace, extra):
    """Without bypass among those that admit everything, with it among all; more slots never hurt it."""
    slots = trace.shape[2] + extra
    best, best_admit = (counts(trace, name, slots).misses for name in ("belady", "belady-admit"))
    assert best_admit <= best
    assert counts(trace, "belady", slots + 1).misses <= best
    for name in (*POLICIES, "static"):
        assert counts(trace, name, slots).misses >= best, name
        make = (POLICIES | knowing(trace))[name]
        assert replay(trace, make, slots, admission=True).misses >= best_admit, f"{name} with bypass"


def least_misses(trace: RouteTrace, slots: int, bypass: bool) -> int:
    """By exhaustive search over everything that could stay after each event."""
    from itertools import combinations

    states = {frozenset(): 0}
    for row in trace.key_rows():
        for event in row:
            after: dict[frozenset[int], int] = {}
            for held, cost in states.items():
                cost += len(set(event) - held)
                there = held | set(event)
                keep = [set(s) for s in combinations(sorted(there), min(slots, len(there)))]
                for kept in keep:
                    if bypass or kept >= set(event):
                        key = frozenset(kept)
                        after[key] = min(after.get(key, cost), cost)
            states = after
    return min(states.values())


@pytest.mark.parametrize("seed", range(6))
def test_belady_finds_the_least_misses_that_exist(seed):
    trace = drawn(7, 2, 4, 2, seed)
    assert counts(trace, "belady", 4).misses == least_misses(trace, 4, bypass=False)
    assert counts(trace, "belady-admit", 4).misses == least_misses(trace, 4, bypass=True)


@pytest.mark.parametrize("policy", POLICIES)
def test_replay_and_the_runtimes_cache_count_the_same(policy):
    """Scores are given to both; the cache has more bookkeeping, the decisions are the policy's."""
    trace = drawn(40, 4, 12, 3, 5)
    rng = np.random.default_rng(0)
    weights = np.sort(rng.random(trace.shape).astype(np.float32), axis=2)[..., ::-1]
    trace = RouteTrace(trace.experts, 12, np.array([0, 17]), weights=weights)
    got = replay(trace, POLICIES[policy], 14)
    cache = ExpertCache(12, [0] * 4, [14], POLICIES[policy])
    for token, row in enumerate(trace.experts.tolist()):
        if token in (0, 17):
            cache.begin_sequence()
        for layer, ids in enumerate(row):
            cache.access(layer, ids, scores=Scores(weights[token, layer].tolist()))
    n = cache.pools[0].counters
    assert (got.hits, got.misses, got.evictions) == (n.hits, n.misses, n.evictions)
    assert 0 < got.hits < got.hits + got.misses == trace.experts.size
    again = replay(trace, POLICIES[policy], 14)
    assert again == got, "replay is deterministic"


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["access", "access", "prefetch", "forget", "sequence"]), st.integers(0, 2), st.randoms()),
    max_size=40,
)


@pytest.mark.parametrize("policy", POLICIES)
@given(operations=OPERATIONS, slots=st.integers(2, 9))
@settings(max_examples=25, deadline=None)
def test_every_policy_obeys_capacity_and_pinning_on_any_workload(policy, operations, slots):
    cache = ExpertCache(6, [0, 0, 0], [slots], POLICIES[policy])
    pool = cache.pools[0]
    for kind, layer, rng in operations:
        pinned = set(rng.sample(sorted(pool.slot_of), rng.randint(0, min(len(pool.slot_of), slots - 2))))
        ids = rng.sample(range(6), rng.randint(1, 2))
        loads = ()
        if kind == "access":
            loads = cache.access(layer, ids, pinned).loads
            assert {layer * 6 + e for e in ids} <= set(pool.slot_of)
        elif kind == "prefetch":
            loads = cache.prefetch(layer, ids, pinned)
        elif kind == "forget" and pool.slot_of:
            cache.forget(rng.choice(sorted(pool.slot_of)))
            continue
        else:
            cache.begin_sequence()
        assert pinned <= set(pool.slot_of), "someone pinned was evicted"
        assert len(pool.slot_of) <= slots and len(set(pool.slot_of.values())) == len(pool.slot_of)
        assert all(0 <= slot < slots for slot in pool.slot_of.values())
        assert not {load.evicted for load in loads} & ({layer * 6 + e for e in ids} | pinned)


# ---------------------------------------------------------------------------------------------------------
# Each rule by its own check


def after(policy: str, events: list[tuple[int, list[int]]], slots: int, layers: int = 1, weights=None) -> set[int]:
    """Residents after events (layer, expert ids) of a model of 10 experts a layer."""
    cache = ExpertCache(10, [0] * layers, [slots], POLICIES[policy])
    cache.begin_sequence()
    for i, (layer, ids) in enumerate(events):
        cache.access(layer, ids, scores=None if weights is None else Scores(weights[i]))
    return set(cache.pools[0].slot_of)


def one(*ids: int) -> list[tuple[int, list[int]]]:
    return [(0, [i]) for i in ids]


@pytest.mark.parametrize(
    ("policy", "events", "slots", "want"),
    [
        ("fifo", one(1, 2, 1, 1, 3), 2, {2, 3}),  # 1 came first, used or not
        ("lfru", one(1, 1, 1, 1, 2, 3), 2, {1, 3}),  # at event 6: 1 has 4 uses / 3 events, 2 has 1 / 2
        ("lfru", one(1, 1, 2, 4, 5), 3, {1, 4, 5}),  # at event 5: 1 has 2 / 4, 2 has 1 / 3, 4 has 1 / 2
        ("decayed-lfu", one(*[1] * 3, *[2] * 2, 3), 2, {1, 3}),
        ("decayed-lfu", one(1, 1, *[2, 4] * 20, 3), 3, {2, 3, 4}),  # 1's two uses are 2.5 half-lives old
        ("use-class", one(*[1] * 4, 2, 2, 3), 2, {2, 3}),  # event 7: 1 has class 1, age 3 / 2; 2 class 0 (1.99), age 1
    ],
)
def test_rules_worked_out_by_hand(policy, events, slots, want):
    assert after(policy, events, slots) == want


def test_layer_distance_gives_up_the_layer_that_was_just_here():
    """Layers 0, 1, 2: at layer 1, layer 0 comes again in 2, layer 1 in 3, layer 2 in 1."""
    events = [(0, [5]), (1, [6]), (2, [7]), (0, [5]), (1, [8])]
    assert after("layer-distance", events, 3, layers=3) == {5, 18, 27}
    assert after("lru", events, 3, layers=3) == {5, 27, 18}
    assert after("layer-distance", [*events[:3], (0, [4])], 3, layers=3) == {4, 16, 27}


def test_least_stale_is_lru_without_prefetch_and_layer_distance_has_fewer_collisions():
    """ALGORITHMS: in demand-only replay the two are the same to the count; only the distance order ends collisions."""
    trace = drawn(120, 8, 16, 4, 1)
    for slots in (8, 16, 32, 64):
        assert counts(trace, "least-stale", slots) == counts(trace, "lru", slots)
    assert counts(trace, "layer-distance", 12).collisions < counts(trace, "lru", 12).collisions
    assert counts(trace, "lru", 48, "layer").collisions == 0, "a pool a layer cannot collide at batch 1"


def test_least_stale_differs_once_something_is_prefetched():
    """7 is fetched ahead in this pass, so it is fresh; 5 was used in the pass before, so it goes first."""
    cache = ExpertCache(10, [0, 0], [2], POLICIES["least-stale"])
    cache.access(0, [5])
    cache.access(1, [6])
    cache.access(0, [5])
    cache.prefetch(1, [7], (5,))
    assert set(cache.pools[0].slot_of) == {5, 17}
    cache.access(1, [8])
    assert set(cache.pools[0].slot_of) == {17, 18}, "both are fresh: the one used longer ago goes"


@pytest.mark.parametrize(
    ("weights", "want"),
    [
        ([1, 1], 2),
        ([1, 1, 1, 1], 3),  # ALGORITHMS' table for uniform gates: 3 of 4 high
        ([1] * 8, 5),  # 5 of 8
        ([0.7, 0.3], 1),
        ([0.55, 0.45], 2),
        ([0.3, 0.7], 1),
    ],
)
def test_hobbits_loader_on_the_published_cases(weights, want):
    assert sum(high_precision(weights)) == want
    assert high_precision(weights)[int(np.argmax(weights))], "rank 0 is always high"


def test_lhu_counts_only_uses_in_high_precision():
    events = [(0, [1, 2]), (0, [1, 2]), (0, [3, 1])]
    low_second = [[0.9, 0.1], [0.9, 0.1], [0.9, 0.1]]
    assert after("lhu", events, 2, weights=low_second) == {1, 3}
    both_high = [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    assert after("lhu", [*events[:2], (0, [3])], 2, weights=[*both_high[:2], [1.0]]) == {2, 3}, "equal: LRU"


def test_hobbit_weighs_recency_uses_precision_and_layer():
    """Event 4 of one sequence at layer 1 of 2, by hand. Tokens 2; keys 1, 2 (layer 0) and 13 (layer 1):

    1: last 2, uses 2, high 2: (2 + 2 + 2) / 2 / 4 + (1 - 1/2) / 4 = 0.875; 2: last 1, uses 1, high 0 of layer 0:
    (1 + 1 + 0) / 2 / 4 + 0.125 = 0.375; 13: last 1, uses 1, high 1 of the current layer: 3 / 8 + 0.25 = 0.625.
    """
    events = [(0, [1, 2]), (1, [3]), (0, [1]), (1, [4])]
    weights = [[0.9, 0.1], [1.0], [1.0], [1.0]]
    assert after("hobbit", events, 3, layers=2, weights=weights) == {1, 13, 14}


def test_activation_matrix_prefers_what_this_sequence_used_and_forgets_at_the_next():
    cache = ExpertCache(10, [0, 0], [2], POLICIES["activation-matrix"])
    cache.begin_sequence()
    for layer, ids in [(0, [1]), (0, [1]), (0, [2])]:
        cache.access(layer, ids)
    cache.access(0, [3])
    assert set(cache.pools[0].slot_of) == {1, 3}
    cache.begin_sequence()
    cache.access(0, [3])
    cache.access(0, [4])
    assert set(cache.pools[0].slot_of) == {3, 4}, "1's uses belong to the sequence before"


def test_hybrimoe_averages_scores_of_the_highest_2k():
    """One layer, k=1, by hand. Router says 1: 0.6, 2: 0.3, then 3: 0.8, 2: 0.15 (top 2k=2 of each).

    S1 = 0.3 then 0.15; S2 = 0.15 then 0.075 + 0.075 = 0.15 (a tie with S1: LRU, and 2 was used first).
    """
    policy = POLICIES["hybrimoe"](Geometry(2, 1, 4))
    policy.begin(0, [2], Scores([0.3], [0.05, 0.6, 0.3, 0.05]))
    policy.admit(2)
    policy.begin(0, [1], Scores([0.9], [0.05, 0.9, 0.01, 0.04]))
    policy.admit(1)
    assert policy.victim(()) == 2  # S2 = 0.15 / 2 = 0.075 (not of the highest two); S1 = 0.15 + 0.45
    assert policy.numbers([1, 2, 0]) == pytest.approx([0.6, 0.075, 0.025])


def test_static_keeps_the_hottest_of_its_profile():
    trace = drawn(50, 2, 8, 2, 3)
    profile = np.bincount((trace.experts + np.array([[0], [8]])).ravel(), minlength=16)
    got = replay(trace, knowing(trace)["static"], 6, admission=True)
    hot = set(np.argsort(-profile, kind="stable")[:6].tolist())
    served = sum(key in hot for row in trace.key_rows() for event in row for key in event)
    assert served - 6 <= got.hits <= served, "each of the six is missed once"


# ---------------------------------------------------------------------------------------------------------
# echo


def test_similarity_is_the_recurrence_and_the_best_are_the_best():
    rng = random.Random(4)
    for _ in range(30):
        similar, plain = Similar(), [0] * 20
        similar.begin_token()
        for _ in range(rng.randint(1, 9)):
            users = [rng.getrandbits(20) for _ in range(rng.randint(1, 6))]
            similar.add_layer(users)
            plain = [s // 2 + 2 * sum(u >> i & 1 for u in users) for i, s in enumerate(plain)]
        among = rng.getrandbits(20)
        count = rng.randint(1, 12)
        ranked = sorted((plain[i] for i in range(20) if among >> i & 1), reverse=True)
        least = ranked[min(count, len(ranked)) - 1] if ranked else 0
        want = sum(1 << i for i in range(20) if among >> i & 1 and plain[i] >= least)
        assert similar.best(count, among) == want


def test_the_last_positions_of_the_ring():
    assert last_bits(3, 5) == 0b111000
    assert last_bits(3, 0) == 1 | 1 << 1023 | 1 << 1022
    assert last_bits(1023, 7).bit_count() == 1023 and not last_bits(1023, 7) >> 8 & 1


def test_echo_learns_what_a_kind_of_token_does_next():
    """Kinds A and B come at random; layer 0 tells which, layer 1 uses {0, 1} or {2, 3}: habit says nothing."""
    policy, rng = POLICIES["echo"](Geometry(8, 2, 4)), random.Random(1)
    for key in range(8):
        policy.admit(key)
    right = 0
    for token in range(60):
        first = rng.choice([0, 2])
        policy.begin(0, [first, first + 1])
        if token >= 20:
            right += policy.victim((0, 1, 2, 3)) not in {4 + first, 5 + first}
        policy.begin(1, [4 + first, 5 + first])
    assert right == 40, f"{right} of 40 victims are of the kind that does not come"


@pytest.mark.parametrize(("period", "slots"), [(6, 48), (12, 24), (24, 48)])
def test_echo_keeps_a_part_of_a_loop_that_outgrows_the_cache(period, slots):
    """Uniform routes that repeat: whoever looks one turn ahead loses to LFU, which keeps a fixed part."""
    rng = np.random.default_rng(period)
    once = np.array([[rng.permutation(32)[:4] for _ in range(4)] for _ in range(period)])
    trace = RouteTrace(np.tile(once, (144 // period, 1, 1)), 32, np.array([0]))
    rates = {policy: counts(trace, policy, slots).hit_rate for policy in POLICIES}
    assert rates["echo"] == max(rates.values()), rates


@needs_routes
def test_echo_is_the_best_causal_policy_on_short_real_traces():
    """The long ones are in docs/findings.md; 0.3 points count as a tie."""
    for name, first in (("mixtral-8x7b_decode_1", 247), ("gpt-oss-20b_decode_2", 200)):
        (path,) = ROUTES.glob(f"*/{name}.npz")
        trace = read_trace(path).part(0, first)
        for percent in (5, 10, 25):
            slots = slots_of(trace, percent / 100)
            rates = {policy: 100 * counts(trace, policy, slots).hit_rate for policy in POLICIES}
            best = max(rate for policy, rate in rates.items() if policy != "echo")
            assert rates["echo"] > best - 0.3, f"{name} at {percent}%: {rates}"


def test_wrong_requests_are_refused():
    trace = drawn(3, 4, 6, 3, 0)
    with pytest.raises(ValueError, match="2 slots"):
        counts(trace, "lru", 2)
    with pytest.raises(ValueError, match="11 slots"):
        counts(trace, "lru", 11, "layer")
    with pytest.raises(ValueError, match="scope 'all'"):
        counts(trace, "lru", 4, "all")
    assert slots_of(trace, 0.29) == 6 and slots_of(drawn(2, 1, 100, 1, 0), 0.29) == 29
    assert isinstance(ROUTES, Path)
