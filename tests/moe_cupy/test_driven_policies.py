"""resolve.cu decides what the policies of moe_cupy/cache decide, event by event, slot by slot, whatever was pinned."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_cupy.cache import POLICIES, ExpertCache, Geometry, Pool
from moe_cupy.cache.echo import TOKENS
from moe_cupy.cache.ranked import HALF_LIFE, ONE, POWERS, one_more_use
from moe_cupy.cache.tabled import RULES, Tabled
from moe_cupy.compiled.echo import CompiledEcho
from moe_cupy.engine.echo_memory import parts
from moe_cupy.kernels.cuda import launches
from moe_cupy.kernels.cuda.emulation.library import Library, emulated
from moe_cupy.kernels.cuda.launches import BY_KEY, STATE, Halt, Pointers, Residency
from moe_cupy.kernels.samples import unset
from moe_cupy.lab.belady import Static

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here: kernels cannot run on the CPU")
LAYERS, EXPERTS, USED = 3, 12, 4
KEYS = LAYERS * EXPERTS
PROFILE = [int(n) for n in np.random.default_rng(4).integers(0, 9, KEYS)]
MAKERS: dict[str, Callable[[Geometry], Any]] = {name: POLICIES[name] for name in RULES} | {
    "static": lambda geometry: Static(geometry, PROFILE),
    "echo": POLICIES["echo"],
}
FOREVER = 1 << 62  # a turn that never comes


@pytest.fixture(scope="module")
def library() -> Library:
    return emulated()


def empty_pool(slots: int, rule: str) -> Residency:
    by_key = np.zeros((KEYS, len(BY_KEY)), np.int64)
    by_key[:, 0] = -1
    if rule == "static":
        by_key[:, BY_KEY.index("uses")] = PROFILE
    state = np.zeros(len(STATE), np.int64)
    state[STATE.index("layer")] = -1
    key_of, powers = np.full(slots, -1, np.int32), np.array(POWERS, np.int64)
    if rule == "echo":
        return Residency(state, by_key, key_of, powers, 0, parts(CompiledEcho(Geometry(slots, LAYERS, EXPERTS))))
    return Residency(state, by_key, key_of, powers, RULES[{"static": "lru"}.get(rule, rule)].number)


def new_loads() -> np.ndarray:
    return np.full(1 + 3 * USED, 77, np.int32)


def told(loads: np.ndarray) -> list[tuple[int, int]]:
    n = loads[0]
    return list(zip(loads[1 : 1 + n].tolist(), loads[1 + USED : 1 + USED + n].tolist(), strict=True))


def counted(r: Residency) -> dict[str, int]:
    return {name: int(r.state[STATE.index(name)]) for name in ("hits", "misses", "evictions", "prefetched", "wasted")}


@dataclass
class Event:
    """A layer's experts, and what is fetched ahead for the next layer in the same event."""

    layer: int
    ids: np.ndarray
    ahead: np.ndarray | None


def events(rng: np.random.Generator, count: int, ahead: bool) -> Iterator[Event]:
    """Distinct ids, some more popular than others, layers in turn; with the last layer nothing is fetched ahead."""
    popularity = rng.dirichlet(np.ones(EXPERTS) * 0.5, LAYERS) + 0.01
    for i in range(count):
        layer = i % LAYERS

        def draw(at: int) -> np.ndarray:
            p = popularity[at] / popularity[at].sum()
            return rng.choice(EXPERTS, USED, replace=False, p=p).astype(np.int32)

        guess = ahead and layer + 1 < LAYERS and rng.random() < 0.7
        yield Event(layer, draw(layer), draw(layer + 1) if guess else None)


def one_event(library: Library, r: Residency, pool: Pool, event: Event, pinned: Sequence[int], block: int) -> None:
    """An event on both; raises AssertionError where they do not agree."""
    slots, loads = unset(USED, dtype=np.int32), new_loads()
    library.launch(launches.resolve(slots, loads, event.ids, r, event.layer, EXPERTS, block=block))
    keys = [EXPERTS * event.layer + int(e) for e in event.ids]
    plan = pool.access(event.layer, keys, pinned)
    where = dict(plan.hits) | {load.key: load.slot for load in plan.loads}
    assert told(loads) == [(load.key, load.slot) for load in plan.loads]
    assert slots.tolist() == [where[key] for key in keys]
    if event.ahead is not None:
        first, most = EXPERTS * (event.layer + 1), min(USED, max(0, pool.slots - USED))
        if most:
            library.launch(launches.resolve_ahead(loads, event.ahead, r, first, most, block=block))
            plan2 = pool.prefetch([first + int(e) for e in event.ahead[:most]], [*keys, *pinned])
            assert told(loads) == [(load.key, load.slot) for load in plan2]
    resident = {int(key): slot for slot, key in enumerate(r.key_of) if key >= 0}
    assert resident == pool.slot_of
    assert r.by_key[:, 0].tolist() == [resident.get(key, -1) for key in range(KEYS)]


@pytest.mark.parametrize("rule", MAKERS)
@given(seed=st.integers(0, 2**32 - 1), slots=st.integers(USED, KEYS + 3), pins=st.integers(0, 6), ahead=st.booleans(),
       block=st.sampled_from([32, 64, 256]))  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_the_kernel_decides_as_the_cache_does(library, rule, seed, slots, pins, ahead, block):
    """Any capacity; some experts are pinned for good once they are there, as far as an event always finds room."""
    rng = np.random.default_rng(seed)
    r, pool = empty_pool(slots, rule), Pool(slots, MAKERS[rule](Geometry(slots, LAYERS, EXPERTS)))
    pinned = rng.choice(KEYS, min(pins, slots - USED), replace=False).tolist()
    r.by_key[pinned, BY_KEY.index("turn")] = FOREVER
    for event in events(rng, 90, ahead):
        one_event(library, r, pool, event, pinned, block)
    c = pool.counters
    assert counted(r) == {"hits": c.hits, "misses": c.misses, "evictions": c.evictions, "prefetched": c.prefetched,
                          "wasted": c.wasted}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
@given(seed=st.integers(0, 2**32 - 1), slots=st.integers(USED, KEYS), split=st.integers(0, 60), ahead=st.booleans())
@settings(max_examples=25, deadline=None)
def test_tables_decide_as_the_policy_does_and_can_be_handed_to_the_kernel(library, rule, seed, slots, split, ahead):
    """In the middle of the events the tables go to the device, which goes on as if it had seen it all."""
    geometry, rng = Geometry(slots, LAYERS, EXPERTS), np.random.default_rng(seed)
    pool, tabled = Pool(slots, POLICIES[rule](geometry)), Pool(slots, Tabled(geometry, rule))
    r = empty_pool(slots, rule)
    for i, event in enumerate(events(rng, 90, ahead)):
        if i < split:
            keys = [EXPERTS * event.layer + int(e) for e in event.ids]
            assert pool.access(event.layer, keys) == tabled.access(event.layer, keys)
            continue
        if i == split:
            policy: Any = tabled.policy
            r.by_key[:, 0] = [tabled.slot_of.get(key, -1) for key in range(KEYS)]
            r.by_key[:, 1], r.by_key[:, 2] = policy.uses, policy.last
            for key, slot in tabled.slot_of.items():
                r.key_of[slot] = key
            r.state[:3] = policy.now, policy.token, policy.layer
        one_event(library, r, pool, event, (), 64)


def test_echo_forgets_what_is_a_thousand_tokens_old(library):
    """More tokens than are remembered, more keys than a word has bits; slots and loads of every event."""
    layers, experts, slots, rng = 2, 50, 30, np.random.default_rng(3)
    geometry = Geometry(slots, layers, experts)
    pool, policy = Pool(slots, POLICIES["echo"](geometry)), CompiledEcho(geometry)
    by_key = np.zeros((layers * experts, len(BY_KEY)), np.int64)
    by_key[:, 0] = -1
    state, key_of = np.zeros(len(STATE), np.int64), np.full(slots, -1, np.int32)
    r = Residency(state, by_key, key_of, np.array(POWERS, np.int64), 0, parts(policy))
    topics = [rng.dirichlet(np.ones(experts) * 0.1, layers) + 1e-4 for _ in range(6)]
    for token in range(TOKENS + 80):
        topic = topics[token // 7 % 6]
        for layer in range(layers):
            p = topic[layer] / topic[layer].sum()
            ids = rng.choice(experts, USED, replace=False, p=p).astype(np.int32)
            got, loads = unset(USED, dtype=np.int32), new_loads()
            library.launch(launches.resolve(got, loads, ids, r, layer, experts, block=32))
            plan = pool.access(layer, [experts * layer + int(e) for e in ids])
            assert told(loads) == [(load.key, load.slot) for load in plan.loads], f"token {token}"
    assert counted(r)["hits"] == pool.counters.hits > 1000


def test_a_kernel_with_another_rule_is_seen(library):
    """Each rule is told from each other by these events: the tests above compare something."""
    for rule in RULES:
        for other in set(RULES) - {rule}:
            rng = np.random.default_rng(1)
            r, pool = empty_pool(9, rule), Pool(9, POLICIES[other](Geometry(9, LAYERS, EXPERTS)))
            with pytest.raises(AssertionError):
                for event in events(rng, 400, False):
                    one_event(library, r, pool, event, (), 64)


@given(st.lists(st.integers(0, 400), min_size=1, max_size=40))
def test_decayed_counts_are_what_they_say_they_are(steps):
    """Within what 40 dropped bits may add up to; and greater sums are greater numbers."""
    token, count, exact, seen = 0, 0, 0.0, []
    for step in steps:
        token, now = token + step, token + step
        count, exact = one_more_use(count, now), exact + 2.0 ** (now / HALF_LIFE)
        exponent, fraction = divmod(count, ONE)
        got = 2.0 ** (exponent - 1) * (1 + fraction / ONE)
        assert abs(got / exact - 1) < 2**-33
        seen.append(count)
    assert seen == sorted(seen)


@pytest.mark.parametrize(("slots", "block"), [(4, 32), (9, 128)])
def test_fill_brings_what_resolve_says(library, slots, block):
    """Over 200 events, with experts fetched ahead: what is in a slot is the expert whose slot it is."""
    rng, r = np.random.default_rng(slots), empty_pool(slots, "lfu")  # which gives up what was fetched ahead
    experts = [rng.integers(0, 256, 70, dtype=np.uint8) for _ in range(KEYS)]
    held = [np.zeros(70, np.uint8) for _ in range(slots)]
    loads, ahead, late_ones = new_loads(), new_loads(), 0
    ahead[0] = 0
    for event in events(rng, 200, True):
        got = unset(USED, dtype=np.int32)
        library.launch(launches.resolve(got, loads, event.ids, r, event.layer, EXPERTS, ahead=ahead, block=block))
        flags = loads[1 + 2 * USED : 1 + 2 * USED + loads[0]]
        on_their_way = {slot for _, slot in told(ahead)}
        assert [bool(flag) for flag in flags] == [slot in on_their_way for _, slot in told(loads)]
        late_ones += int(flags.sum())
        for late in (False, True):
            library.launch(launches.fill(Pointers(held), Pointers(experts), loads, 70, late, blocks=2, block=32))
        for e, slot in zip(event.ids, got, strict=True):
            assert np.array_equal(held[slot], experts[EXPERTS * event.layer + e])
        ahead[0] = 0
        if event.ahead is not None and slots > USED:
            first = EXPERTS * (event.layer + 1)
            library.launch(launches.resolve_ahead(ahead, event.ahead, r, first, min(USED, slots - USED), block=block))
            library.launch(launches.fill(Pointers(held), Pointers(experts), ahead, 70, blocks=2, block=32))
    assert (late_ones > 0) == (slots > USED), "or the second fill had nothing to do"


def test_resolve_says_where_there_is_no_room(library):
    r, got, loads = empty_pool(2, "lru"), unset(USED, dtype=np.int32), new_loads()
    ids = np.array([3, 1, 4, 5], np.int32)
    library.launch(launches.resolve(got, loads, ids, r, 0, EXPERTS))
    assert got.tolist() == [0, 1, -1, -1] and told(loads) == [(3, 0), (1, 1)]
    assert r.state[STATE.index("no_room")] == 2


def test_an_expert_that_is_not_in_memory_halts_the_token_and_changes_nothing(library):
    """The event does not begin, later ones do nothing; told are the layer and who is missing; then it goes on."""
    r, got, loads = empty_pool(6, "lfu"), unset(USED, dtype=np.int32), new_loads()
    halt = Halt(np.ones(KEYS, np.uint64), np.zeros(1 + USED, np.int32), np.zeros(64, np.int32))
    library.launch(launches.resolve(got, loads, np.array([0, 1, 2, 3], np.int32), r, 0, EXPERTS, halt=halt))
    assert halt.log[:5].tolist() == [4, 0, 1, 2, 3] and halt.halt[0] == 0
    before, halt.source_of[EXPERTS + 7] = (r.state.copy(), r.by_key.copy(), r.key_of.copy()), 0
    second = np.array([6, 7, 1, 2], np.int32)
    r.by_key[EXPERTS + 6, 0] = 5  # is here already
    before[1][EXPERTS + 6, 0] = 5
    for layer, ids in ((1, second), (2, np.array([0, 1, 2, 3], np.int32))):
        library.launch(launches.resolve(got, loads, ids, r, layer, EXPERTS, halt=halt))
        assert halt.halt.tolist() == [2, 7, 1, 2, -1] and loads[0] == 0 and got.tolist() == [-1] * USED
    library.launch(launches.resolve_ahead(loads, second, r, 2 * EXPERTS, USED, apart=True, halt=halt))
    assert all(np.array_equal(a, b) for a, b in zip(before, (r.state, r.by_key, r.key_of), strict=True))
    halt.source_of[EXPERTS + 7], halt.halt[0] = 1, 0
    library.launch(launches.resolve(got, loads, second, r, 1, EXPERTS, halt=halt))
    assert loads[0] == 3 and min(got) >= 0 and halt.log[0] == 7


def test_what_is_fetched_ahead_is_only_what_is_in_memory(library):
    r, loads = empty_pool(6, "lru"), new_loads()
    halt = Halt(np.ones(KEYS, np.uint64), np.zeros(1 + USED, np.int32), np.zeros(64, np.int32))
    halt.source_of[2] = 0
    library.launch(launches.resolve_ahead(loads, np.array([5, 2, 3, 4], np.int32), r, 0, 3, halt=halt))
    assert told(loads) == [(5, 0), (3, 1)]


def test_the_caches_of_two_size_classes_are_two_pools(library):
    """What an event uses in one pool does not pin it when another pool fetches ahead."""
    cache = ExpertCache(EXPERTS, (0, 1), (5, 5), POLICIES["lru"])
    pools = [empty_pool(5, "lru") for _ in range(2)]
    rng = np.random.default_rng(2)
    for i in range(60):
        layer, ids, ahead = i % 2, *(rng.choice(EXPERTS, USED, replace=False).astype(np.int32) for _ in range(2))
        got, loads = unset(USED, dtype=np.int32), new_loads()
        library.launch(launches.resolve(got, loads, ids, pools[layer], layer, EXPERTS))
        cache.access(layer, ids.tolist())
        if layer == 0:
            library.launch(launches.resolve_ahead(loads, ahead, pools[1], EXPERTS, 1, apart=True))
            plan = cache.prefetch(1, [int(ahead[0])], {int(e) for e in ids})
            assert told(loads) == [(load.key, load.slot - 5) for load in plan]
        for pool, r in zip(cache.pools, pools, strict=True):
            first = 0 if r is pools[0] else 5
            assert {int(k): s + first for s, k in enumerate(r.key_of) if k >= 0} == pool.slot_of
