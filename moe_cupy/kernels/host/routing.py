"""The router: scores, selection with bias and groups, weights. Ties go to the lower id."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from moe_cupy.kernels.host.rounding import NOT_A_NUMBER

SMALLEST_SUM = np.float32(6.103515625e-5)  # llama.cpp's floor for a sum of router weights
GATINGS = {"softmax": 0, "sigmoid": 1, "softmax over the selected": 2}


@njit
def best_left(p, taken):
    """Index of the largest p not taken, ties to the lower; NaN never beats a number but leaves the index legal."""
    best = -1
    for e in range(p.size):
        if not taken[e] and (best < 0 or p[e] > p[best]):
            best = e
    return best


@njit
def softmax(x):
    """x [n] in place."""
    top = np.max(x)
    for e in range(x.size):
        x[e] = np.float32(math.exp(x[e] - top))
    x /= np.sum(x)


@njit
def score(gating, logits, p):
    """p [E] = the gate of logits [E]."""
    p[:] = logits
    if gating == 0:
        softmax(p)
    elif gating == 1:
        for e in range(p.size):
            p[e] = np.float32(1) / (np.float32(1) + np.float32(math.exp(-p[e])))


@njit
def two_best(p):
    """The sum of the two largest of p."""
    first = second = np.float32(-np.inf)
    for value in p:
        if value > first:
            first, second = value, first
        elif value > second:
            second = value
    return first + second


@njit
def mask_groups(choice, groups, used):
    """-inf in choice [E] outside the ``used`` groups whose two best sum to most."""
    size = choice.size // groups
    sums, kept = np.empty(groups, np.float32), np.zeros(groups, np.bool_)
    for g in range(groups):
        sums[g] = two_best(choice[g * size : (g + 1) * size])
    for _ in range(used):
        kept[best_left(sums, kept)] = True
    for g in range(groups):
        if not kept[g]:
            choice[g * size : (g + 1) * size] = -np.inf


@njit
def all_finite(x):
    """Whether no number of x [n] is NaN or infinite."""
    zero = np.float32(0)
    for value in x:
        zero += value - value
    return zero == np.float32(0)


@njit(
    "void(f4[:, ::1], f4[::1], UniTuple(i8, 5), f4, i4[:, ::1], f4[:, ::1])",
    nogil=True,
    cache=True,
    error_model="numpy",
)
def route(logits, bias, rule, scale, ids, weights):
    """logits [T, E], bias [E] or [0] (for selection alone) -> ids, weights [T, k], best first.

    ``rule`` is (gating, by_logit, groups, groups_used, renormalise). The weights of a token are NaN where a logit or
    the bias is not finite, of which the choice may show nothing.
    """
    gating, by_logit, groups, groups_used, renormalise = rule
    p, choice = np.empty(logits.shape[1], np.float32), np.empty(logits.shape[1], np.float32)
    for t in range(logits.shape[0]):
        score(gating, logits[t], p)
        choice[:] = logits[t] if by_logit else p
        if bias.size:
            choice += bias
        if groups > 1:
            mask_groups(choice, groups, groups_used)
        taken = np.zeros(p.size, np.bool_)
        for r in range(ids.shape[1]):
            best = best_left(choice, taken)
            taken[best] = True
            ids[t, r], weights[t, r] = best, p[best]
        if gating == 2:
            softmax(weights[t])
        total = np.float32(0)
        for r in range(ids.shape[1]):
            total += weights[t, r]
        divisor = max(total, SMALLEST_SUM) if renormalise else np.float32(1)
        if not (all_finite(logits[t]) and all_finite(bias)):
            divisor = NOT_A_NUMBER
        for r in range(ids.shape[1]):
            weights[t, r] = weights[t, r] / divisor * scale
