"""Rows of plain, legacy and K formats as float32; the byte layouts are drawn in ``moe_ref.quants``.

Each takes the row's bytes and where it begins, and fills ``out`` float32 [cols].
"""

from __future__ import annotations

import numpy as np
from numba import njit

from moe_cupy.kernels.host.loads import (
    float_from_bits,
    half,
    lanes,
    load_f32,
    load_i8,
    load_u8,
    load_u16,
    load_u32,
    put,
)
from moe_ref.quants import BY_NAME
from moe_ref.quants.fp4 import E2M1_DOUBLED
from moe_ref.quants.iq4 import VALUES

F32, F16, Q4_1, Q5_0, IQ4_NL = (BY_NAME[name].id for name in ("F32", "F16", "Q4_1", "Q5_0", "IQ4_NL"))
IQ4_VALUES, FP4_VALUES = VALUES.astype(np.float32), E2M1_DOUBLED.astype(np.float32)


@njit
def decode_plain(kind, data, p, out):
    """F32, F16 and BF16 rows."""
    if kind == F32:
        for i in range(out.size):
            out[i] = load_f32(data, p + 4 * i)
    elif kind == F16:
        for i in range(out.size):
            out[i] = half(data, p + 2 * i)
    else:
        for i in range(out.size):
            out[i] = float_from_bits(np.uint32(np.uint32(load_u16(data, p + 2 * i)) << np.uint32(16)))


@njit
def decode_q8_0(data, p, out):
    """Blocks of 32: half scale, 32 signed bytes."""
    for b in range(out.size // 32):
        d = half(data, p)
        for i in range(lanes(32, out)):
            put(out, 32 * b + i, d * np.float32(load_i8(data, p + 2 + i)))
        p += 34


@njit
def decode_q4_0(data, p, out):
    """Blocks of 32: half scale, 16 bytes of nibbles."""
    for b in range(out.size // 32):
        d = half(data, p)
        for i in range(lanes(16, out)):
            q = np.int32(load_u8(data, p + 2 + i))
            put(out, 32 * b + i, d * np.float32((q & np.int32(15)) - np.int32(8)))
            put(out, 32 * b + 16 + i, d * np.float32((q >> np.int32(4)) - np.int32(8)))
        p += 18


@njit
def decode_legacy(kind, data, p, out):
    """Q4_1, Q5_0, Q5_1: blocks of 32; half scale, half minimum or zero at 16, 4 bytes of fifth bits, nibbles."""
    zero = np.int32(16 if kind == Q5_0 else 0)
    for b in range(out.size // 32):
        d, base, fifth = half(data, p), np.float32(-0.0), np.uint32(0)
        p += 2
        if kind != Q5_0:
            base, p = half(data, p), p + 2
        if kind != Q4_1:
            fifth, p = load_u32(data, p), p + 4
        for i in range(lanes(16, out)):
            q, j = np.int32(load_u8(data, p + i)), np.uint32(i)
            low = (q & np.int32(15)) | np.int32(((fifth >> j) & np.uint32(1)) << np.uint32(4))
            high = (q >> np.int32(4)) | np.int32(((fifth >> (j + np.uint32(16))) & np.uint32(1)) << np.uint32(4))
            put(out, 32 * b + i, d * np.float32(low - zero) + base)
            put(out, 32 * b + 16 + i, d * np.float32(high - zero) + base)
        p += 16


@njit(inline="always")
def look_up(table, step, data, p, out, first):
    """32 elements from ``first``: step times the table's entries at 16 bytes of nibbles."""
    for i in range(lanes(16, out)):
        q = np.int32(load_u8(data, p + i))
        put(out, first + i, step * table[q & np.int32(15)])
        put(out, first + 16 + i, step * table[q >> np.int32(4)])


@njit
def decode_table(kind, data, p, out):
    """IQ4_NL, MXFP4: blocks of 32; a scale, half or power of two, and nibbles that index 16 values."""
    for b in range(out.size // 32):
        if kind == IQ4_NL:
            look_up(IQ4_VALUES, half(data, p), data, p + 2, out, 32 * b)
            p += 18
        else:
            e = np.uint32(data[p])  # half of 2^(e - 127); below e = 2 not a normal float
            bits = (e - np.uint32(1)) << np.uint32(23) if e > 1 else np.uint32(0x200000) << e
            look_up(FP4_VALUES, float_from_bits(np.uint32(bits)), data, p + 1, out, 32 * b)
            p += 17


@njit
def decode_iq4_xs(data, p, out):
    """Super-blocks of 256: 8 sub-blocks with 6-bit scales, nibbles that index 16 values."""
    for b in range(out.size // 256):
        d, high = half(data, p), np.int32(load_u16(data, p + 2))
        for s in range(8):
            low = (np.int32(data[p + 4 + (s >> 1)]) >> np.int32(4 * (s & 1))) & np.int32(15)
            scale = low | (((high >> np.int32(2 * s)) & np.int32(3)) << np.int32(4))
            look_up(IQ4_VALUES, d * (np.float32(scale) - np.float32(32)), data, p + 8 + 16 * s, out, 256 * b + 32 * s)
        p += 136


@njit
def decode_q2_k(data, p, out):
    """Super-blocks of 256: 16 sub-blocks with 4-bit scale and min; a byte holds bits of four of them."""
    for b in range(out.size // 256):
        d, dmin = half(data, p + 80), half(data, p + 82)
        for s in range(16):  # 16 weights: half s >> 3, bit pair (s >> 1) & 3
            step, base = d * np.float32(data[p + s] & 15), dmin * np.float32(data[p + s] >> 4)
            at, shift = p + 16 + 32 * (s >> 3) + 16 * (s & 1), np.int32(2 * ((s >> 1) & 3))
            for i in range(lanes(16, out)):
                q = (np.int32(load_u8(data, at + i)) >> shift) & np.int32(3)
                put(out, 256 * b + 16 * s + i, step * np.float32(q) - base)
        p += 84


@njit
def decode_q3_k(data, p, out):
    """Super-blocks of 256: 16 signed 6-bit scales; two bits as in Q2_K, the third in 32 bytes before them."""
    for b in range(out.size // 256):
        d = half(data, p + 108)
        for s in range(16):
            low = (data[p + 96 + (s & 7)] >> (4 * (s >> 3))) & 15
            scale = np.int32(low | (((data[p + 104 + (s & 3)] >> (2 * (s >> 2))) & 3) << 4)) - np.int32(32)
            at, shift, bit = p + 32 + 32 * (s >> 3) + 16 * (s & 1), np.int32(2 * ((s >> 1) & 3)), np.int32(s >> 1)
            step = d * np.float32(scale)
            for i in range(lanes(16, out)):
                q = (np.int32(load_u8(data, at + i)) >> shift) & np.int32(3)
                third = (np.int32(load_u8(data, p + 16 * (s & 1) + i)) >> bit) & np.int32(1)
                put(out, 256 * b + 16 * s + i, step * np.float32((q | (third << np.int32(2))) - np.int32(4)))
        p += 110


@njit(inline="always")
def scale_and_min(data, p, s):
    """Six-bit scale and min of sub-block s of a Q4_K or Q5_K super-block whose packed scales start at p."""
    if s < 4:
        return np.float32(data[p + s] & 63), np.float32(data[p + 4 + s] & 63)
    scale = (data[p + 4 + s] & 15) | ((data[p + s - 4] >> 6) << 4)
    floor = (data[p + 4 + s] >> 4) | ((data[p + s] >> 6) << 4)
    return np.float32(scale), np.float32(floor)


@njit
def decode_q4_k(data, p, out):
    """Super-blocks of 256: 8 sub-blocks with 6-bit scale and min; 32 bytes hold two sub-blocks."""
    for b in range(out.size // 256):
        d, dmin = half(data, p), half(data, p + 2)
        for s in range(4):
            scale, floor = scale_and_min(data, p + 4, 2 * s)
            step, base = d * scale, dmin * floor
            scale, floor = scale_and_min(data, p + 4, 2 * s + 1)
            high_step, high_base = d * scale, dmin * floor
            for i in range(lanes(32, out)):
                q = np.int32(load_u8(data, p + 16 + 32 * s + i))
                put(out, 256 * b + 64 * s + i, step * np.float32(q & np.int32(15)) - base)
                put(out, 256 * b + 64 * s + 32 + i, high_step * np.float32(q >> np.int32(4)) - high_base)
        p += 144


@njit
def decode_q5_k(data, p, out):
    """Q4_K with a fifth bit in 32 bytes before the nibbles."""
    for b in range(out.size // 256):
        d, dmin = half(data, p), half(data, p + 2)
        for s in range(8):
            scale, floor = scale_and_min(data, p + 4, s)
            step, base = d * scale, dmin * floor
            shift, bit = np.int32(4 * (s & 1)), np.int32(s)
            for i in range(lanes(32, out)):
                low = (np.int32(load_u8(data, p + 48 + 32 * (s >> 1) + i)) >> shift) & np.int32(15)
                high = (np.int32(load_u8(data, p + 16 + i)) >> bit) & np.int32(1)
                put(out, 256 * b + 32 * s + i, step * np.float32(low | (high << np.int32(4))) - base)
        p += 176


@njit
def decode_q6_k(data, p, out):
    """Super-blocks of 256: 16 signed scales, 4 + 2 bits a weight."""
    for b in range(out.size // 256):
        d = half(data, p + 208)
        for s in range(16):  # 16 weights: half s >> 3, bit pair (s >> 1) & 3
            low_at, high_at = p + 64 * (s >> 3) + 16 * (s & 3), p + 128 + 32 * (s >> 3) + 16 * (s & 1)
            low_shift, high_shift = np.int32(4 * ((s >> 2) & 1)), np.int32(2 * ((s >> 1) & 3))
            step = d * np.float32(load_i8(data, p + 192 + s))
            for i in range(lanes(16, out)):
                low = (np.int32(load_u8(data, low_at + i)) >> low_shift) & np.int32(15)
                high = (np.int32(load_u8(data, high_at + i)) >> high_shift) & np.int32(3)
                put(out, 256 * b + 16 * s + i, step * np.float32((low | (high << np.int32(4))) - np.int32(32)))
        p += 210
