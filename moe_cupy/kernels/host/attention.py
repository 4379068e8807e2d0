"""Grouped-query attention over a cache, with what some models add: windows, chunks, sinks, temperature."""

from __future__ import annotations

import numpy as np
from numba import njit

from moe_cupy.kernels.host.layer import exponential

REASSOCIATE = {"reassoc", "contract", "nsz"}


@njit(fastmath=REASSOCIATE)
def scores_of(q, k, g, scale, scores):
    """scores[s] = scale * q.k[s, g]; returns the largest. q [K], k [S, G, K]."""
    top = np.float32(-np.inf)
    for s in range(k.shape[0]):
        total = np.float32(0)
        for i in range(q.size):
            total += q[i] * k[s, g, i]
        scores[s] = total * scale
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


@njit(fastmath=REASSOCIATE, error_model="numpy")
def mix(shares, total, v, g, out):
    """out = shares @ v[:, g] / total; shares [S], v [S, G, at least V], out [V]."""
    out[:] = np.float32(0)
    for s in range(v.shape[0]):
        p = shares[s]
        for i in range(out.size):
            out[i] += p * v[s, g, i]
    for i in range(out.size):
        out[i] /= total


@njit
def oldest(position, window, chunked):
    """The first position that a query sees."""
    if not window:
        return 0
    return position // window * window if chunked else max(0, position - window + 1)


@njit(
    "void(f4[:, :, ::1], UniTuple(f4[:, :, ::1], 2), UniTuple(f4[::1], 2), UniTuple(i8, 4), f4[:, :, ::1], i8, i8)",
    nogil=True,
    cache=True,
)
def attention(q, past, factors, seen, out, first, last):
    """Attention for (head, token) pairs first..last-1 of H*T: any share of them has early and late tokens.

    ``past`` is k [S, G, K] and v [S, G, at least V] of the positions from ``at`` on, ``factors`` are scale [T] and
    sinks [H] or [0], ``seen`` is (n_past, at, window, chunked); q [T, H, K] at positions n_past.., out [T, H, V].
    """
    (k, v), (scale, sinks), (n_past, at, window, chunked) = past, factors, seen
    tokens, per_group = q.shape[0], q.shape[1] // k.shape[1]
    scores = np.empty(k.shape[0], np.float32)
    for pair in range(first, last):
        t, h = pair % tokens, pair // tokens
        low, high, g = oldest(n_past + t, window, chunked) - at, n_past + t + 1 - at, h // per_group
        seen_scores = scores[: high - low]
        top, total = scores_of(q[t, h], k[low:high], g, scale[t], seen_scores), np.float32(0)
        if sinks.size:
            top = max(top, sinks[h])
            total = exponential(sinks[h] - top)
        to_shares(seen_scores, top)
        mix(seen_scores, total + sum_of(seen_scores), v[low:high], g, out[t, h])


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
