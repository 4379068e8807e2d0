"""Activations rounded for the matrices they meet, laid out as panels for ``simd/rows.py``; the rules are llama.cpp's.

The numbers are those of ``moe_ref.quants.activations``, to the bit. A panel is made of tiles of 8, 4, 2 or 1 vectors,
as many as the widest kernel takes first. Within a tile, what each vector has in a block lies side by side.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

PLAIN, HALF, BFLOAT, Q8_0, Q8_1, Q8_K, Q8_K_BY_HALVES, Q8_K_BY_FOURS = range(8)  # what vectors are rounded to
ONE_BYTE, ONE_SHORT, ONE_FLOAT = np.zeros(1, np.int8), np.zeros(1, np.int16), np.zeros(1, np.float32)  # for their types
KINDS = {"F32": PLAIN, "F16": HALF, "BF16": BFLOAT, "Q8_0": Q8_0, "Q8_1": Q8_1, "Q8_K": Q8_K}


def _reinterpret(source: types.Type, target: types.Type, made: ir.Type):
    @intrinsic
    def reinterpret(typingctx, x):
        return target(source), lambda context, builder, signature, args: builder.bitcast(args[0], made)

    return reinterpret


bits_of = _reinterpret(types.float32, types.int32, ir.IntType(32))
float_of = _reinterpret(types.int32, types.float32, ir.FloatType())


INFINITE = np.int32(0x7F800000)  # bits of infinity; those of NaN, without a sign, are above
NOT_A_NUMBER = np.float32(np.nan)


@njit(inline="always")
def nan_unless_finite(x):
    """x, or NaN where it is infinite, which a limit or a softmax could turn into an ordinary number."""
    return x + (x - x)


@njit(inline="always")
def to_half(x):
    """The nearest half-precision number, ties to even; too large becomes infinity, NaN stays NaN."""
    size = bits_of(x) & np.int32(0x7FFFFFFF)
    sign = bits_of(x) & np.int32(-0x80000000)
    kept = (size + np.int32(0xFFF) + ((size >> np.int32(13)) & np.int32(1))) & np.int32(-0x2000)
    small = bits_of(np.float32(float_of(size) + np.float32(0.75)) - np.float32(0.75))  # to a multiple of 2^-24
    kept = small if size < np.int32(0x38800000) else kept
    kept = INFINITE if np.int32(0x477FE000) < kept < INFINITE else kept
    kept = np.int32(0x7FC00000) if size > INFINITE else kept
    return float_of(sign | kept)


@njit(inline="always")
def to_bfloat(x):
    """The nearest number with the upper 16 bits of a float32 alone, ties to even; NaN stays NaN."""
    b = bits_of(x)
    near = (b + np.int32(0x7FFF) + ((b >> np.int32(16)) & np.int32(1))) & np.int32(-0x10000)
    return float_of(near if b & np.int32(0x7FFFFFFF) <= INFINITE else np.int32(0x7FC00000))


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


@njit(inline="always")
def sums_in_block(kind):
    """Sums that come with 256 values."""
    return 32 if kind == Q8_K_BY_FOURS else 16


@njit
def block_q8_k(x, values, sums):
    """One block of 256, whose largest magnitude becomes -127 steps; returns the step, NaN unless all are finite."""
    most, extreme = largest(x), np.float32(0)
    if bits_of(most) >= INFINITE:
        values[:], sums[:] = 0, 0
        return NOT_A_NUMBER
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


@njit(inline="always")
def lane_sums(values, at, sums, to):
    """-16 times the sums of what a lane meets of 32 values, 16 from ``at`` on and 16 that are 64 bytes on.

    That is what an offset of 16 in unsigned codes adds to their products.
    """
    for lane in range(4):
        total = np.int32(0)
        for i in range(at + 4 * lane, at + 4 * lane + 4):
            total += np.int32(values[i]) + np.int32(values[64 + i])
        sums[to + lane] = -16 * total


@njit
def by_fours(values, out, lanes):
    """A block of 256 in the order of ``simd/iq4_xs.py``, and the sums of what a lane meets."""
    for part in range(8):
        at = 128 * (part // 4) + 16 * (part % 4)
        for i in range(16):
            out[at + i], out[at + 64 + i] = values[32 * part + i], values[32 * part + 16 + i]
        lane_sums(out, at, lanes, 4 * part)


@njit
def round_q8_k(x, cols, order, most, kind, panel):
    """Blocks of 256, in their own order, ``by_halves`` or ``by_fours``, into values, steps and sums."""
    values, steps, sums = panel
    block, block_sums = np.empty(256, np.int8), np.empty(16, np.int16)
    blocks, size, t = cols // 256, sums_in_block(kind), 0
    while t < order.size:
        columns = width(order.size - t, most)
        for c in range(columns):
            row = x[order[t + c]]
            for b in range(blocks):
                at = t * blocks + b * columns + c
                part = row[256 * b : 256 * (b + 1)]
                own, own_sums = values[256 * at : 256 * (at + 1)], sums[size * at : size * (at + 1)]
                if kind == Q8_K:
                    steps[at] = block_q8_k(part, own, own_sums)
                    continue
                steps[at] = block_q8_k(part, block, block_sums)
                if kind == Q8_K_BY_HALVES:
                    by_halves(block, block_sums, own, own_sums)
                else:
                    by_fours(block, own, own_sums)
        t += columns


@njit(inline="always")
def block_q8_0(x, first, values, at):
    """32 of x as 16 values from ``at`` on and 16 that are 64 bytes on; returns their step and the sum of them times it.

    The step is NaN where one of them is not finite, or all are too large for a step in half precision.

    Loops of a length that is known are what the compiler makes vectors of.
    """
    most, total = np.int32(0), np.int32(0)
    for i in range(32):
        most = max(most, bits_of(x[first + i]) & np.int32(0x7FFFFFFF))
    top = float_of(most)
    step, factor = top / np.float32(127), np.float32(0) if top == 0 else np.float32(127) / top
    for half in range(2):
        for i in range(16):
            value = bits_of(x[first + 16 * half + i] * factor + np.float32(12582912)) - np.int32(0x4B400000)
            values[at + 64 * half + i] = np.int8(value)
            total += value
    return nan_unless_finite(to_half(step)), to_half(step * np.float32(total))


@njit
def round_q8_0(x, cols, order, most, panel):
    """Blocks of 32, four by four as in ``simd/blocks.py``, into values, steps, sums (Q8_1's) or lanes' sums.

    A row's last four are filled up with zeros.
    """
    values, steps, sums, lanes = panel
    fours, t = (cols + 127) // 128, 0
    while t < order.size:
        columns = width(order.size - t, most)
        for c in range(columns):
            row = x[order[t + c]]
            for b in range(4 * fours):
                at = t * fours + b // 4 * columns + c
                place, at = 4 * at + b % 4, 128 * at + 16 * (b % 4)
                step = total = np.float32(0)
                if 32 * b < cols:
                    step, total = block_q8_0(row, 32 * b, values, at)
                else:
                    values[at : at + 16], values[at + 64 : at + 80] = 0, 0
                steps[place] = step
                if sums.size:
                    sums[place] = total
                else:
                    lane_sums(values, at, lanes, 4 * place)
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
    if kind >= Q8_K:
        b = at * cols // 256
        own = codes[256 * b :], steps[b:], groups[sums_in_block(kind) * b :]
        round_q8_k(x, cols, order, most, kind, own)
    elif kind in (Q8_0, Q8_1):
        b, nothing = at * ((cols + 127) // 128), sums[:0]
        own = sums[4 * b :] if kind == Q8_1 else nothing
        round_q8_0(x, cols, order, most, (codes[128 * b :], steps[4 * b :], own, groups[16 * b :]))
    else:
        round_floats(x, cols, order, most, kind, values[at * cols :])


@njit
def lined_up(count, of):
    """Memory for numbers of the type of ``of`` that begins a cache line: a load of 64 bytes takes one line, not two."""
    memory = np.empty(count + 64 // of.itemsize, of.dtype)
    first = (-memory.ctypes.data & 63) // of.itemsize
    return memory[first : first + count]


@njit
def new_panel(kind, tokens, cols):
    """Memory for ``tokens`` vectors rounded to ``kind``."""
    whole, blocks, sums, lanes = 0, 0, 0, 0
    if kind in (Q8_0, Q8_1):
        fours = tokens * ((cols + 127) // 128)
        whole, blocks, sums = 128 * fours, 4 * fours, 4 * fours if kind == Q8_1 else 0
        lanes = 16 * fours if kind == Q8_0 else 0
    elif kind >= Q8_K:
        whole, blocks = tokens * cols, tokens * cols // 256
        lanes = sums_in_block(kind) * blocks
    return (
        lined_up(whole, ONE_BYTE), lined_up(0 if whole else tokens * cols, ONE_FLOAT), lined_up(blocks, ONE_FLOAT),
        lined_up(sums, ONE_FLOAT), lined_up(lanes, ONE_SHORT),
    )  # fmt: skip
