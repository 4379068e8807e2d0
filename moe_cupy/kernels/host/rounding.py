"""Activations rounded for the matrices they meet, laid out as panels for ``simd/rows.py``; the rules are llama.cpp's.

The numbers are those of ``moe_ref.quants.activations``, to the bit. A panel is made of tiles of 8, 4, 2 or 1 vectors,
as many as the widest kernel takes first. Within a tile, what each vector has in a block lies side by side.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

PLAIN, HALF, BFLOAT, Q8_0, Q8_K, Q8_K_BY_HALVES = range(6)  # what vectors are rounded to
KINDS = {"F32": PLAIN, "F16": HALF, "BF16": BFLOAT, "Q8_0": Q8_0, "Q8_1": Q8_0, "Q8_K": Q8_K}


def _reinterpret(source: types.Type, target: types.Type, made: ir.Type):
    @intrinsic
    def reinterpret(typingctx, x):
        return target(source), lambda context, builder, signature, args: builder.bitcast(args[0], made)

    return reinterpret


bits_of = _reinterpret(types.float32, types.int32, ir.IntType(32))
float_of = _reinterpret(types.int32, types.float32, ir.FloatType())


@njit(inline="always")
def to_half(x):
    """The nearest half-precision number, ties to even; too large becomes infinity."""
    size = bits_of(x) & np.int32(0x7FFFFFFF)
    sign = bits_of(x) & np.int32(-0x80000000)
    kept = (size + np.int32(0xFFF) + ((size >> np.int32(13)) & np.int32(1))) & np.int32(-0x2000)
    small = bits_of(np.float32(float_of(size) + np.float32(0.75)) - np.float32(0.75))  # to a multiple of 2^-24
    kept = small if size < np.int32(0x38800000) else kept
    kept = np.int32(0x7F800000) if np.int32(0x477FE000) < kept < np.int32(0x7F800000) else kept
    return float_of(sign | kept)


@njit(inline="always")
def to_bfloat(x):
    """The nearest number with the upper 16 bits of a float32 alone, ties to even."""
    b = bits_of(x)
    return float_of((b + np.int32(0x7FFF) + ((b >> np.int32(16)) & np.int32(1))) & np.int32(-0x10000))


@njit(inline="always")
def width(left, most):
    """Vectors in the next tile, of ``left``."""
    while most > left:
        most >>= 1
    return most


@njit(inline="always")
def largest(x):
    """The greatest magnitude in x, compared as whole numbers (floats without a sign are ordered like their bits)."""
    most = np.int32(0)
    for i in range(x.size):
        most = max(most, bits_of(x[i]) & np.int32(0x7FFFFFFF))
    return float_of(most)


@njit(inline="always")
def round_all(x, factor, out):
    """out = the nearest whole numbers to x * factor; adding 1.5 * 2^23 leaves no room for a fraction."""
    for i in range(x.size):
        out[i] = np.int8(bits_of(x[i] * factor + np.float32(12582912)))


@njit
def block_q8_k(x, values, sums):
    """One block of 256, whose largest magnitude becomes -127 steps; returns the step."""
    most, extreme = largest(x), np.float32(0)
    for i in range(x.size):
        if abs(x[i]) == most:
            extreme = x[i]
            break
    if extreme == np.float32(0):
        values[:], sums[:] = 0, 0
        return np.float32(0)
    factor = np.float32(-127) / extreme
    round_all(x, factor, values)
    for g in range(16):
        total = np.int16(0)
        for i in range(16):
            total += np.int16(values[16 * g + i])
        sums[g] = total
    return np.float32(1) / factor


@njit
def by_halves(values, sums, out, out_sums):
    """A block of 256 in the order of ``simd/nibbles.py``, and the sums of its 32s, each before a zero."""
    for i in range(4):
        for odd in range(2):
            g = 2 * i + odd
            for half in range(2):
                for j in range(16):
                    out[128 * odd + 64 * half + 16 * i + j] = values[32 * g + 16 * half + j]
            out_sums[2 * g], out_sums[2 * g + 1] = sums[2 * g] + sums[2 * g + 1], 0


@njit
def round_q8_k(x, cols, order, most, halves, panel):
    """Blocks of 256, in their own order or ``by_halves``, into values, steps and sums."""
    values, steps, sums = panel
    block, block_sums = np.empty(256, np.int8), np.empty(16, np.int16)
    blocks, t = cols // 256, 0
    while t < order.size:
        columns = width(order.size - t, most)
        for c in range(columns):
            row = x[order[t + c]]
            for b in range(blocks):
                at = t * blocks + b * columns + c
                part = row[256 * b : 256 * (b + 1)]
                own, own_sums = values[256 * at : 256 * (at + 1)], sums[16 * at : 16 * (at + 1)]
                if halves:
                    steps[at] = block_q8_k(part, block, block_sums)
                    by_halves(block, block_sums, own, own_sums)
                else:
                    steps[at] = block_q8_k(part, own, own_sums)
        t += columns


@njit
def round_q8_0(x, cols, order, most, values, steps, sums):
    """Blocks of 32; ``sums`` are Q8_1's, of the values times the step."""
    blocks, t = cols // 32, 0
    while t < order.size:
        columns = width(order.size - t, most)
        for c in range(columns):
            row = x[order[t + c]]
            for b in range(blocks):
                at, part = t * blocks + b * columns + c, row[32 * b : 32 * (b + 1)]
                top = largest(part)
                step, factor = top / np.float32(127), np.float32(0) if top == 0 else np.float32(127) / top
                codes = values[32 * at : 32 * (at + 1)]
                round_all(part, factor, codes)
                total = np.int32(0)
                for i in range(32):
                    total += np.int32(codes[i])
                steps[at], sums[at] = to_half(step), to_half(step * np.float32(total))
        t += columns


@njit
def round_floats(x, cols, order, most, kind, values):
    """Pieces of 32, rounded to HALF, BFLOAT or not at all."""
    blocks, t = cols // 32, 0
    while t < order.size:
        columns = width(order.size - t, most)
        for c in range(columns):
            row = x[order[t + c]]
            for b in range(blocks):
                at = 32 * (t * blocks + b * columns + c)
                for i in range(32):
                    v = row[32 * b + i]
                    values[at + i] = to_half(v) if kind == HALF else to_bfloat(v) if kind == BFLOAT else v
        t += columns


@njit
def round_rows(kind, x, cols, order, most, panel, at):
    """The first ``cols`` of rows ``order`` of x, in tiles of at most ``most``, into ``panel`` from vector ``at`` on.

    ``panel`` is codes int8, values float32, steps float32, sums float32 and group sums int16; a kind uses some of them.
    """
    codes, values, steps, sums, groups = panel
    if kind in (Q8_K, Q8_K_BY_HALVES):
        b = at * cols // 256
        round_q8_k(x, cols, order, most, kind != Q8_K, (codes[at * cols :], steps[b:], groups[16 * b :]))
    elif kind == Q8_0:
        b = at * cols // 32
        round_q8_0(x, cols, order, most, codes[at * cols :], steps[b:], sums[b:])
    else:
        round_floats(x, cols, order, most, kind, values[at * cols :])


@njit
def new_panel(kind, tokens, cols):
    """Memory for ``tokens`` vectors rounded to ``kind``."""
    whole = tokens * cols if kind in (Q8_0, Q8_K, Q8_K_BY_HALVES) else 0
    blocks = whole // 32 if kind == Q8_0 else whole // 256
    return (
        np.empty(whole, np.int8), np.empty(tokens * cols - whole, np.float32), np.empty(blocks, np.float32),
        np.empty(blocks if kind == Q8_0 else 0, np.float32), np.empty(0 if kind == Q8_0 else 16 * blocks, np.int16),
    )  # fmt: skip
