"""Blocks of 32 with one half-precision scale: llama.cpp's first formats.

Names ending in _0 are symmetric, ``x = d * (q - zero)``; those ending in _1 add a minimum, ``x = d * q + m``.
Source: ``block_q4_0``, ``block_q4_1``, ``block_q5_0``, ``block_q5_1``, ``block_q8_0`` of ggml.
"""

from __future__ import annotations

import numpy as np

from moe_ref.quants.blocks import (
    fields,
    inverse,
    pack_fields,
    pack_planes,
    planes,
    raw_bytes,
    round_half_away,
    scale_runs,
    whole,
)

BLOCK_Q4_0 = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
BLOCK_Q4_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)])
BLOCK_Q5_0 = np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
BLOCK_Q5_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
BLOCK_Q8_0 = np.dtype([("d", "<f2"), ("qs", "i1", 32)])


def _scaled(block: np.ndarray, q: np.ndarray) -> np.ndarray:
    """``d * q``; q of 32 numbers a block -> float32 [n, 32]."""
    return scale_runs(block["d"].astype(np.float32)[:, None], q)


def _minimum(block: np.ndarray) -> np.ndarray:
    """float32 [n, 1]."""
    return block["m"].astype(np.float32)[:, None]


def _five_bits(block: np.ndarray) -> np.ndarray:
    """uint8 [n, 32]: low four bits from ``qs``, the fifth from ``qh``."""
    low, fifth = planes(block["qs"], 4), fields(block["qh"], 1)  # [n, 2, 16], [n, 4, 8]
    return low.reshape(-1, 32) | (fifth.reshape(-1, 32) << 4)


def decode_q4_0(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 18] -> float32 [n, 32]: ``x = d * (q - 8)``.

    ::

        byte 0..1   d     scale, half precision
        byte 2..17  qs    low nibble = element j, high nibble = element j + 16
    """
    block = raw.view(BLOCK_Q4_0)[:, 0]
    return _scaled(block, planes(block["qs"], 4).astype(np.int8) - 8)


def decode_q4_1(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 20] -> float32 [n, 32]: ``x = d * q + m``.

    ::

        byte 0..1   d     scale, half precision
        byte 2..3   m     minimum, half precision
        byte 4..19  qs    nibbles, as in Q4_0
    """
    block = raw.view(BLOCK_Q4_1)[:, 0]
    return _scaled(block, planes(block["qs"], 4)) + _minimum(block)


def decode_q5_0(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 22] -> float32 [n, 32]: ``x = d * (q - 16)``.

    ::

        byte 0..1   d     scale, half precision
        byte 2..5   qh    bit j of these 32 is the fifth bit of element j
        byte 6..21  qs    low four bits, as in Q4_0
    """
    block = raw.view(BLOCK_Q5_0)[:, 0]
    return _scaled(block, _five_bits(block).astype(np.int8) - 16)


def decode_q5_1(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 24] -> float32 [n, 32]: ``x = d * q + m``.

    ::

        byte 0..3   d, m  as in Q4_1
        byte 4..7   qh    as in Q5_0
        byte 8..23  qs    low four bits, as in Q4_0
    """
    block = raw.view(BLOCK_Q5_1)[:, 0]
    return _scaled(block, _five_bits(block)) + _minimum(block)


def decode_q8_0(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 34] -> float32 [n, 32]: ``x = d * q``.

    ::

        byte 0..1   d     scale, half precision
        byte 2..33  qs    32 signed bytes
    """
    block = raw.view(BLOCK_Q8_0)[:, 0]
    return _scaled(block, block["qs"])


# ---------------------------------------------------------------------------------------------------------
# Encoders, which do in float32 what ggml's ``quantize_row_*_ref`` do, so that the bytes are the same.


def _pack(layout: np.dtype, q: np.ndarray, d: np.ndarray, m: np.ndarray | None = None) -> np.ndarray:
    """q uint8 [n, 32], d (and m) [n, 1] -> uint8 [n, block_bytes]."""
    block = np.empty(len(q), layout)
    block["d"] = d[:, 0]
    if m is not None:
        block["m"] = m[:, 0]
    if "qh" in (layout.names or ()):
        block["qh"] = pack_fields((q >> 4).reshape(-1, 4, 8), 1)
    block["qs"] = pack_planes((q & 15).reshape(-1, 2, 16), 4)
    return raw_bytes(block)


def _encode_symmetric(x: np.ndarray, layout: np.dtype, zero: int) -> np.ndarray:
    """``d`` puts the largest weight, with its sign, on code 0; the other end of the codes falls one step short."""
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)  # [n, 32] -> [n, 1]
    d = largest / np.float32(-zero)
    q = whole(x * inverse(d) + np.float32(zero + 0.5))
    return _pack(layout, np.minimum(q, 2 * zero - 1), d)


def _encode_affine(x: np.ndarray, layout: np.dtype, top: int) -> np.ndarray:
    """The smallest weight gets code 0, the largest ``top``."""
    m = x.min(axis=1, keepdims=True)  # [n, 32] -> [n, 1]
    d = (x.max(axis=1, keepdims=True) - m) / np.float32(top)
    q = whole((x - m) * inverse(d) + np.float32(0.5))
    return _pack(layout, np.minimum(q, top), d, m)


def encode_q4_0(x: np.ndarray) -> np.ndarray:
    """float32 [n, 32] -> uint8 [n, 18]."""
    return _encode_symmetric(x, BLOCK_Q4_0, 8)


def encode_q4_1(x: np.ndarray) -> np.ndarray:
    """float32 [n, 32] -> uint8 [n, 20]."""
    return _encode_affine(x, BLOCK_Q4_1, 15)


def encode_q5_0(x: np.ndarray) -> np.ndarray:
    """float32 [n, 32] -> uint8 [n, 22]."""
    return _encode_symmetric(x, BLOCK_Q5_0, 16)


def encode_q5_1(x: np.ndarray) -> np.ndarray:
    """float32 [n, 32] -> uint8 [n, 24]."""
    return _encode_affine(x, BLOCK_Q5_1, 31)


def encode_q8_0(x: np.ndarray) -> np.ndarray:
    """float32 [n, 32] -> uint8 [n, 34]: the largest magnitude becomes 127 steps."""
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)  # [n, 32] -> [n, 1]
    block = np.empty(len(x), BLOCK_Q8_0)
    block["d"], block["qs"] = d[:, 0], whole(round_half_away(x * inverse(d)), np.int8)
    return raw_bytes(block)
