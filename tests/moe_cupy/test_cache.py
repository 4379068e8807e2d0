"""The cache decides as the textbook does, on published routes and on any workload, and never breaks its own rules."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_cupy.cache import POLICIES, Counters, ExpertCache, Load
from moe_cupy.cache.echo import TOKENS

# ---------------------------------------------------------------------------------------------------------
# Published hit rates

ROUTES = SHARED / "data" / "routes"
COLUMNS = {"lru": 5, "lfu": 6}  # of the tables in BASELINE.md, from 0; more in test_replay.py
TEXTBOOK = ("lru", "lfu")
NORMAL = {("gpt-oss-20b_decode_2", 25), ("gpt-oss-20b_decode_2", 50)}  # the other rows of gpt-oss take seconds each
PERCENTS = (5, 10, 25, 50)


def published() -> dict[tuple[str, int, str], float]:
    """(file, capacity in percent, policy) -> hit rate in percent, from the table "ship" of BASELINE.md."""
    section = (ROUTES / "BASELINE.md").read_text("utf-8").split("## ship/")[1].split("\n## ")[0]
    rates, name = {}, ""
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 11 and cells[4].endswith("%"):
            name = cells[0] or name
            for policy, column in COLUMNS.items():
                rates[name, int(cells[4].rstrip(" %")), policy] = float(cells[column])
    return rates


def rows_of_the_table() -> list[Any]:
    rows = [(path.stem, percent) for path in sorted(ROUTES.glob("ship/*.npz")) for percent in PERCENTS]
    if not rows:
        return [pytest.param("", 0, marks=pytest.mark.skip(reason=f"no traces in {ROUTES}"))]
    return [pytest.param(*row, marks=() if "qwen3" in row[0] or row in NORMAL else pytest.mark.slow) for row in rows]


@pytest.mark.parametrize(("name", "percent"), rows_of_the_table())
def test_hit_rates_on_real_routes_are_those_published(name, percent):
    with np.load(ROUTES / "ship" / f"{name}.npz") as z:
        rows, n_experts = z["experts"].tolist(), json.loads(str(z["meta"]))["n_experts"]
    layers, expected = len(rows[0]), published()
    for policy in TEXTBOOK:
        cache = ExpertCache(n_experts, [0] * layers, [percent * layers * n_experts // 100], POLICIES[policy])
        for row in rows:
            for layer, ids in enumerate(row):
                cache.access(layer, ids)
        n, total = cache.pools[0].counters, np.size(rows)
        assert n.hits + n.misses == total, f"{policy}: {n}, but the trace holds {total} accesses"
        got, want = 100 * n.hits / total, expected[name, percent, policy]
        assert abs(got - want) <= 0.2, f"{policy}: {got:.2f}% hits, BASELINE.md says {want}%"


@pytest.mark.skipif(not ROUTES.is_dir(), reason=f"{ROUTES} is absent")
def test_the_published_table_is_read_whole():
    rates = published()
    assert len(rates) == 4 * len(PERCENTS) * len(COLUMNS)
    assert rates["gpt-oss-20b_decode_1", 5, "lfu"] == 13.2  # two cells read by eye
    assert rates["qwen3-30b-a3b_decode_1", 25, "lru"] == 81.6
    assert set(NORMAL) <= {key[:2] for key in rates}


def pool_of(policy: str, slots: int) -> ExpertCache:
    return ExpertCache(10, [0], [slots], POLICIES[policy])


def residents(cache: ExpertCache) -> set[int]:
    return set(cache.pools[0].slot_of)


# ---------------------------------------------------------------------------------------------------------
# The textbook's rules, as slow and plain as they can be written


class Textbook:
    """One pool replayed naively: a clock, a record of every key's uses, the victim found by looking at all.

    Event-atomic: hits are counted and touched first, in the order of the ids, then the misses come in.
    LRU gives up whom nobody touched for longest (an arrival touches). LFU gives up whom fewest events used
    since the start, evicted or not; equal counts: the use longest ago (a key never used: its first arrival).
    """

    def __init__(self, slots: int, policy: str):
        self.slots, self.policy, self.now = slots, policy, 0
        self.resident: set[int] = set()
        self.unused: set[int] = set()
        self.uses: dict[int, int] = {}
        self.touched: dict[int, int] = {}
        self.last_use: dict[int, int] = {}
        self.n = Counters()

    def tick(self) -> int:
        self.now += 1
        return self.now

    def worth(self, key: int) -> tuple[int, int]:
        return (0, self.touched[key]) if self.policy == "lru" else (self.uses.get(key, 0), self.last_use[key])

    def bring(self, key: int, keep: set[int]) -> tuple[int, int | None] | None:
        evicted = None
        if len(self.resident) == self.slots:
            evicted = min(self.resident - keep, key=self.worth, default=None)
            if evicted is None:
                return None
            self.n.evictions += 1
            self.n.wasted += evicted in self.unused
            self.drop(evicted)
        self.resident.add(key)
        self.touched[key] = self.tick()
        self.last_use.setdefault(key, self.now)
        return key, evicted

    def drop(self, key: int) -> None:
        self.resident.discard(key)
        self.unused.discard(key)

    def access(self, keys: Sequence[int], pinned: set[int]) -> tuple[list[int], list[Any]]:
        hits = [key for key in keys if key in self.resident]
        misses = [key for key in keys if key not in self.resident]
        self.n.hits += len(hits)
        self.n.misses += len(misses)
        for key in keys:
            self.uses[key] = self.uses.get(key, 0) + 1
            self.last_use[key] = self.tick()
        for key in hits:
            self.touched[key] = self.tick()
            self.unused.discard(key)
        return hits, [self.bring(key, {*keys, *pinned}) for key in misses]

    def prefetch(self, keys: Sequence[int], pinned: set[int]) -> list[Any]:
        loads: list[Any] = []
        for key in keys:
            if key not in self.resident:
                load = self.bring(key, {*keys, *pinned})
                if load is None:
                    break
                self.unused.add(key)
                loads.append(load)
        self.n.prefetched += len(loads)
        return loads


# ---------------------------------------------------------------------------------------------------------
# Any workload

EXPERTS, CLASS_OF_LAYER = 7, (0, 1, 0)
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["access", "access", "access", "prefetch", "forget"]),
        st.integers(0, len(CLASS_OF_LAYER) - 1),
        st.lists(st.integers(0, EXPERTS - 1), max_size=EXPERTS, unique=True),
        st.randoms(use_true_random=False),
    ),
    max_size=60,
)
SLOTS = st.tuples(st.integers(1, 9), st.integers(1, 7))


class Side:
    """A cache and its naive model in step; ``holder`` is what an obedient runtime would have in each slot."""

    def __init__(self, policy: str, slots: Sequence[int]):
        self.cache = ExpertCache(EXPERTS, CLASS_OF_LAYER, slots, POLICIES[policy])
        self.books = [Textbook(n, policy) for n in slots]
        self.ranges = [range(sum(slots[:i]), sum(slots[: i + 1])) for i in range(len(slots))]
        self.holder: dict[int, int] = {}
        self.log: list[Any] = []

    def book(self, layer: int) -> Textbook:
        return self.books[CLASS_OF_LAYER[layer]]

    def pins(self, layer: int, room: int, random: Any) -> set[int]:
        """At most ``room`` resident keys of the layer's pool, now and then one that is not resident as well."""
        resident = sorted(self.book(layer).resident)
        chosen = set(random.sample(resident, random.randint(0, max(0, min(room, len(resident))))))
        return chosen | ({layer * EXPERTS + random.randrange(EXPERTS)} if len(chosen) < room else set())

    def load(self, layer: int, load: Load, keep: set[int]) -> tuple[int, int | None]:
        """Obey a load, and see that it takes a slot of its class from whom it says, or a free one if there is one."""
        of_class = self.ranges[CLASS_OF_LAYER[layer]]
        assert load.slot in of_class, f"{load}: slots of its class are {of_class}"
        assert self.holder.get(load.slot) == load.evicted, f"{load}: the slot holds {self.holder.get(load.slot)}"
        assert load.key not in self.holder.values(), f"{load}: already resident"
        assert load.evicted not in keep, f"{load}: evicted what is in use ({sorted(keep)})"
        free = [slot for slot in of_class if slot not in self.holder]
        assert (load.evicted is None) == bool(free), f"{load}: free slots are {free}"
        self.holder[load.slot] = load.key
        return load.key, load.evicted

    def do(self, kind: str, layer: int, experts: Sequence[int], random: Any) -> None:
        book = self.book(layer)
        if kind == "forget":
            return self.forget(layer, random)
        experts = experts[: book.slots] if kind == "access" else experts
        keys = [layer * EXPERTS + expert for expert in experts]
        pinned = self.pins(layer, book.slots - len(keys), random)
        keep = {*keys, *pinned}
        if kind == "access":
            held = {key: slot for slot, key in self.holder.items()}
            plan = self.cache.access(layer, experts, pinned)
            hits, loads = book.access(keys, pinned)
            assert plan.hits == tuple((key, held[key]) for key in hits), f"{plan} but resident is {held}"
            got: Sequence[Load] = plan.loads
        else:
            got, loads = self.cache.prefetch(layer, experts, pinned), book.prefetch(keys, pinned)
        assert [self.load(layer, load, keep) for load in got] == loads, f"{kind} {keys} pinned {pinned}"
        self.log.append(got)

    def forget(self, layer: int, random: Any) -> None:
        key = random.choice([*sorted(self.book(layer).resident), layer * EXPERTS])  # the last is perhaps not there
        self.cache.forget(key)
        self.book(layer).drop(key)
        self.holder = {slot: k for slot, k in self.holder.items() if k != key}

    def check(self) -> None:
        """The cache's own books against what its decisions, obeyed, have led to."""
        for book, pool, of_class in zip(self.books, self.cache.pools, self.ranges, strict=True):
            held = {key: slot for slot, key in self.holder.items() if slot in of_class}
            assert pool.slot_of == held
            assert set(held) == book.resident and len(held) <= pool.slots == book.slots
            assert pool.unused == book.unused
            assert pool.counters == book.n, f"{pool.counters}, counted by hand {book.n}"
        assert self.cache.resident() == len(self.holder)


@pytest.mark.parametrize("policy", TEXTBOOK)
@given(operations=OPERATIONS, slots=SLOTS)
@settings(max_examples=120, deadline=None)
def test_any_workload_is_served_as_the_textbook_says_and_keeps_the_invariants(policy, operations, slots):
    side = Side(policy, slots)
    for operation in operations:
        side.do(*operation)
        side.check()


@pytest.mark.parametrize("policy", TEXTBOOK)
@given(operations=OPERATIONS, slots=SLOTS)
@settings(max_examples=30, deadline=None)
def test_the_same_calls_give_the_same_decisions(policy, operations, slots):
    sides = [Side(policy, slots), Side(policy, slots)]
    for kind, layer, experts, random in operations:
        state = random.getstate()
        for side in sides:
            random.setstate(state)
            side.do(kind, layer, experts, random)
    assert sides[0].log == sides[1].log


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("slots", [1, 3])
def test_prefetches_that_are_always_wrong_do_not_pile_up_in_the_policy(policy, slots):
    """The same experts come and go for ever: what the policy remembers is bounded by how many there are."""
    cache = pool_of(policy, slots)
    for _ in range(500):
        cache.prefetch(0, [9 - i for i in range(slots)], ())
        cache.access(0, list(range(slots)))
    sizes = {name: len(value) for name, value in vars(cache.pools[0].policy).items() if hasattr(value, "__len__")}
    bound = TOKENS if policy == "echo" else 100  # echo remembers the last TOKENS tokens
    assert sizes and max(sizes.values()) <= bound, f"10 experts, {slots} slots, 500 rounds: {sizes}"


# ---------------------------------------------------------------------------------------------------------
# Cases worked out on paper


@pytest.mark.parametrize(
    ("policy", "events", "expected"),
    [
        ("lru", [[1], [2], [3], [1], [4]], {3, 1, 4}),  # 2 was used longest ago
        ("lru", [[1, 2], [3, 4], [5]], {2, 3, 4, 5}),  # within an event the first id is the older one
        ("lfu", [[1], [1], [2], [3], [4]], {1, 3, 4}),  # 2 and 3 were used once, 2 earlier
        ("lfu", [[1], [1], [2], [2], [3], [3], [4], [5]], {2, 3, 5}),  # 1 goes for 4; then 4 has one use, 2 and 3 two
    ],
)
def test_victims_worked_out_by_hand(policy, events, expected):
    slots = 4 if len(expected) == 4 else 3
    cache = pool_of(policy, slots)
    for ids in events:
        cache.access(0, ids)
    assert residents(cache) == expected


def test_lfu_counts_survive_eviction():
    """9 is used twice, evicted, and comes back with three uses: 1 and 2, used twice each, are the ones to go."""
    cache = pool_of("lfu", 2)
    for ids in ([9], [9], [1], [1], [2]):  # 2 slots: 2 takes the place of 9 (two uses, longer ago than 1's)
        cache.access(0, ids)
    assert residents(cache) == {1, 2}
    for ids in ([2], [9], [5]):  # 9 for 1 (2 uses, longest ago); 5 for 2 (2 uses), not for 9 (3)
        cache.access(0, ids)
    assert residents(cache) == {9, 5}


def test_a_prefetch_is_wasted_if_it_leaves_unused_and_a_hit_if_it_is_used():
    cache = pool_of("lfu", 2)
    cache.access(0, [1])
    cache.prefetch(0, [7], ())
    cache.access(0, [2])  # takes the place of 7, which nobody has used
    assert residents(cache) == {1, 2}
    assert cache.pools[0].counters == Counters(hits=0, misses=2, evictions=1, prefetched=1, wasted=1)
    cache.prefetch(0, [8], pinned=(2,))
    cache.access(0, [8])
    cache.access(0, [3, 4])
    assert cache.pools[0].counters == Counters(hits=1, misses=4, evictions=4, prefetched=2, wasted=1)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prefetch_stops_where_only_pinned_slots_are_left(policy):
    cache = pool_of(policy, 3)
    cache.access(0, [1, 2, 3])
    loads = cache.prefetch(0, [7, 8, 9], pinned=(1, 3))
    assert [(load.key, load.evicted) for load in loads] == [(7, 2)]
    assert residents(cache) == {1, 3, 7}
    assert cache.prefetch(0, [8], pinned=(1, 3, 7)) == ()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("before", "ids", "pinned"), [([], [0, 1, 2, 3], ()), ([5, 6], [0, 1], (5, 6))])
def test_more_than_the_slots_at_once_is_refused_and_nothing_changes(policy, before, ids, pinned):
    """What a refused event would have loaded is not there: nobody was told to load it."""
    cache = pool_of(policy, 3)
    if before:
        cache.access(0, before)
    there = dict(cache.pools[0].slot_of)
    with pytest.raises(ValueError, match=r"4 experts are in use at once, but there are only 3 slots"):
        cache.access(0, ids, pinned)
    assert cache.pools[0].slot_of == there, "keys were made resident although the event was refused"


@pytest.mark.parametrize("policy", POLICIES)
def test_size_classes_keep_apart(policy):
    """Layers of class 1 cannot push out class 0, whatever their traffic, and slot numbers do not overlap."""
    cache = ExpertCache(10, [0, 1, 0], [2, 3], POLICIES[policy])
    cache.access(0, [4])
    cache.access(2, [4])  # another layer of the same class: another key
    for expert in range(10):
        cache.access(1, [expert])
    assert set(cache.pools[0].slot_of) == {4, 24}
    assert sorted(cache.pools[0].slot_of.values()) == [0, 1]
    assert len(cache.pools[1].slot_of) == 3 and sorted(cache.pools[1].slot_of.values()) == [2, 3, 4]
    assert cache.pools[1].counters.evictions == 7 and cache.pools[0].counters.evictions == 0
    cache.forget(24)
    assert set(cache.pools[0].slot_of) == {4} and cache.resident() == 4
