"""Sampling draws from what llama.cpp's filters leave of a distribution, worked out by hand, and refuses bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moe_ref.sampling import Sampler, SamplingError

OFF = dict(top_k=0, top_p=1.0, min_p=0.0)
# Logits whose probabilities are 8/16, 4/16, 2/16, 1/16, 1/16: ids 3, 0, 4, 1, 2.
HALVES = np.log2([4, 1, 1, 8, 2]) * np.log(2)


def distribution(logits: Any, **parameters: Any) -> dict[int, float]:
    ids, probabilities = Sampler(**{"temp": 1.0} | OFF | parameters).distribution(np.asarray(logits))
    return dict(zip(ids.tolist(), probabilities.round(12).tolist(), strict=True))


def test_without_filters_the_softmax_is_drawn_from() -> None:
    assert distribution(HALVES) == {3: 0.5, 0: 0.25, 4: 0.125, 1: 0.0625, 2: 0.0625}


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [(1, {3: 1.0}), (2, {3: 0.666666666667, 0: 0.333333333333}), (4, {3: 8 / 15, 0: 4 / 15, 4: 2 / 15, 1: 1 / 15})],
)
def test_top_k_keeps_the_k_largest_and_of_equal_ones_the_lowest_ids(top_k: int, expected: dict[int, float]) -> None:
    assert distribution(HALVES, top_k=top_k) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.0, 1), (0.49, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.9, 4), (0.99, 5), (1.0, 5)]
)
def test_top_p_keeps_tokens_up_to_and_with_the_one_that_reaches_p(top_p: float, kept: int) -> None:
    nudged = HALVES + np.array([0, 0, 0, 1e-9, 0])  # so that the sums 1/2 and 3/4 are reached whatever the rounding
    assert len(distribution(nudged, top_p=top_p)) == kept


@pytest.mark.parametrize(("min_p", "kept"), [(0.0, 5), (0.1, 5), (0.13, 3), (0.24, 3), (0.26, 2), (0.51, 1), (1.0, 1)])
def test_min_p_keeps_tokens_of_at_least_that_share_of_the_best(min_p: float, kept: int) -> None:
    assert len(distribution(HALVES, min_p=min_p)) == kept


def test_temperature_sharpens_and_flattens() -> None:
    assert distribution(HALVES, temp=0.5) == pytest.approx({3: 64 / 86, 0: 16 / 86, 4: 4 / 86, 1: 1 / 86, 2: 1 / 86})
    assert distribution([0.0, np.log(16)], temp=2.0) == pytest.approx({1: 0.8, 0: 0.2})
    assert distribution([0.0, 1.0], temp=1e-300) == {1: 1.0, 0: 0.0}
    assert distribution([-1e308, 1e308], temp=0.1) == {1: 1.0, 0: 0.0}


def test_filters_apply_in_the_order_top_k_top_p_min_p_temperature() -> None:
    # top_k 2 leaves 2/3 and 1/3, so top_p 0.6 leaves one; top_p first (1/2, 1/4) would leave two.
    assert distribution(HALVES, top_k=2, top_p=0.6) == {3: 1.0}
    # top_p 0.6 takes 1/2 and 1/4 at temperature 1; at 0.5 the first alone has 0.74, at 3 it would take three.
    for temp in (0.5, 1.0, 3.0):
        assert list(distribution(HALVES, top_p=0.6, temp=temp)) == [3, 0]
        assert list(distribution(HALVES, min_p=0.26, temp=temp)) == [3, 0]


def test_draws_have_the_frequencies_of_the_distribution() -> None:
    sampler = Sampler(temp=1.0, seed=7, **OFF)
    n = 40_000
    counts = np.bincount([sampler.sample(HALVES) for _ in range(n)], minlength=5)
    expected = n * np.array([4, 1, 1, 8, 2]) / 16
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 23.5, f"4 degrees of freedom: above 23.5 once in 10 000 seeds; counts {counts}"


@pytest.mark.parametrize("temp", [0.0, -1.0])
def test_greedy_takes_the_largest_and_of_equal_ones_the_lowest_id(temp: float) -> None:
    assert Sampler(temp=temp).sample(np.array([1.0, 3.0, 3.0, -np.inf])) == 1
    assert Sampler(temp=temp).sample(np.zeros(1000, np.float16)) == 0
    assert type(Sampler(temp=temp).sample(HALVES)) is int is type(Sampler(temp=1.0).sample(HALVES))


def test_a_seed_gives_the_same_sequence_and_minus_one_another_each_time() -> None:
    flat = np.zeros(1000)
    first, second, other = (Sampler(temp=1.0, seed=seed, **OFF) for seed in (5, 5, 6))
    draws = [[s.sample(flat) for _ in range(20)] for s in (first, second, other)]
    assert draws[0] == draws[1] != draws[2]
    free = [[Sampler(temp=1.0, **OFF).sample(flat) for _ in range(8)] for _ in range(2)]
    assert free[0] != free[1]  # equal once in 1e24


def test_banned_tokens_are_never_drawn() -> None:
    logits = np.full(50, -np.inf)
    logits[[7, 30]] = 0.0
    for parameters in (OFF, {}, dict(top_k=3, top_p=0.999, min_p=0.0)):
        assert distribution(logits, **parameters) == {7: 0.5, 30: 0.5}
    assert distribution([-np.inf, -np.inf, 2.0], top_k=1) == {2: 1.0}


def test_k_beyond_the_vocabulary_and_negative_k_keep_everything() -> None:
    assert len(distribution(HALVES, top_k=100)) == len(distribution(HALVES, top_k=-1)) == 5


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ([0.0, np.nan, np.nan], "2 of 3 logits are NaN or infinite, the first is nan at id 1"),
        ([np.inf, 0.0], "1 of 2 logits are NaN or infinite, the first is inf at id 0"),
        ([-np.inf, -np.inf], "all 2 logits are -inf"),
        ([], r"shape \(0,\), expected \[vocab\]"),
        ([[0.0, 1.0]], r"shape \(1, 2\), expected \[vocab\]; pass one position"),
    ],
)
@pytest.mark.parametrize("temp", [0.0, 1.0])
def test_logits_that_give_no_choice_are_refused(logits: list, message: str, temp: float) -> None:
    with pytest.raises(SamplingError, match=message):
        Sampler(temp=temp).sample(np.array(logits))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temp", v) for v in (np.nan, np.inf, "hot", None)),
        *(("top_k", v) for v in (1.5, "40", True)),
        *((name, v) for name in ("top_p", "min_p") for v in (-0.1, 1.1, np.nan, "0.9")),
        *(("seed", v) for v in (-2, 0.5, None)),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(SamplingError, match=f"^{name} is .*, expected "):
        Sampler(**{name: value})
