"""The gated delta net: a short convolution, two gates, and a matrix a head that every token fades and corrects."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from moe_cupy.kernels.host.rounding import nan_unless_finite

REASSOCIATE = {"reassoc", "contract", "nsz"}


@njit("void(f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[:, ::1])", nogil=True, cache=True)
def convolve(x, before, kernel, after, out):
    """out = silu of each channel's weighted sum of its last C inputs; ``after`` = the last C - 1 inputs.

    x and out [T, channels], before and after [C - 1, channels] (not the same memory), kernel [channels, C].
    """
    kept = before.shape[0]
    for t in range(x.shape[0]):
        for c in range(x.shape[1]):
            total = np.float32(0)
            for i in range(kept + 1):
                total += (before[t + i, c] if t + i < kept else x[t + i - kept, c]) * kernel[c, i]
            out[t, c] = total / (np.float32(1) + np.float32(math.exp(-total)))
    for i in range(kept):
        after[i] = before[len(x) + i] if len(x) + i < kept else x[len(x) + i - kept]


@njit("void(f4[:, ::1], f4[:, ::1], f4[::1], f4[::1], f4[:, ::1], f4[:, ::1])", nogil=True, cache=True)
def gates(alpha, beta, dt, a, fade, share):
    """fade = exp(softplus(alpha + dt) * a), share = sigmoid(beta); all [T, H], dt and a [H]."""
    for t in range(alpha.shape[0]):
        for h in range(alpha.shape[1]):
            x = nan_unless_finite(alpha[t, h] + dt[h])
            softplus = max(x, np.float32(0)) + np.float32(math.log1p(math.exp(-abs(x))))
            fade[t, h] = np.float32(math.exp(nan_unless_finite(softplus * a[h])))
            share[t, h] = np.float32(1) / (np.float32(1) + np.float32(math.exp(-nan_unless_finite(beta[t, h]))))


@njit(fastmath=REASSOCIATE)
def unit(x, epsilon, y):
    """y = x brought to length one."""
    total = np.float32(0)
    for i in range(x.size):
        total += x[i] * x[i]
    y[:] = x / np.sqrt(nan_unless_finite(total) + epsilon)


@njit(fastmath=REASSOCIATE)
def step(q, k, v, gate, matrix, answer, out):
    """One token of one head; q, k [K] of length one, v [V], gate (fade, share), matrix [K, V] in place."""
    fade, share = gate
    answer[:] = np.float32(0)
    for i in range(k.size):
        for j in range(v.size):
            matrix[i, j] *= fade
            answer[j] += k[i] * matrix[i, j]
    for j in range(v.size):
        answer[j] = (v[j] - answer[j]) * share
    out[:] = np.float32(0)
    for i in range(k.size):
        for j in range(v.size):
            matrix[i, j] += k[i] * answer[j]
            out[j] += q[i] * matrix[i, j]


@njit(
    "void(f4[:, ::1], UniTuple(f4[:, ::1], 2), Tuple((i8, b1, f4)), UniTuple(f4[:, :, ::1], 2), f4[:, :, ::1], i8, i8)",
    nogil=True,
    cache=True,
)
def recur(qkv, gate, rule, state, out, first, last):
    """The rule for value heads first..last-1, token by token.

    qkv [T, 2 * key_heads * S + H * S] side by side; ``gate`` is fade and share [T, H], ``rule`` (key_heads, tiled,
    epsilon), ``state`` before and after [H, S, S]; out [T, H, S]. Value head h has key head h % key_heads if tiled,
    else h // (H / key_heads).
    """
    (fade, share), (key_heads, tiled, epsilon), (before, after) = gate, rule, state
    heads, width = out.shape[1], out.shape[2]
    q, k, answer = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    scale = np.float32(1) / np.sqrt(np.float32(width))
    for h in range(first, last):
        at = width * (h % key_heads if tiled else h // (heads // key_heads))
        after[h] = before[h]
        for t in range(qkv.shape[0]):
            unit(qkv[t, at : at + width], epsilon, q)
            unit(qkv[t, key_heads * width + at : key_heads * width + at + width], epsilon, k)
            value = qkv[t, (2 * key_heads + h) * width : (2 * key_heads + h + 1) * width]
            step(q, k, value, (fade[t, h], share[t, h]), after[h], answer, out[t, h])
            for j in range(width):
                out[t, h, j] *= scale
