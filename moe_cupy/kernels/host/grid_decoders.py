"""Rows of codebook (IQ1 to IQ3), ternary and NVFP4 formats as float32; layouts are drawn in ``moe_ref.quants``."""

from __future__ import annotations

import numpy as np
from numba import njit

from moe_cupy.kernels.host.loads import half, half_of, load_u8, load_u16, load_u32, put
from moe_ref.quants import BY_NAME
from moe_ref.quants.codebooks import codebook
from moe_ref.quants.fp4 import E2M1_DOUBLED, half_e4m3

GRIDS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0", "NVFP4")
IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, TQ1_0, TQ2_0, NVFP4 = (BY_NAME[name].id for name in GRIDS)
BOOK_1S, BOOK_2XXS, BOOK_2XS, BOOK_2S, BOOK_3XXS, BOOK_3S = (
    codebook(name) for name in ("iq1s", "iq2xxs", "iq2xs", "iq2s", "iq3xxs", "iq3s")
)
EVEN = np.array([code | (code.bit_count() & 1) << 7 for code in range(128)], np.uint8)  # 7 bits of signs -> 8
FP4_VALUES, E4M3_VALUES = E2M1_DOUBLED.astype(np.float32), half_e4m3(np.arange(256, dtype=np.uint8))


@njit(inline="always")
def put_point(book, index, signs, step, out, first):
    """A point of a codebook int8 [points, 4 or 8] times ``step``; weight j is negative where bit j of signs is set."""
    for j in range(book.shape[1]):
        value = step * np.float32(book[index, j])
        put(out, first + j, -value if (signs >> np.uint32(j)) & np.uint32(1) else value)


@njit(inline="always")
def put_moved_point(index, down, step, out, first):
    """A point of -1, 0 and 1, moved by 1/8, times ``step``."""
    by = np.float32(-0.125) if down else np.float32(0.125)
    for j in range(8):
        put(out, first + j, step * (np.float32(BOOK_1S[index, j]) + by))


@njit(inline="always")
def odd_step(d, data, p, run):
    """d * (2s + 1), s the nibble ``run`` of the bytes from p on."""
    s = (np.uint32(load_u8(data, p + (run >> 1))) >> np.uint32(4 * (run & 1))) & np.uint32(15)
    return d * np.float32(np.uint32(2) * s + np.uint32(1))


@njit
def decode_signs_in_words(kind, data, p, out):
    """IQ2_XXS, IQ3_XXS: 8 runs of 32 weights; a word with s and signs for each, 4 points of 8 or 8 of 4 weights."""
    three = kind == IQ3_XXS
    for b in range(out.size // 256):
        d = half(data, p)
        for run in range(8):
            word = load_u32(data, p + 66 + 4 * run) if three else load_u32(data, p + 6 + 8 * run)
            step = d * np.float32(np.uint32(2) * (word >> np.uint32(28)) + np.uint32(1))
            for i in range(4):
                signs, first = np.uint32(EVEN[(word >> np.uint32(7 * i)) & np.uint32(127)]), 256 * b + 32 * run + 8 * i
                if three:
                    at, quarter = p + 2 + 8 * run + 2 * i, step * np.float32(0.25)
                    put_point(BOOK_3XXS, load_u8(data, at), signs, quarter, out, first)
                    put_point(BOOK_3XXS, load_u8(data, at + 1), signs >> np.uint32(4), quarter, out, first + 4)
                else:
                    put_point(
                        BOOK_2XXS, load_u8(data, p + 2 + 8 * run + i), signs, step * np.float32(0.125), out, first
                    )
        p += 98 if three else 66


@njit
def decode_iq2(kind, data, p, out):
    """IQ2_XS, IQ2_S: 32 points of 8 weights, a scale for two; index and signs in one word, or in bytes of their own."""
    packed = kind == IQ2_XS
    for b in range(out.size // 256):
        d = half(data, p)
        for i in range(32):
            step = odd_step(d, data, p + (66 if packed else 74), i >> 1) * np.float32(0.125)
            first = 256 * b + 8 * i
            if packed:
                word = np.uint32(load_u16(data, p + 2 + 2 * i))
                put_point(BOOK_2XS, word & np.uint32(511), np.uint32(EVEN[word >> np.uint32(9)]), step, out, first)
            else:
                high = (np.uint32(load_u8(data, p + 66 + (i >> 2))) >> np.uint32(2 * (i & 3))) & np.uint32(3)
                index = np.uint32(load_u8(data, p + 2 + i)) | high << np.uint32(8)
                put_point(BOOK_2S, index, np.uint32(load_u8(data, p + 34 + i)), step, out, first)
        p += 74 if packed else 82


@njit
def decode_iq3_s(data, p, out):
    """64 points of 4 weights, a scale for eight."""
    for b in range(out.size // 256):
        d = half(data, p)
        for i in range(64):
            ninth = (np.uint32(load_u8(data, p + 66 + (i >> 3))) >> np.uint32(i & 7)) & np.uint32(1)
            signs = np.uint32(load_u8(data, p + 74 + (i >> 1))) >> np.uint32(4 * (i & 1))
            index = np.uint32(load_u8(data, p + 2 + i)) | ninth << np.uint32(8)
            put_point(BOOK_3S, index, signs, odd_step(d, data, p + 106, i >> 3), out, 256 * b + 4 * i)
        p += 110


@njit
def decode_iq1_s(data, p, out):
    """8 runs of 32 weights, a word for each: - sss ddd ccc bbb aaa."""
    for b in range(out.size // 256):
        d = half(data, p)
        for i in range(32):
            word = np.uint32(load_u16(data, p + 34 + 2 * (i >> 2)))
            step = d * np.float32(np.uint32(2) * ((word >> np.uint32(12)) & np.uint32(7)) + np.uint32(1))
            high = (word >> np.uint32(3 * (i & 3))) & np.uint32(7)
            index = np.uint32(load_u8(data, p + 2 + i)) | high << np.uint32(8)
            put_moved_point(index, word >> np.uint32(15), step, out, 256 * b + 8 * i)
        p += 50


@njit
def decode_iq1_m(data, p, out):
    """Nibbles -bbb of 32 points; in the top bits of four words of scales stands d."""
    for b in range(out.size // 256):
        bits = np.uint32(0)
        for i in range(4):
            bits |= (np.uint32(load_u16(data, p + 48 + 2 * i)) >> np.uint32(12)) << np.uint32(4 * i)
        d = half_of(bits)
        for i in range(32):
            scales = np.uint32(load_u16(data, p + 48 + 2 * (i >> 3))) >> np.uint32(3 * ((i >> 1) & 3))
            step = d * np.float32(np.uint32(2) * (scales & np.uint32(7)) + np.uint32(1))
            nibble = (np.uint32(load_u8(data, p + 32 + (i >> 1))) >> np.uint32(4 * (i & 1))) & np.uint32(15)
            index = np.uint32(load_u8(data, p + i)) | (nibble & np.uint32(7)) << np.uint32(8)
            put_moved_point(index, nibble >> np.uint32(3), step, out, 256 * b + 8 * i)
        p += 56


@njit(inline="always")
def put_trits(d, power, data, p, count, out, first):
    """Digit log3(power) of ``count`` bytes (``moe_ref.quants.ternary.trits``) times d."""
    for j in range(count):
        fraction = (np.uint32(load_u8(data, p + j)) * power) & np.uint32(255)
        put(out, first + j, d * (np.float32((fraction * np.uint32(3)) >> np.uint32(8)) - np.float32(1)))


@njit
def decode_tq1_0(data, p, out):
    """Five ternary digits a byte: 32 bytes, 16 bytes, and 4 bytes of four."""
    for b in range(out.size // 256):
        d, power, first = half(data, p + 52), np.uint32(1), 256 * b
        for i in range(5):
            put_trits(d, power, data, p, 32, out, first + 32 * i)
            put_trits(d, power, data, p + 32, 16, out, first + 160 + 16 * i)
            if i < 4:
                put_trits(d, power, data, p + 48, 4, out, first + 240 + 4 * i)
            power *= np.uint32(3)
        p += 54


@njit
def decode_tq2_0(data, p, out):
    """Bit pairs of 32 bytes a half, less one."""
    for b in range(out.size // 256):
        d = half(data, p + 64)
        for s in range(8):
            for j in range(32):
                q = (np.uint32(load_u8(data, p + 32 * (s >> 2) + j)) >> np.uint32(2 * (s & 3))) & np.uint32(3)
                put(out, 256 * b + 32 * s + j, d * (np.float32(q) - np.float32(1)))
        p += 66


@njit
def decode_nvfp4(data, p, out):
    """Blocks of 64: 4 small floats as scales, then 8 bytes of nibbles for each 16 weights."""
    for b in range(out.size // 64):
        for s in range(4):
            step = E4M3_VALUES[load_u8(data, p + s)]
            for j in range(8):
                q, first = load_u8(data, p + 4 + 8 * s + j), 64 * b + 16 * s
                put(out, first + j, step * FP4_VALUES[q & 15])
                put(out, first + 8 + j, step * FP4_VALUES[q >> 4])
        p += 36


@njit
def decode_grid(kind, data, p, out):
    """One row of a format of ``grid_decoders``."""
    if kind in (IQ2_XXS, IQ3_XXS):
        decode_signs_in_words(kind, data, p, out)
    elif kind in (IQ2_XS, IQ2_S):
        decode_iq2(kind, data, p, out)
    elif kind == IQ3_S:
        decode_iq3_s(data, p, out)
    elif kind == IQ1_S:
        decode_iq1_s(data, p, out)
    elif kind == IQ1_M:
        decode_iq1_m(data, p, out)
    elif kind == TQ1_0:
        decode_tq1_0(data, p, out)
    elif kind == TQ2_0:
        decode_tq2_0(data, p, out)
    else:
        decode_nvfp4(data, p, out)
