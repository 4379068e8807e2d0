"""Grouped-query attention over a cache, with what some models add: windows, chunks, sinks, temperature.

Queries that see the same keys meet them together, SPAN positions at a time: heads of a group, or neighbours in a
prompt. So a key comes from memory once for all of them. What a query gets does not depend on who it meets keys with.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from moe_cupy.kernels.host.layer import exponential
from moe_cupy.kernels.host.pieces import ask_for, floats_at, shorts_at
from moe_cupy.kernels.host.rounding import bits_of, float_of, nan_unless_finite, to_half

REASSOCIATE = {"reassoc", "contract", "nsz"}
BLOCK = 8  # tokens of a prompt at a time
SPAN = 32  # positions at a time: 16 KiB of keys of 128 numbers
F32, F16 = range(2)  # what a cache holds
HALF_MAGIC = np.float32(2.0**112)  # between the exponents of float32 and half precision


@njit(inline="always")
def from_half(half):
    """float32 of the bits of a half-precision number."""
    bits = np.int32(half)
    size = bits & np.int32(0x7FFF)
    wide = float_of(size << np.int32(13)) * HALF_MAGIC
    wide = float_of(bits_of(wide) | np.int32(0x7F800000)) if size >= np.int32(0x7C00) else wide
    return float_of(bits_of(wide) | ((bits & np.int32(0x8000)) << np.int32(16)))


@njit(inline="always")
def half_bits(x):
    """Bits int16 of the nearest half-precision number, ties to even."""
    near = bits_of(to_half(x))
    size = near & np.int32(0x7FFFFFFF)
    small = bits_of(float_of(size) / HALF_MAGIC) >> np.int32(13)
    small = np.int32(0x7C00) | ((size >> np.int32(13)) & np.int32(0x3FF)) if size >= np.int32(0x7F800000) else small
    return np.int16(small | ((near >> np.int32(16)) & np.int32(-0x8000)))


@njit
def rows_of(kept, first, last, g, scratch):
    """Positions first..last-1 of a cache as float32 [n, groups, width], and where in it group g is.

    ``kept`` is (address, F32 or F16, groups, width); ``scratch`` [SPAN, 1, width] is for what has to be widened.
    """
    at, kind, groups, width = kept
    if kind == F32:
        return carray(floats_at(at + 4 * first * groups * width), (last - first, groups, width)), g
    halves = carray(shorts_at(at + 2 * first * groups * width), (last - first, groups, width))
    for s in range(last - first):
        for i in range(width):
            scratch[s, 0, i] = from_half(halves[s, g, i])
    return scratch[: last - first], 0


@njit
def ask_ahead(kept, span, part, parts, groups):
    """Ask for a share of the span after that which begins at ``span``, as far as groups[0]..groups[-1] are concerned.

    What lies side by side is asked for in order, which queries that look at one group after the other would not do.
    """
    at, kind, count, width = kept
    size = 4 * width if kind == F32 else 2 * width
    for s in range(span + SPAN + SPAN * part // parts, span + SPAN + SPAN * (part + 1) // parts):
        row = at + s * count * size
        for line in range(row + groups[0] * size, row + (groups[-1] + 1) * size, 64):
            ask_for(line)


@njit(fastmath=REASSOCIATE)
def dot_rows(q, k, g, scale, scores):
    """scores[s] = scale * q.k[s, g]; q [K], k [S, G, K]."""
    for s in range(k.shape[0]):
        total = np.float32(0)
        for i in range(q.size):
            total += q[i] * k[s, g, i]
        scores[s] = total * scale


@njit
def top_of(scores):
    """The largest, or minus infinity."""
    top = np.float32(-np.inf)
    for s in range(scores.size):
        top = max(top, scores[s])
    return top


@njit(fastmath={"contract"})  # exponential's own steps must not be reordered
def to_shares(scores, top):
    """scores [S] = exp(scores - top)."""
    for s in range(scores.size):
        scores[s] = exponential(scores[s] - top)


@njit(fastmath=REASSOCIATE)
def sum_of(x):
    total = np.float32(0)
    for i in range(x.size):
        total += x[i]
    return total


@njit(fastmath=REASSOCIATE)
def mix_rows(shares, v, g, at, out):
    """out += shares @ v[:, g]; shares [S], v [S, G, at least V], out [V].

    Four positions at a time, always those from a multiple of four on; ``at`` is the first one.
    """
    s = 0
    while s < shares.size:
        if (at + s) % 4 == 0 and s + 4 <= shares.size:
            a, b, c, d = shares[s], shares[s + 1], shares[s + 2], shares[s + 3]
            for i in range(out.size):
                out[i] += (a * v[s, g, i] + b * v[s + 1, g, i]) + (c * v[s + 2, g, i] + d * v[s + 3, g, i])
            s += 4
        else:
            for i in range(out.size):
                out[i] += shares[s] * v[s, g, i]
            s += 1


@njit
def oldest(position, window, chunked):
    """The first position that a query sees."""
    if not window:
        return 0
    return position // window * window if chunked else max(0, position - window + 1)


@njit
def score(queries, scales, groups, kept, low, scores):
    """scores[r, s - low] = scales[r] * queries[r].k[s, groups[r]] for positions s from ``low`` on; scores [R, S]."""
    high, scratch = low + scores.shape[1], np.empty((SPAN, 1, kept[3]), np.float32)
    for start in range(low // SPAN * SPAN, high, SPAN):
        first, last = max(start, low), min(start + SPAN, high)
        k, at = rows_of(kept, first, last, groups[0], scratch)
        for r in range(len(queries)):
            if r and groups[r] != groups[r - 1]:
                k, at = rows_of(kept, first, last, groups[r], scratch)
            ask_ahead(kept, start, r, len(queries), groups)
            dot_rows(queries[r], k, at, scales[r], scores[r, first - low : last - low])


@njit
def mix(scores, lows, highs, groups, kept, mixed):
    """mixed[r] = shares of r @ v[lows[r] : highs[r], groups[r]]; scores [R, S] are from position lows[0] on."""
    low, high, scratch = lows[0], lows[0] + scores.shape[1], np.empty((SPAN, 1, kept[3]), np.float32)
    mixed[:] = np.float32(0)
    for start in range(low // SPAN * SPAN, high, SPAN):
        first, last = max(start, low), min(start + SPAN, high)
        v, at = rows_of(kept, first, last, groups[0], scratch)
        for r in range(len(mixed)):
            if r and groups[r] != groups[r - 1]:
                v, at = rows_of(kept, first, last, groups[r], scratch)
            ask_ahead(kept, start, r, len(mixed), groups)
            a, b = max(first, lows[r]), min(last, highs[r])
            if a < b:
                mix_rows(scores[r, a - low : b - low], v[a - first : b - first], at, a, mixed[r])


@njit(error_model="numpy")
def attend(q, pair, count, kept, factors, seen, out):
    """Attention for (head, token) pairs pair..pair+count-1: heads of one token, or tokens of a head."""
    (keys, values), (scale, sinks), (n_past, window, chunked) = kept, factors, seen
    tokens, per_group, groups = q.shape[0], q.shape[1] // keys[2], np.empty(count, np.int64)
    queries, scales = np.empty((count, q.shape[2]), np.float32), np.empty(count, np.float32)
    lows, highs = np.empty(count, np.int64), np.empty(count, np.int64)
    for r in range(count):
        t, h = (pair + r) % tokens, (pair + r) // tokens
        scales[r], groups[r] = scale[t], h // per_group
        for i in range(q.shape[2]):
            queries[r, i] = nan_unless_finite(q[t, h, i])  # else a score of minus infinity would hide it
        lows[r], highs[r] = oldest(n_past + t, window, chunked), n_past + t + 1
    scores, mixed = np.empty((count, highs[-1] - lows[0]), np.float32), np.empty((count, out.shape[2]), np.float32)
    score(queries, scales, groups, keys, lows[0], scores)
    totals = np.zeros(count, np.float32)
    for r in range(count):
        own = scores[r, lows[r] - lows[0] : highs[r] - lows[0]]
        top, sink = top_of(own), nan_unless_finite(sinks[(pair + r) // tokens]) if sinks.size else np.float32(0)
        top = sink if sinks.size and sink > top else top
        to_shares(own, top)
        totals[r] = sum_of(own) + (exponential(sink - top) if sinks.size else np.float32(0))
    mix(scores, lows, highs, groups, values, mixed)
    for r in range(count):
        for i in range(mixed.shape[1]):
            out[(pair + r) % tokens, (pair + r) // tokens, i] = mixed[r, i] / totals[r]


@njit(
    "void(f4[:, :, ::1], UniTuple(UniTuple(i8, 4), 2), UniTuple(f4[::1], 2), UniTuple(i8, 3), f4[:, :, ::1], i8, i8)",
    nogil=True,
    cache=True,
)
def attention(q, kept, factors, seen, out, first, last):
    """Attention for (head, token) pairs first..last-1 of H*T: any share of them has early and late tokens.

    ``kept`` are the caches of keys and values as ``rows_of`` takes them, ``factors`` are scale [T] and sinks [H] or
    [0], ``seen`` is (n_past, window, chunked); q [T, H, K] at positions n_past.., out [T, H, V].
    """
    tokens, pair = q.shape[0], first
    while pair < last:
        count = last - pair if tokens == 1 else min(BLOCK, tokens - pair % tokens, last - pair)
        attend(q, pair, count, kept, factors, seen, out)
        pair += count


@njit("void(f4[:, ::1], f4, i8, i8)", nogil=True, cache=True)
def hadamard(runs, scale, first, last):
    """Rows first..last-1 of runs [n, count] times scale and the Hadamard matrix: sums and differences, ever further."""
    count = runs.shape[1]
    for r in range(first, last):
        for i in range(count):
            runs[r, i] *= scale
        length = 1
        while length < count:
            for at in range(0, count, 2 * length):
                for i in range(at, at + length):
                    a, b = runs[r, i], runs[r, i + length]
                    runs[r, i], runs[r, i + length] = a + b, a - b
            length *= 2
