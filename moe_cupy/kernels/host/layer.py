"""The small kernels of a layer: norms, rotary positions, activations, weighted sum.

All arrays are float32 and C-contiguous unless said. A vector that may be missing comes as an empty one.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from moe_cupy.kernels.host.rounding import NOT_A_NUMBER, bits_of, float_of, nan_unless_finite

REASSOCIATE = {"reassoc", "contract", "nsz"}
ACTIVATIONS = {"silu": 0, "gelu": 1, "swiglu_oai": 2}
ROOT_TWO_OVER_PI = np.float32(math.sqrt(2 / math.pi))
ALPHA, LIMIT = np.float32(1.702), np.float32(7)  # of swiglu_oai


@njit(
    "void(f4[:, ::1], i8, f4[::1], f4[::1], f4, b1, f4[:, ::1])",
    nogil=True,
    cache=True,
    fastmath=REASSOCIATE,
    error_model="numpy",
)
def norm(x, width, weight, bias, epsilon, centred, y):
    """y = x / sqrt(mean(x^2) + epsilon) * weight + bias over the first ``width`` of each row, less its mean if centred.

    x, y [n, at least width]. In place is fine. A row whose squares are not finite becomes NaN.
    """
    for t in range(x.shape[0]):
        mean = np.float32(0)
        if centred:
            for i in range(width):
                mean += x[t, i]
            mean /= np.float32(width)
        total = np.float32(0)
        for i in range(width):
            total += (x[t, i] - mean) * (x[t, i] - mean)
        scale = np.float32(1) / np.sqrt(total / np.float32(width) + epsilon)
        scale = scale if total < np.float32(np.inf) else NOT_A_NUMBER
        if weight.size:
            for i in range(width):
                y[t, i] = (x[t, i] - mean) * scale * weight[i]
        else:
            for i in range(width):
                y[t, i] = (x[t, i] - mean) * scale
        for i in range(bias.size):
            y[t, i] += bias[i]


@njit("void(f4[:, :, ::1], f4[:, ::1], f4[:, ::1], b1, i8)", nogil=True, cache=True)
def rope(x, cos, sin, neox, first):
    """Rotate pairs of the features from ``first`` on in place; x [T, heads, K], cos and sin [T, n_rot/2]."""
    half = cos.shape[1]
    for t in range(x.shape[0]):
        for h in range(x.shape[1]):
            for i in range(half):
                a, b = (first + i, first + i + half) if neox else (first + 2 * i, first + 2 * i + 1)
                xa, xb, c, s = x[t, h, a], x[t, h, b], cos[t, i], sin[t, i]
                x[t, h, a] = xa * c - xb * s
                x[t, h, b] = xa * s + xb * c


@njit(inline="always")
def exponential(x):
    """exp of a float32 within 2 units of its last place, in steps that vector lanes can take, kept to -87..88.

    Of NaN it is NaN: both limits are compared such that it passes.

    Not for callers that let sums be reordered: adding and taking off 1.5 * 2^23 is what rounds.

    x = n ln 2 + r with a whole n and |r| <= ln 2 / 2, so exp(x) = 2^n exp(r): a polynomial (the coefficients are those
    of the series, the last ones fitted), and n put into the exponent of a float.
    """
    x = np.float32(-87) if x < np.float32(-87) else x
    x = np.float32(88) if x > np.float32(88) else x
    shifted = x * np.float32(1.44269504) + np.float32(12582912)  # the nearest whole number in its lowest bits
    n = shifted - np.float32(12582912)
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)  # ln 2 in two pieces, the first exact
    p = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    power = float_of((bits_of(shifted) + np.int32(127)) << np.int32(23))
    return (p * r * r + r + np.float32(1)) * power


@njit(inline="always")
def limited(x, low):
    """x from ``low`` to LIMIT; NaN where it is not finite."""
    x = nan_unless_finite(x)
    x = LIMIT if x > LIMIT else x
    return low if x < low else x


@njit(fastmath={"contract"}, error_model="numpy")
def activate_rows(kind, g, u):
    """g = act(g, u) in place, rows [F]."""
    one = np.float32(1)
    if kind == 0:
        for i in range(g.size):
            g[i] = g[i] / (one + exponential(-g[i])) * u[i]
    elif kind == 1:
        for i in range(g.size):
            inner = ROOT_TWO_OVER_PI * g[i] * (one + np.float32(0.044715) * g[i] * g[i])
            g[i] = g[i] / (one + exponential(np.float32(-2) * inner)) * u[i]  # (1 + tanh(x)) / 2 = 1 / (1 + exp(-2x))
    else:
        for i in range(g.size):
            a, b = limited(g[i], -np.float32(np.inf)), limited(u[i], -LIMIT)
            g[i] = a / (one + exponential(-ALPHA * a)) * (b + one)


@njit
def act(kind, g, u):
    """One element of a gated activation."""
    if kind == 0:
        return g / (np.float32(1) + np.float32(math.exp(-g))) * u
    if kind == 1:
        inner = ROOT_TWO_OVER_PI * g * (np.float32(1) + np.float32(0.044715) * g * g)
        return np.float32(0.5) * g * (np.float32(1) + np.float32(math.tanh(inner))) * u
    g, u = limited(g, -np.float32(np.inf)), limited(u, -LIMIT)
    return g / (np.float32(1) + np.float32(math.exp(-ALPHA * g))) * (u + np.float32(1))


@njit("void(i8, f4[:, ::1], f4[:, ::1])", nogil=True, cache=True)
def activate(kind, gate, up):
    """gate = act(gate, up) in place; both [n, F]."""
    for t in range(gate.shape[0]):
        for i in range(gate.shape[1]):
            gate[t, i] = act(kind, gate[t, i], up[t, i])


@njit("void(f4[:, ::1], f4[:, ::1])", nogil=True, cache=True)
def gate_by(x, gate):
    """x = x * sigmoid(gate) in place; x [n, width], gate [n, width] or, one number a row, [n, 1]."""
    many = gate.shape[1] > 1
    for t in range(x.shape[0]):
        for i in range(x.shape[1]):
            x[t, i] /= np.float32(1) + np.float32(math.exp(-nan_unless_finite(gate[t, i if many else 0])))


@njit("void(f4[:, :, ::1], f4[:, ::1], b1, f4[:, ::1])", nogil=True, cache=True)
def combine(parts, weights, add, x):
    """x (+)= sum over rank of weights * parts, in rank order; parts [T, k, D], weights [T, k] (or [T, 0]), x [T, D]."""
    total = np.empty(x.shape[1], np.float32)
    for t in range(x.shape[0]):
        total[:] = np.float32(0)
        for r in range(parts.shape[1]):
            weight = weights[t, r] if weights.shape[1] else np.float32(1)
            for i in range(total.size):
                total[i] += weight * parts[t, r, i]
        for i in range(total.size):
            x[t, i] = x[t, i] + total[i] if add else total[i]
