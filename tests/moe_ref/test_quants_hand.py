"""Every tensor type but those of ``test_quants.py``: blocks packed by hand decode to values worked out by hand."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest

from moe_ref.quants import FORMATS, dequantize

ELSEWHERE = {"F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K"}  # packed by hand in test_quants.py

# Each block gives its bytes, some elements worked out on paper, and all of them in plain Python.


def half(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}e", *values)


RAMP = bytes(j | (15 - j) << 4 for j in range(16))  # low nibbles count up, high nibbles down
UP_DOWN = [*range(16), *reversed(range(16))]  # the 32 numbers of RAMP where high nibbles come 16 later
FIFTHS = [16 * (j % 3 == 0) for j in range(32)]
QH = struct.pack("<I", sum(1 << j for j in range(0, 32, 3)))
PAIRS = 0b11_10_01_00  # bit pairs 0, 1, 2, 3
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
IQ4 = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]

# Points 0, 1 and the last of every codebook as ggml-common.h has them, e.g. iq2xxs_grid[1] = 0x080808080808082b.
POINTS = {
    "iq1s": ([-1] * 8, [1] + [-1] * 7, [1] * 8),
    "iq2xxs": ([8] * 8, [43] + [8] * 7, [8, 25, 8, 8, 25, 43, 43, 43]),
    "iq2xs": ([8] * 8, [43] + [8] * 7, [43] * 8),
    "iq2s": ([8] * 8, [43] + [8] * 7, [43] * 8),
    "iq3xxs": ([4] * 4, [20, 4, 4, 4], [4, 28, 52, 62]),
    "iq3s": ([1] * 4, [3, 1, 1, 1], [1, 1, 15, 15]),
}
INDEX = bytes([0, 1, 0, 255])  # low bits of the indices of four points: 0, 1, 0 and the last


def point(book: str, e: int) -> float:
    """Element e of a block whose points are 0, 1, 0, last, 0, 1, 0, last, ..."""
    zero, one, last = POINTS[book]
    return (zero, one, zero, last)[e // len(zero) % 4][e % len(zero)]


def grid(book: str, step: Callable[[int], float], negative: Callable[[int], bool]) -> list[float]:
    return [step(e) * point(book, e) * (-1 if negative(e) else 1) for e in range(256)]


def one_bit(step: Callable[[int], float], down: Callable[[int], bool]) -> list[float]:
    return [step(e) * (point("iq1s", e) + (-0.125 if down(e) else 0.125)) for e in range(256)]


def first_and_last(e: int) -> bool:
    """Sign code 0000001 for point 0 of each run of 32: weight 0 negative and, to make two, weight 7."""
    return e % 32 in (0, 7)


# Signs 0000001, 0, 0, 0 for the points of a run, and s = the number of the run.
WORDS = struct.pack("<8I", *(1 | run << 28 for run in range(8)))
# Nibbles 0, 1, 2, ...: run s has the scale s.
COUNT_4 = bytes(2 * i | (2 * i + 1) << 4 for i in range(4))
COUNT_8 = bytes(2 * i | (2 * i + 1) << 4 for i in range(8))


def q3_k() -> list[float]:
    out = []
    for e in range(256):
        s, third = e // 16, e % 8 == e // 32  # byte i of hmask has bit i % 8
        scale = (s if s < 8 else 15 - (s - 8)) + 16 * (s // 4) - 32
        out.append(2.0 * scale * (e % 128 // 32 + 4 * third - 4))
    return out


HAND: dict[str, tuple[bytes, dict[int, float], list[float]]] = {
    # 1 + 2^-24 lies midway and would go to 1, but for the last bit; 1e300 is beyond float32
    "F64": (struct.pack("<4d", -2.5, 1 + 2.0**-24 + 2.0**-50, 1e300, 2.0**-149), {},
            [-2.5, 1 + 2.0**-23, float("inf"), 2.0**-149]),
    "I8": (b"\x01\xff\x80\x7f", {}, [1, -1, -128, 127]),
    "I16": (struct.pack("<4h", 1, -2, -32768, 32767), {}, [1, -2, -32768, 32767]),
    "I32": (struct.pack("<4i", -3, 2**24 + 1, 2**24 + 3, -(2**31)), {}, [-3, 2**24, 2**24 + 4, -(2.0**31)]),
    "I64": (struct.pack("<3q", -3, 2**40 + 1, -(2**63)), {}, [-3, 2.0**40, -(2.0**63)]),
    "Q4_1": (
        half(0.5, -2.0) + RAMP, {0: -2.0, 15: 5.5, 16: 5.5, 31: -2.0},
        [0.5 * q - 2.0 for q in UP_DOWN]),
    "Q5_0": (  # element 0: 0.25 * (0 + 16 - 16); 1: 0.25 * (1 - 16); 30: 0.25 * (1 + 16 - 16)
        half(0.25) + QH + RAMP, {0: 0.0, 1: -3.75, 30: 0.25},
        [0.25 * (q + fifth - 16) for q, fifth in zip(UP_DOWN, FIFTHS, strict=True)]),
    "Q5_1": (
        half(0.25, 1.0) + QH + RAMP, {0: 5.0, 1: 1.25, 30: 5.25},
        [0.25 * (q + fifth) + 1.0 for q, fifth in zip(UP_DOWN, FIFTHS, strict=True)]),
    "Q2_K": (  # scale of sub-block i is i, its min 15 - i; bit pair p is p
        bytes(i | (15 - i) << 4 for i in range(16)) + bytes([PAIRS]) * 64 + half(2.0, 0.5),
        {0: -7.5, 32: 2 * 2 * 1 - 6.5, 127: 2 * 7 * 3 - 4.0, 255: 2 * 15 * 3 - 0.0},
        [2.0 * (e // 16) * (e % 128 // 32) - 0.5 * (15 - e // 16) for e in range(256)]),
    "Q3_K": (  # scale 0 = 0 + 0 - 32, element 0: 2*-32*(0+4-4); 1: 2*-32*(0-4); 255: scale 8+3*16-32 = 24, 2*24*(3+4-4)
        bytes(1 << i % 8 for i in range(32)) + bytes([PAIRS]) * 64
        + bytes(k | (15 - k) << 4 for k in range(8)) + bytes([PAIRS]) * 4 + half(2.0),
        {0: 0.0, 1: 256.0, 127: 2.0 * (7 + 16 - 32) * -1, 255: 144.0}, q3_k()),
    "Q8_K": (
        struct.pack("<f256b16h", 0.25, *range(-128, 128), *range(16)), {0: -32.0, 128: 0.0, 255: 31.75},
        [0.25 * q for q in range(-128, 128)]),
    "IQ4_NL": (
        half(2.0) + RAMP, {0: -254.0, 8: 2.0, 15: 226.0, 16: 226.0}, [2.0 * IQ4[q] for q in UP_DOWN]),
    "IQ4_XS": (  # scale s = s + 16 * (s % 4) - 32; element 0: -32 * -127; 255: (7 + 48 - 32) * -127
        half(1.0) + bytes([PAIRS] * 2) + COUNT_4 + RAMP * 8, {0: 4064.0, 32: -15 * -127.0, 255: 23 * -127.0},
        [(s + 16 * (s % 4) - 32.0) * IQ4[q] for s in range(8) for q in UP_DOWN]),
    "Q1_0": (
        half(1.5) + bytes([0b0000_0101] * 16), {0: 1.5, 1: -1.5, 2: 1.5, 127: -1.5},
        [1.5 if e % 8 in (0, 2) else -1.5 for e in range(128)]),
    "Q2_0": (half(1.5) + bytes([PAIRS] * 16), {0: -1.5, 1: 0.0, 3: 3.0}, [1.5 * (e % 4 - 1) for e in range(64)]),
    # 49 = ceil(256 * 46 / 243), 46 = 01201 in base 3; 255 for 22222; 108 = ceil(256 * 102 / 243), 102 = 10210
    "TQ1_0": (
        bytes([49] * 32 + [255] * 16 + [108] * 4) + half(3.0), {0: -3.0, 32: 0.0, 64: 3.0, 160: 3.0, 244: -3.0},
        [3.0 * t for digit, run in [(-1, 32), (0, 32), (1, 32), (-1, 32), (0, 32)] for t in [digit] * run]
        + [3.0] * 80 + [3.0 * t for digit in (0, -1, 1, 0) for t in [digit] * 4]),
    "TQ2_0": (
        bytes([PAIRS] * 64) + half(3.0), {0: -3.0, 32: 0.0, 64: 3.0, 96: 6.0, 128: -3.0},
        [3.0 * (e % 128 // 32 - 1) for e in range(256)]),
    "MXFP4": (bytes([129]) + RAMP, {1: 2.0, 7: 24.0, 9: -2.0, 31: 0.0}, [4.0 * E2M1[q] for q in UP_DOWN]),
    "NVFP4": (  # 0x38 = 0 0111 000 is 1; 0x01 = 0 0000 001 is 2^-9; 0x7E = 0 1111 110 is 2^8 * 1.75; 0x7F reads as 0
        bytes([0x38, 0x01, 0x7E, 0x7F]) + RAMP[:8] * 4,
        {1: 0.5, 8: -6.0, 17: 2.0**-10, 39: 448 * 6.0, 63: 0.0},
        [s * E2M1[q] for s in (1, 2.0**-9, 448, 0) for q in [*range(8), *range(15, 7, -1)]]),
    "IQ2_XXS": (  # d / 8 = 1: the step of run r is 2r + 1; element 0: 1 * -8; 7: the even sign; 40: point 1, run 1
        half(8.0) + b"".join(INDEX + WORDS[4 * r : 4 * r + 4] for r in range(8)),
        {0: -8.0, 1: 8.0, 7: -8.0, 8: 43.0, 25: 25.0, 40: 3 * 43.0, 255: 15 * 43.0},
        grid("iq2xxs", lambda e: 2 * (e // 32) + 1, first_and_last)),
    "IQ2_XS": (  # runs of 16 here; even points have sign code 3: weights 0 and 1
        half(8.0) + struct.pack("<4H", 3 << 9, 1, 3 << 9, 511) * 8 + COUNT_8,
        {0: -8.0, 2: 8.0, 8: 43.0, 31: 3 * 43.0, 255: 31 * 43.0},
        grid("iq2xs", lambda e: 2 * (e // 16) + 1, lambda e: e % 16 in (0, 1))),
    "IQ2_S": (  # a single sign, on the last weight of every even point; 0xC0: index 1023 for the fourth
        half(8.0) + INDEX * 8 + bytes([0x80, 0] * 16) + bytes([0xC0] * 8) + COUNT_8,
        {0: 8.0, 7: -8.0, 8: 43.0, 31: 3 * 43.0, 255: 31 * 43.0},
        grid("iq2s", lambda e: 2 * (e // 16) + 1, lambda e: e % 16 == 7)),
    "IQ3_XXS": (  # points of 4 weights, signs by 8
        half(4.0) + INDEX * 16 + WORDS, {0: -4.0, 4: 20.0, 7: -4.0, 15: 62.0, 36: 3 * 20.0, 255: 15 * 62.0},
        grid("iq3xxs", lambda e: 2 * (e // 32) + 1, first_and_last)),
    "IQ3_S": (  # 0x88: ninth bit for the fourth and the eighth
        half(2.0) + INDEX * 16 + bytes([0x88] * 8) + bytes([0x80, 0] * 16) + COUNT_4,
        {0: 2.0, 4: 6.0, 7: -2.0, 15: 30.0, 36: 3 * 6.0, 255: 2 * 15 * 15.0},
        grid("iq3s", lambda e: 2 * (2 * (e // 32) + 1), lambda e: e % 16 == 7)),
    "IQ1_S": (  # s = run, minus 1/8 in odd runs; element 0: 2 * (-1 + 1/8); 8: 2 * (1 + 1/8); 40: 2 * 3 * (1 - 1/8)
        half(2.0) + INDEX * 8 + struct.pack("<8H", *((r % 2) << 15 | r << 12 | 7 << 9 for r in range(8))),
        {0: -1.75, 8: 2.25, 31: 2.25, 40: 2 * 3 * 0.875, 255: 2 * 15 * 0.875},
        one_bit(lambda e: 2.0 * (2 * (e // 32) + 1), lambda e: e // 32 % 2 == 1)),
    "IQ1_M": (  # d = 2.0 is 0x4000, its 4 in the last word; s of runs of 16: 0 1 2 3 0 1 ...; minus 1/8 in odd points
        INDEX * 8 + bytes([0x80, 0xF0] * 8)
        + struct.pack("<4H", *(3 << 9 | 2 << 6 | 1 << 3 | d_piece << 12 for d_piece in (0, 0, 0, 4))),
        {0: -1.75, 8: 2 * 0.875, 31: 2 * 3 * 0.875, 255: 2 * 7 * 0.875},
        one_bit(lambda e: 2.0 * (2 * (e // 16 % 4) + 1), lambda e: e // 8 % 2 == 1)),
}  # fmt: skip


def test_every_format_has_a_hand_made_block():
    assert set(HAND) | ELSEWHERE == set(FORMATS) and not set(HAND) & ELSEWHERE


@pytest.mark.parametrize("name", HAND)
def test_hand_made_block_decodes_to_hand_computed_values(name):
    raw, by_hand, values = HAND[name]
    got = dequantize(np.frombuffer(raw, np.uint8), name, (len(values),))
    for i, value in by_hand.items():
        assert got[i] == value, f"{name} element {i}: {got[i]}, by hand {value}"
    wrong = np.flatnonzero(got != np.array(values, np.float32))
    assert not wrong.size, f"{name}: elements {wrong[:5]}: {got[wrong[:5]]}, expected {np.take(values, wrong[:5])}"
