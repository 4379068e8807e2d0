"""Every step of a layer against its definition, written differently: loops, complex numbers, float64, paper."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ref.attention import attend, softmax, visible
from moe_ref.config import ModelConfig, load_config
from moe_ref.experts import moe, silu, swiglu
from moe_ref.kv import KV
from moe_ref.norm import rms_norm
from moe_ref.rope import apply_rope, rope_tables
from moe_ref.routing import route, top_k

U = 2.0**-24  # unit roundoff of float32: each operation is off by at most this share of its result
SEEDS = st.integers(0, 2**32 - 1)
few = settings(deadline=None, max_examples=60)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def within(got: np.ndarray, expected: np.ndarray, tolerance: np.ndarray | float, context: str) -> None:
    expected = np.asarray(expected, np.float64)
    assert got.shape == expected.shape, (context, got.shape, expected.shape)
    excess = np.abs(got - expected) / np.maximum(tolerance, 1e-300)
    worst = np.unravel_index(np.argmax(np.where(np.isnan(excess), np.inf, excess)), excess.shape)
    assert excess[worst] <= 1, (
        f"{context}, shape {got.shape}: err/tol {excess[worst]:.3g} at {worst}: "
        f"{got[worst]}, expected {expected[worst]}"
    )


# ---------------------------------------------------------------------------------------------------------
# Norm


def test_rms_norm_of_3_4_is_by_hand():
    """Mean square (9 + 16)/2 = 12.5; with epsilon 3.5 the root is 4."""
    got = rms_norm(np.float32([[3, 4], [0, 0]]), np.float32([1, -2]), 3.5)
    assert got.dtype == np.float32 and got.tolist() == [[0.75, -2.0], [0.0, 0.0]]


@few
@given(SEEDS, st.integers(1, 300), st.sampled_from([1e-6, 1e-5, 0.1]), st.sampled_from([1e-4, 1.0, 1e3]))
def test_rms_norm_equals_exact_sums(seed, n, epsilon, size):
    """Squares and sum are off by (n + 1)u relative at most, the root by half of it, product and quotient by u each."""
    x, weight = normal(seed, 2, n) * np.float32(size), normal(seed + 1, n)
    expected = [[float(v) / math.sqrt(math.fsum(float(u) ** 2 for u in row) / n + epsilon) for v in row] for row in x]
    expected = np.array(expected) * weight
    within(rms_norm(x, weight, epsilon), expected, np.abs(expected) * U * (n / 2 + 5), f"seed {seed}, eps {epsilon}")


# ---------------------------------------------------------------------------------------------------------
# Rotary embedding

STYLES = st.sampled_from(["neox", "norm"])


def pairs(x: np.ndarray, n_rot: int, style: str) -> np.ndarray:
    """The rotated features as complex numbers: [T, H, n_rot/2]."""
    x = x.astype(np.float64)
    if style == "neox":
        return x[..., : n_rot // 2] + 1j * x[..., n_rot // 2 : n_rot]
    return x[..., :n_rot].reshape(*x.shape[:2], -1, 2) @ np.array([1, 1j])


@few
@given(SEEDS, STYLES, st.integers(1, 12), st.integers(0, 5), st.sampled_from([1e4, 1e6, 2.0]), st.integers(0, 100_000))
def test_rope_is_multiplication_by_a_unit_complex_number(seed, style, half, rest, base, start):
    """The table is off by u, each product by u, the sum by u: 3u(|a| + |b|), and 4 to be safe."""
    x, n_rot = normal(seed, 3, 2, 2 * half + rest), 2 * half
    positions = start + np.arange(3)
    z = pairs(x, n_rot, style)
    turn = [[np.exp(1j * p * math.pow(base, -2 * i / n_rot)) for i in range(half)] for p in positions]
    expected = z * np.array(turn)[:, None, :]
    out = apply_rope(x, *rope_tables(positions, n_rot, base), style)
    context = f"{style}, n_rot {n_rot}, base {base}, start {start}, seed {seed}"
    tolerance = 4 * U * (np.abs(z.real) + np.abs(z.imag))
    within(pairs(out, n_rot, style).real, expected.real, tolerance, context)
    within(pairs(out, n_rot, style).imag, expected.imag, tolerance, context)
    assert out.dtype == np.float32 and np.array_equal(out[..., n_rot:], x[..., n_rot:]), context


def test_rope_by_hand_in_both_styles():
    """n_rot 4, base 100: frequencies 1 and 1/10; position 0 changes nothing, position 10 turns by 10 and by 1."""
    cos, sin = rope_tables(np.array([0, 10]), 4, 100.0, np.float64)
    x = np.tile([1.0, 0.0, 0.0, 0.0, 7.0], (2, 1, 1))
    first_pair = {"neox": 2, "norm": 1}  # where feature 0 is turned into
    for style, partner in first_pair.items():
        out = apply_rope(x, cos, sin, style)
        expected = np.zeros(5)
        expected[[0, partner, 4]] = math.cos(10), math.sin(10), 7.0
        assert np.array_equal(out[0], x[0]), style
        np.testing.assert_allclose(out[1, 0], expected, rtol=0, atol=1e-15, err_msg=style)
    out = apply_rope(np.tile([0.0, 1.0, 0.0, 0.0, 0.0], (2, 1, 1)), cos, sin, "neox")
    np.testing.assert_allclose(out[1, 0], [0, math.cos(1), 0, math.sin(1), 0], rtol=0, atol=1e-15)


@given(SEEDS, STYLES, st.integers(0, 500), st.integers(0, 500))
def test_rope_makes_scores_depend_on_distance_alone(seed, style, a, b):
    q, k = (np.random.default_rng([seed, i]).standard_normal((1, 1, 8)) for i in range(2))

    def score(m: int, n: int) -> float:
        at_m, at_n = (rope_tables(np.array([p]), 6, 1e4, np.float64) for p in (m, n))
        return float((apply_rope(q, *at_m, style) * apply_rope(k, *at_n, style)).sum())

    assert score(a + 7, a) == pytest.approx(score(b + 7, b), abs=1e-11), f"{style}, seed {seed}, positions {a} and {b}"


# ---------------------------------------------------------------------------------------------------------
# Attention


def test_softmax_by_hand():
    got = softmax(np.log(np.float64([[1, 2, 4], [3, 3, 3]])))
    np.testing.assert_allclose(got, [[1 / 7, 2 / 7, 4 / 7], [1 / 3, 1 / 3, 1 / 3]], rtol=1e-15)
    assert softmax(np.float32([1e38, -1e38, -np.inf])).tolist() == [1.0, 0.0, 0.0]
    assert softmax(np.float32([[1e4, 1e4]])).tolist() == [[0.5, 0.5]]


def attend_by_loops(q, k, v, scale):
    """One head, one token, one position at a time, in Python floats."""
    n_tokens, n_heads, _ = q.shape
    n_positions, n_groups, _ = k.shape
    out = np.zeros((n_tokens, n_heads, v.shape[2]))
    for t in range(n_tokens):
        for h in range(n_heads):
            g = h // (n_heads // n_groups)
            seen = range(n_positions - n_tokens + t + 1)
            products = [[float(a) * float(b) for a, b in zip(q[t, h], k[s, g], strict=True)] for s in seen]
            scores = [scale * math.fsum(row) for row in products]
            top = max(scores)
            weights = [math.exp(x - top) for x in scores]
            for s, w in zip(seen, weights, strict=True):
                out[t, h] += w / math.fsum(weights) * v[s, g].astype(np.float64)
    return out


SHAPES = st.tuples(*(st.integers(1, n) for n in (4, 3, 3)), st.integers(0, 5), st.integers(1, 9), st.integers(1, 9))


@few
@given(SEEDS, SHAPES)
def test_attend_equals_a_loop_over_heads_tokens_and_positions(seed, shape):
    """A score is off by (K + 2)u of its terms, softmax and mixing by (S + 8)u; exp turns score errors into relative."""
    n_tokens, n_groups, per_group, before, key, value = shape
    n_positions = before + n_tokens
    q = normal(seed, n_tokens, n_groups * per_group, key) * 2
    k, v = normal(seed + 1, n_positions, n_groups, key), normal(seed + 2, n_positions, n_groups, value)
    scale = key**-0.5
    largest = scale * np.abs(q).sum(-1).max() * np.abs(k).max()
    tolerance = (2 * (key + 2) * U * largest + (n_positions + 8) * U) * np.abs(v).max()
    expected, context = attend_by_loops(q, k, v, scale), f"seed {seed}, T G H/G before K V {shape}"
    got = attend(q, k, v, scale)
    assert got.dtype == np.float32, context
    within(got, expected, tolerance, context)
    within(attend(*(a.astype(np.float64) for a in (q, k, v)), scale), expected, 1e-12, context)


@few
@given(SEEDS, SHAPES, st.data())
def test_a_later_position_never_changes_an_earlier_output(seed, shape, data):
    n_tokens, n_groups, per_group, before, key, value = shape
    n_positions = before + n_tokens
    q = normal(seed, n_tokens, n_groups * per_group, key)
    k, v = normal(seed + 1, n_positions, n_groups, key), normal(seed + 2, n_positions, n_groups, value)
    t = data.draw(st.integers(0, n_tokens - 1), label="changed from token")
    later_k, later_v = k.copy(), v.copy()
    later_k[before + t :] = 50
    later_v[before + t :] += 1000
    one, other = attend(q, k, v, 0.3), attend(q, later_k, later_v, 0.3)
    assert np.array_equal(one[:t], other[:t]), f"seed {seed}, {shape}: tokens before {t} see position {before + t}"
    assert (one[t:] != other[t:]).any(axis=(1, 2)).all(), f"seed {seed}, {shape}: tokens from {t} on do not see it"


# ---------------------------------------------------------------------------------------------------------
# KV cache


@few
@given(SEEDS, st.lists(st.integers(1, 20), min_size=1, max_size=12))
def test_kv_cache_returns_all_that_was_appended_and_grows_at_most_twofold(seed, sizes):
    cache, end = KV(), 0
    k, v = normal(seed, sum(sizes), 3, 4), normal(seed + 1, sum(sizes), 3, 5)
    for size in sizes:
        start, end = end, end + size
        cache.append(k[start:end] * 0 + 7, v[start:end], start)  # replaced: the same positions again
        keys, values, at = cache.append(k[start:end], v[start:end], start)
        assert np.array_equal(keys, k[:end]) and np.array_equal(values, v[:end]), (seed, sizes, end)
        assert np.array_equal(at, np.arange(end)), (sizes, end, at)
        assert len(keys.base) <= 2 * end and len(values.base) <= 2 * end, (sizes, end, len(keys.base))


def test_kv_cache_keeps_its_dtype():
    keys, values, _ = KV().append(normal(0, 3, 1, 2).astype(np.float64), normal(1, 3, 1, 2).astype(np.float64), 0)
    assert (keys.dtype, values.dtype) == (np.float64, np.float64)


@few
@given(SEEDS, st.lists(st.integers(1, 7), min_size=1, max_size=9), st.integers(1, 6), st.booleans())
def test_a_windowed_cache_keeps_all_that_is_seen_and_little_more(seed, sizes, window, chunked):
    cache, end = KV(window, chunked), 0
    k = normal(seed, sum(sizes), 1, 2)
    for size in sizes:
        start, end = end, end + size
        keys, values, at = cache.append(k[start:end], k[start:end], start)
        context = f"seed {seed}, sizes {sizes}, window {window}, chunked {chunked}, at {start}"
        assert np.array_equal(keys, k[at]) and np.array_equal(values, k[at]), context
        everything = visible(np.arange(start, end), np.arange(end), window, chunked)
        wanted = set(np.flatnonzero(everything.any(axis=0)))
        assert wanted <= set(at) and len(at) <= window + size - 1, f"{context}: keeps {at}, seen {wanted}"


@pytest.mark.parametrize(
    ("window", "chunked", "first"),
    [
        (0, False, [0, 0, 0, 0, 0, 0]),
        (3, False, [0, 0, 0, 1, 2, 3]),
        (3, True, [0, 0, 0, 3, 3, 3]),
        (1, False, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_which_positions_a_query_sees_is_by_hand(window, chunked, first):
    seen = visible(np.arange(6), np.arange(6), window, chunked)
    assert [np.flatnonzero(row).tolist() for row in seen] == [list(range(f, t + 1)) for t, f in enumerate(first)]


def test_a_sink_takes_its_share_and_carries_no_value():
    """Scores 0 and ln 2 and a sink of ln 5: shares 1/8, 2/8, 5/8."""
    q, k, v = np.float64([[[1.0]]]), np.log(np.float64([[[1]], [[2]]])), np.float64([[[8]], [[16]]])
    assert attend(q, k, v, 1.0, sinks=np.log([5.0]))[0, 0, 0] == pytest.approx(1 + 4, abs=1e-14)


# ---------------------------------------------------------------------------------------------------------
# Routing


def routing(experts: int, used: int, scale: float = 1.0, renormalise: bool = True) -> ModelConfig:
    names = "block_count embedding_length context_length attention.head_count attention.layer_norm_rms_epsilon".split()
    keys = dict.fromkeys(names, 1) | {"attention.key_length": 2, "expert_count": experts, "expert_used_count": used}
    c = load_config({f"qwen3moe.{k}": v for k, v in keys.items()} | {"general.architecture": "qwen3moe"}, 1)
    return replace(c, renormalise=renormalise, expert_weights_scale=scale)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize(("renormalise", "weights"), [(True, [2 / 3, 1 / 3]), (False, [4 / 8, 2 / 8])])
def test_routing_of_probabilities_in_eighths_is_by_hand(renormalise, weights, scale):
    logits = np.log(np.float32([[1, 2, 4, 1], [4, 1, 1, 2]]))
    ids, got = route(logits, routing(4, 2, scale, renormalise))
    assert ids.tolist() == [[2, 1], [0, 3]] and got.dtype == np.float32
    within(got, np.tile(weights, (2, 1)) * scale, 16 * U * scale, f"renormalise {renormalise}, scale {scale}")
    got = route(np.log(np.float64([[1, 2, 4, 1]])), routing(4, 2, scale, renormalise))[1]
    within(got, np.array([weights]) * scale, 1e-15 * scale, "float64 all the way")


def test_a_sum_of_weights_below_the_smallest_half_is_raised_to_it():
    """2**15 equal experts: p = 2**-15; divided by the floor 2**-14, not by itself, the weight is one half."""
    ids, weights = route(np.zeros((1, 2**15), np.float32), routing(2**15, 1))
    assert ids.tolist() == [[0]] and weights.tolist() == [[0.5]]


@few
@given(st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(1, 6))
def test_equal_logits_go_to_the_lowest_id(rows, used):
    ids, weights = route(np.float32(rows), routing(6, used))
    expected = [sorted(range(6), key=lambda e: (-row[e], e))[:used] for row in rows]
    assert ids.tolist() == expected, f"logits {rows}, k {used}"
    within(weights.sum(-1), np.ones(len(rows)), 8 * U, f"logits {rows}, k {used}")
    assert (np.diff(weights, axis=-1) <= 0).all(), f"logits {rows}: weights not best first: {weights}"


@few
@given(st.lists(st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 1e-45, 2.0, np.inf]), min_size=1), st.integers(1, 9))
def test_top_k_is_a_stable_descending_sort(scores, k):
    expected = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:k]
    assert top_k(np.array([scores, scores]), k).tolist() == [expected] * 2, (scores, k)


# ---------------------------------------------------------------------------------------------------------
# Experts


def test_silu_by_hand_and_at_its_limits():
    x = np.array([0.0, math.log(3), -math.log(3), 40.0])
    np.testing.assert_allclose(silu(x), [0, math.log(3) * 3 / 4, -math.log(3) / 4, 40.0], rtol=1e-15)
    with np.errstate(all="raise", under="ignore"):
        assert silu(np.float32([-1e4, -3e38, 3e38])).tolist() == [0.0, 0.0, float(np.float32(3e38))]


def counting_expert(width: int, e: int):
    """silu(32 x) is 32 x for x >= 1 (float32), so this expert gives (e + 1) x**2, exactly for small whole x."""
    eye = np.eye(width, dtype=np.float32)
    return 32 * eye, eye, np.float32((e + 1) / 32) * eye


def test_experts_that_multiply_by_their_number_give_hand_computed_sums():
    x = np.float32([[1, 2], [3, 1], [2, 2]])
    ids = np.array([[0, 3], [3, 1], [1, 0]])
    weights = np.float32([[0.5, 0.25], [1, 0], [0.25, 0.75]])
    fetched = []
    got = moe(x, ids, weights, lambda e, x: fetched.append(e) or swiglu(x, counting_expert(2, e)))
    # token 0: 1/2 x 1 + 1/4 x 4 = 1.5; token 1: 1 x 4 = 4; token 2: 1/4 x 2 + 3/4 x 1 = 1.25; times x squared
    assert got.dtype == np.float32 and got.tolist() == [[1.5, 6.0], [36.0, 4.0], [5.0, 5.0]]
    assert sorted(fetched) == [0, 1, 3], f"each chosen expert is fetched once and no other: {fetched}"


def exactly(x: np.ndarray, expert: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One token through one expert in float64, and how far off float32 may be.

    Two dot products of D terms and one of F, silu of slope below 1.1: (2D + F + 8)u of the sum of the terms' sizes.
    """
    gate, up, down = (w.astype(np.float64) for w in expert)
    g, u = np.einsum("d,fd->f", x, gate), np.einsum("d,fd->f", x, up)
    value = np.einsum("f,df->d", g * 0.5 * (1 + np.tanh(g / 2)) * u, down)
    size = np.abs(down) @ ((np.abs(gate) @ np.abs(x)) * (np.abs(up) @ np.abs(x)))
    return value, 1.1 * (2 * gate.shape[1] + gate.shape[0] + 8) * U * size


@few
@given(SEEDS, st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.integers(1, 40), st.integers(1, 40))
def test_grouped_experts_equal_one_token_at_a_time_and_float64(seed, tokens, experts, used, width, inner):
    used, rng = min(used, experts), np.random.default_rng(seed)
    ids = np.stack([rng.permutation(experts)[:used] for _ in range(tokens)])
    weights, x = rng.random((tokens, used), np.float32), normal(seed, tokens, width)
    shapes = [(inner, width), (inner, width), (width, inner)]
    bank = [tuple(normal(seed + 3 * e + i, *shape) for i, shape in enumerate(shapes)) for e in range(experts)]
    parts = [[exactly(x[t], bank[e]) for e in ids[t]] for t in range(tokens)]

    def apply(e: int, x: np.ndarray) -> np.ndarray:
        return swiglu(x, bank[e])

    expected, tolerance = (
        np.array([sum(float(w) * part[i] for w, part in zip(weights[t], parts[t], strict=True)) for t in range(tokens)])
        for i in range(2)
    )
    tolerance += (used + 1) * U * np.array([sum(np.abs(value) for value, _ in row) for row in parts])
    context = f"seed {seed}, T {tokens}, E {experts}, k {used}, D {width}, F {inner}"
    within(moe(x, ids, weights, apply), expected, tolerance, context)
    alone = [moe(x[t : t + 1], ids[t : t + 1], weights[t : t + 1], apply) for t in range(tokens)]
    within(np.concatenate(alone), expected, tolerance, context)


@few
@given(SEEDS, st.integers(1, 5), st.integers(1, 40), st.integers(1, 40))
def test_swiglu_equals_float64(seed, tokens, width, inner):
    x, expert = normal(seed, tokens, width), (normal(seed + 1, inner, width), normal(seed + 2, inner, width))
    expert = (*expert, normal(seed + 3, width, inner))
    expected, tolerance = (np.array(rows) for rows in zip(*(exactly(row, expert) for row in x), strict=True))
    within(swiglu(x, expert), expected, tolerance, f"seed {seed}, T {tokens}, D {width}, F {inner}")
