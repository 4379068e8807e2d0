"""Launches of one token as rows of whole numbers, done in one call: no interpreter stands between two of them.

A step is a row int64 [STEP]: which op it is, then addresses and sizes (floats by their bits), as the names below say.
A vector that is missing has length 0. What comes with each token is its position alone. ``bound.py`` writes the steps;
the arithmetic is that of the ops' own kernels.
"""

from __future__ import annotations

import numpy as np
from numba import carray, cfunc, njit

from moe_cupy.kernels.host import attention as attending
from moe_cupy.kernels.host import jobs as j
from moe_cupy.kernels.host import layer, routing
from moe_cupy.kernels.host import pieces as p
from moe_cupy.kernels.host.products import give
from moe_cupy.kernels.host.rounding import float_of, nan_unless_finite, new_panel, round_rows, to_half

STEP = 18
MULTIPLY, ADD, NORM, ROPE, STORE, ATTEND, ROUTE, COMBINE, ADJUST, ACTIVATE, GATE = range(11)
OP, X, OUT, N = range(4)  # N: numbers in a vector
JOBS, RESULTS = range(4, 6)  # of N jobs, whose vector X has WIDTH numbers
WIDTH = 6
FACTOR = 4  # of ADD and ADJUST, as bits
BIAS, BIASES = 7, 8  # where and how many, 0: none
ROWS, WEIGHT, WEIGHTS, EPSILON, CENTRED = 4, 9, 10, 11, 12  # of NORM: rows of N numbers
COS, SIN, HALF, NEOX, FIRST = range(8, 13)  # of ROPE: ROWS heads of N
HALVES = 4  # of STORE: whether in half precision
KEYS, VALUES, GROUPS, KEY, VALUE, KEPT, SCALE, SINKS, SINK, WINDOW, CHUNKED, KEY_TYPE, VALUE_TYPE = range(4, 17)
GATING, BY_LOGIT, OF, USED, RENORMALISE = 9, 10, 11, 12, 13  # of ROUTE: N experts, groups USED of OF
CHOSEN, CHOICE, BY = 14, 15, 4  # ids [CHOSEN] at CHOICE, weights scaled BY (bits)
ADDS, SHARES = 5, 7  # of COMBINE: CHOSEN rows of N
KIND, WIDE = 4, 5  # of ACTIVATE: which; of GATE: how many numbers a row of the gate has
ATTENTION_WORK = 1 << 17  # multiply-adds in a piece of attention: about 10 us


@njit
def floats(address, count):
    """float32 [count] at an address."""
    return carray(p.floats_at(address), count)


@njit
def table(address, rows, cols):
    """float32 [rows, cols] at an address."""
    return carray(p.floats_at(address), (rows, cols))


@njit
def as_float(bits):
    return float_of(np.int32(bits))


@njit
def multiply(state, s):
    """Jobs of matrices that round alike, all times one vector; products go to their addresses RESULTS.

    One vector is rounded sooner by the caller than by anybody who has to be told.
    """
    jobs, x = carray(p.whole_at(s[JOBS]), (s[N], j.JOB)), table(s[X], 1, s[WIDTH])
    kind, cols = jobs[0, j.ROUNDING], jobs[0, j.COLS]
    panel = new_panel(kind, 1, cols)
    round_rows(kind, x, cols, np.zeros(1, np.int64), 1, panel, 0)
    for i in range(len(jobs)):
        give(jobs[i], panel, 0, s[RESULTS] + 8 * i, 1)
    j.run(state, jobs, panel)


@njit
def add(s):
    """OUT += FACTOR * X."""
    x, out, factor = floats(s[X], s[N]), floats(s[OUT], s[N]), as_float(s[FACTOR])
    for i in range(x.size):
        out[i] += factor * x[i]


@njit
def adjust(s):
    """X = FACTOR * X + bias."""
    x, bias, factor = floats(s[X], s[N]), floats(s[BIAS], s[BIASES]), as_float(s[FACTOR])
    for i in range(x.size):
        x[i] *= factor
    for i in range(bias.size):
        x[i] += bias[i]


@njit
def norm(s):
    x, out = table(s[X], s[ROWS], s[N]), table(s[OUT], s[ROWS], s[N])
    weight, bias = floats(s[WEIGHT], s[WEIGHTS]), floats(s[BIAS], s[BIASES])
    layer.norm(x, s[WIDTH], weight, bias, as_float(s[EPSILON]), s[CENTRED] != 0, out)


@njit
def rope(s):
    x = carray(p.floats_at(s[X]), (1, s[ROWS], s[N]))
    layer.rope(x, table(s[COS], 1, s[HALF]), table(s[SIN], 1, s[HALF]), s[NEOX] != 0, s[FIRST])


@njit
def store(s, position):
    new = floats(s[X], s[N])
    if s[HALVES]:
        kept = carray(p.shorts_at(s[OUT] + 2 * position * s[N]), s[N])
        for i in range(new.size):
            kept[i] = attending.half_bits(nan_unless_finite(to_half(new[i])))
    else:
        kept = floats(s[OUT] + 4 * position * s[N], s[N])
        for i in range(new.size):
            kept[i] = nan_unless_finite(new[i])


@njit
def attend_heads(s, position, first, last):
    """Heads first..last-1 of ATTEND."""
    kept = (s[KEYS], s[KEY_TYPE], s[GROUPS], s[KEY]), (s[VALUES], s[VALUE_TYPE], s[GROUPS], s[KEPT])
    q = carray(p.floats_at(s[X]), (1, s[N], s[KEY]))
    out = carray(p.floats_at(s[OUT]), (1, s[N], s[VALUE]))
    factors, seen = (floats(s[SCALE], 1), floats(s[SINKS], s[SINK])), (position, s[WINDOW], s[CHUNKED])
    attending.attention(q, kept, factors, seen, out, first, last)


@cfunc("void(i8, i8, i8)", cache=True)
def attend_piece(job, first, last):
    """A piece of ATTEND: the job has the step's address at W and the position at STEPS."""
    attend_heads(carray(p.whole_at(p.number_of(job, j.W)), STEP), p.number_of(job, j.STEPS), first, last)


@njit
def attend(state, s, position):
    """All heads, shared by threads where there are many positions."""
    work = 2 * s[KEY] * (position + 1 - attending.oldest(position, s[WINDOW], s[CHUNKED]))  # of a head
    job = np.zeros((1, j.JOB), np.int64)
    job[0, j.FUNCTION], job[0, j.W], job[0, j.STEPS] = state[j.ATTEND], s.ctypes.data, position
    per_group, threads = s[N] // s[GROUPS], state[j.HELPERS] + 1
    unit = per_group if s[GROUPS] >= threads else 1  # heads that stay together
    share = (s[N] // unit + threads - 1) // threads * unit
    job[0, j.ROWS], job[0, j.PIECE_ROWS] = s[N], max(share, ATTENTION_WORK // work)
    j.run(state, job, s)


@njit
def route(s):
    rule = (s[GATING], s[BY_LOGIT], s[OF], s[USED], s[RENORMALISE])
    ids = carray(p.integers_at(s[CHOICE]), (1, s[CHOSEN]))
    weights, bias = table(s[OUT], 1, s[CHOSEN]), floats(s[BIAS], s[BIASES])
    routing.route(table(s[X], 1, s[N]), bias, rule, as_float(s[BY]), ids, weights)


@njit
def combine(s):
    parts = carray(p.floats_at(s[X]), (1, s[CHOSEN], s[N]))
    weights = table(s[SHARES], 1, s[CHOSEN] if s[SHARES] else 0)
    layer.combine(parts, weights, s[ADDS] != 0, table(s[OUT], 1, s[N]))


@njit
def activate(s):
    layer.activate(s[KIND], table(s[X], 1, s[N]), table(s[OUT], 1, s[N]))


@njit
def gate(s):
    layer.gate_by(table(s[X], 1, s[N]), table(s[OUT], 1, s[WIDE]))


@njit
def do_steps(state, steps, position):
    """All steps [n, STEP] in order, for the token at ``position``."""
    for i in range(len(steps)):
        s = steps[i]
        op = s[OP]
        if op == MULTIPLY:
            multiply(state, s)
        elif op == NORM:
            norm(s)
        elif op == ROPE:
            rope(s)
        elif op == STORE:
            store(s, position)
        elif op == ATTEND:
            attend(state, s, position)
        elif op == ROUTE:
            route(s)
        elif op == ADD:
            add(s)
        elif op == ADJUST:
            adjust(s)
        elif op == COMBINE:
            combine(s)
        elif op == ACTIVATE:
            activate(s)
        elif op == GATE:
            gate(s)


@njit("void(i8[::1], i8[:, ::1], i8)", nogil=True, cache=True)
def run_steps(state, steps, position):
    """``do_steps``; then helpers may sleep."""
    do_steps(state, steps, position)
    j.atomic_store(state, j.MORE, 0)


def new_state(helpers: int, most: int) -> np.ndarray:
    """``pieces.new_state`` with attention among the functions that jobs may name."""
    state = p.new_state(helpers, most)
    state[j.ATTEND] = attend_piece.address
    return state
