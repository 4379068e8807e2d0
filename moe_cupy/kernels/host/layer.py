"""The small kernels of a layer: norms, rotary positions, attention, router, activation, weighted sum.

All arrays are float32 and C-contiguous unless said; loops run over ``first``..``last`` of the outermost
index, so that a caller may split them over threads.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

REASSOCIATE = {"reassoc", "contract", "nsz"}
SMALLEST_SUM = np.float32(6.103515625e-5)  # llama.cpp's floor for a sum of router weights


@njit("void(f4[:, ::1], f4[::1], f4, f4[:, ::1])", nogil=True, cache=True, fastmath=REASSOCIATE)
def rms_norm(x, weight, epsilon, y):
    """y = x / sqrt(mean(x^2) + epsilon) * weight per row; x, y [n, width]. In place is fine."""
    width = x.shape[1]
    for t in range(x.shape[0]):
        total = np.float32(0)
        for i in range(width):
            total += x[t, i] * x[t, i]
        scale = np.float32(1) / np.sqrt(total / np.float32(width) + epsilon)
        for i in range(width):
            y[t, i] = x[t, i] * scale * weight[i]


@njit("void(f4[:, :, ::1], f4[:, ::1], f4[:, ::1], b1)", nogil=True, cache=True)
def rope(x, cos, sin, neox):
    """Rotate pairs of the first 2 * cos.shape[1] features in place; x [T, heads, K], cos and sin [T, n_rot/2]."""
    half = cos.shape[1]
    for t in range(x.shape[0]):
        for h in range(x.shape[1]):
            for i in range(half):
                a, b = (i, i + half) if neox else (2 * i, 2 * i + 1)
                xa, xb, c, s = x[t, h, a], x[t, h, b], cos[t, i], sin[t, i]
                x[t, h, a] = xa * c - xb * s
                x[t, h, b] = xa * s + xb * c


@njit(fastmath=REASSOCIATE)
def scores_of(q, k, scale, n, scores):
    """scores[s] = scale * q.k[s] for s < n; returns the largest. q [K], k [S, K] strided."""
    top = np.float32(-np.inf)
    for s in range(n):
        total = np.float32(0)
        for i in range(q.size):
            total += q[i] * k[s, i]
        scores[s] = total * scale
        top = max(top, scores[s])
    return top


@njit(fastmath=REASSOCIATE)
def mix(scores, top, v, n, out):
    """out = softmax(scores[:n]) @ v[:n]; v [S, V] strided."""
    out[:] = np.float32(0)
    total = np.float32(0)
    for s in range(n):
        p = np.float32(math.exp(scores[s] - top))
        total += p
        for i in range(out.size):
            out[i] += p * v[s, i]
    for i in range(out.size):
        out[i] /= total


@njit(
    "void(f4[:, :, ::1], f4[:, :, ::1], f4[:, :, ::1], f4, f4[:, :, ::1], i8, i8)",
    nogil=True,
    cache=True,
)
def attention(q, k, v, scale, out, first, last):
    """Causal grouped-query attention for (token, head) pairs first..last-1 of T*H.

    q [T, H, K] of the last T of S positions, k [S, G, K], v [S, G, V], out [T, H, V].
    """
    heads, n_past = q.shape[1], k.shape[0] - q.shape[0]
    per_group = heads // k.shape[1]
    scores = np.empty(k.shape[0], np.float32)
    for pair in range(first, last):
        t, h = pair // heads, pair % heads
        n, g = n_past + t + 1, h // per_group
        top = scores_of(q[t, h], k[:, g], scale, n, scores)
        mix(scores, top, v[:, g], n, out[t, h])


@njit
def best_left(p, taken):
    """Index of the largest p not taken, ties to the lower; NaN never beats a number but leaves the index legal."""
    best = -1
    for e in range(p.size):
        if not taken[e] and (best < 0 or p[e] > p[best]):
            best = e
    return best


@njit("void(f4[:, ::1], f4, b1, i8[:, ::1], f4[:, ::1])", nogil=True, cache=True)
def route_softmax(logits, scale, renormalise, ids, weights):
    """Softmax, top-k (ties to the lower id), renormalise, scale; logits [T, E] -> ids, weights [T, k]."""
    p = np.empty(logits.shape[1], np.float32)
    for t in range(logits.shape[0]):
        top = np.max(logits[t])
        for e in range(p.size):
            p[e] = np.float32(math.exp(logits[t, e] - top))
        p /= np.sum(p)
        taken = np.zeros(p.size, np.bool_)
        total = np.float32(0)
        for r in range(ids.shape[1]):
            best = best_left(p, taken)
            taken[best] = True
            ids[t, r], weights[t, r] = best, p[best]
            total += p[best]
        divisor = max(total, SMALLEST_SUM) if renormalise else np.float32(1)
        for r in range(ids.shape[1]):
            weights[t, r] = weights[t, r] / divisor * scale


@njit("void(f4[:, ::1], f4[:, ::1])", nogil=True, cache=True)
def swiglu(gate, up):
    """gate = silu(gate) * up in place; both [n, F]."""
    for t in range(gate.shape[0]):
        for i in range(gate.shape[1]):
            g = gate[t, i]
            gate[t, i] = g / (np.float32(1) + np.float32(math.exp(-g))) * up[t, i]


@njit("void(f4[:, :, ::1], f4[:, ::1], f4[:, ::1])", nogil=True, cache=True)
def combine(parts, weights, x):
    """x += sum over rank of weights * parts, in rank order; parts [T, k, D], weights [T, k], x [T, D]."""
    for t in range(x.shape[0]):
        for i in range(x.shape[1]):
            total = np.float32(0)
            for r in range(weights.shape[1]):
                total += weights[t, r] * parts[t, r, i]
            x[t, i] += total
