"""Predictors rank what the next layer's router says early: by tokens that want an expert, best rank, id."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_cupy.prefetch import PREFETCHERS, NextGate, NoPrefetch, rank

# Three tokens, four experts each, best first. By hand:
#   expert   tokens   best rank
#   8        3        0 (token 1)
#   5        2        0 (token 0)
#   2        2        1 (tokens 0 and 1: equal, so the id decides against 7)
#   7        2        1 (token 2)
#   9        1        0 (token 2)
#   3        1        2 (token 0)
#   4        1        3 (token 1)
IDS = [[5, 2, 3, 8], [8, 2, 7, 4], [9, 7, 8, 5]]


def test_rank_orders_by_tokens_then_best_rank_then_id():
    assert rank(IDS) == [8, 5, 2, 7, 9, 3, 4]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], []),
        ([[]], []),
        ([[3, 1, 2]], [3, 1, 2]),  # one token: its own order
        ([[1, 2], [2, 1]], [1, 2]),  # two tokens, both ranks 0: the lower id
        ([[7, 2], [2, 9]], [2, 7, 9]),  # two tokens beat a better rank
        ([[9], [4], [6]], [4, 6, 9]),
    ],
)
def test_rank_worked_out_by_hand(ids, expected):
    assert rank(ids) == expected


ROUTES = st.integers(1, 5).flatmap(
    lambda k: st.lists(st.lists(st.integers(0, 15), min_size=k, max_size=k, unique=True), max_size=12)
)


@given(ROUTES)
def test_rank_names_every_expert_once_and_no_pair_stands_the_wrong_way_round(ids):
    ranked = rank(ids)
    assert sorted(ranked) == sorted({e for row in ids for e in row})
    wants = {e: [row.index(e) for row in ids if e in row] for e in ranked}
    for a, b in zip(ranked, ranked[1:], strict=False):
        assert len(wants[a]) >= len(wants[b]), f"{ids}: {a} before {b}"
        if len(wants[a]) == len(wants[b]):
            assert (min(wants[a]), a) < (min(wants[b]), b), f"{ids}: {a} before {b}"


@given(ROUTES, st.randoms(use_true_random=False))
def test_rank_does_not_depend_on_the_order_of_the_tokens(ids, random):
    shuffled = list(ids)
    random.shuffle(shuffled)
    assert rank(shuffled) == rank(ids)


def test_no_prefetch_wants_nothing_and_runs_no_router_early():
    assert NoPrefetch().predict(IDS) == []
    assert NoPrefetch.needs_next_router is False


def test_next_gate_fetches_what_the_early_router_says():
    assert NextGate().predict(IDS) == [8, 5, 2, 7, 9, 3, 4]
    assert NextGate.needs_next_router is True
    given_ids = [list(row) for row in IDS]
    NextGate().predict(given_ids)
    assert given_ids == IDS, "the router's answer must stay as it was"


def test_the_table_of_prefetchers_makes_them_by_name():
    assert {name: type(make()) for name, make in PREFETCHERS.items() if name in ("none", "next-gate")} == {
        "none": NoPrefetch,
        "next-gate": NextGate,
    }


# ---------------------------------------------------------------------------------------------------------
# Predictors from routes: three layers, tokens told one by one


def told(name: str, tokens: list[list[list[int]]], last: list[list[int]]) -> list[int]:
    """What is predicted of the layer after ``last``, the beginning of one more token."""
    predictor = PREFETCHERS[name]()
    predictor.begin_sequence()
    for token in [*tokens, last]:
        for layer, ids in enumerate(token):
            predictor.observe(layer, [ids])
    return predictor.predict([])


A, B = [[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9], [2, 1]]


@pytest.mark.parametrize(
    ("name", "tokens", "last", "expected"),
    [
        ("previous-token", [A, B], A[:1], [8, 9]),
        ("previous-token", [A], B[:2], [4, 5]),
        ("previous-token", [], A[:1], []),
        ("frequency", [A, B, A], B[:1], [2, 3]),
        ("transition", [A, B, A, B], A[:1], [2, 3]),
        ("transition", [A, B, A, B], B[:2], [1, 2]),
        ("transition", [A, B], [[0, 6]], [2, 3]),  # all four follow with probability 1/2: the lower ids
        ("score-depth", [A, B], A[:1], [2, 3]),  # mass 1 + 1 of 2 reaches 0.7 x 2 with the second
        ("score-depth", [A, B], [[0, 6]], [2, 3, 8]),  # 1/2 each: three reach 1.4
        ("echo", [A, B] * 10, A[:1], [2, 3]),
        ("echo", [A, B] * 10, B[:2], [1, 2]),
        ("nearest-matrix", [A, A, B], A[:1], [2, 3]),  # no earlier sequence: its own counts
    ],
)
def test_predictions_from_routes_worked_out_by_hand(name, tokens, last, expected):
    assert told(name, tokens, last) == expected


def test_the_nearest_matrix_is_that_of_the_earlier_sequence_on_the_same_topic():
    predictor = PREFETCHERS["nearest-matrix"]()
    for sequence in ([A, A, A], [B, B, B, B], [A]):
        predictor.begin_sequence()
        for token in sequence:
            for layer, ids in enumerate(token):
                predictor.observe(layer, [ids])
    predictor.observe(0, [[0, 1]])
    assert predictor.predict([]) == [2, 3]
    predictor.observe(1, [[2, 3]])
    assert predictor.predict([]) == [4, 5]


@pytest.mark.parametrize("name", PREFETCHERS)
@given(ids=st.lists(ROUTES, min_size=1, max_size=6))
def test_no_predictor_names_an_expert_twice_or_fails_on_any_routes(name, ids):
    predictor = PREFETCHERS[name]()
    predictor.begin_sequence()
    for i, rows in enumerate(ids):
        if rows:
            predictor.observe(i % 3, rows)
            predicted = predictor.predict(rows)
            assert len(set(predicted)) == len(predicted)
