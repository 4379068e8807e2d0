"""k-quants: super-blocks of 256 whose sub-blocks have small integer scales of their own.

Two levels of scale make the average cost small: Q4_K spends 4.5 bits a weight, of which 4 are the
weight's own. ``d`` (and ``dmin``) are half precision, one each a super-block; every sub-block of 32
multiplies them by its 6-bit integers. Source: ``block_q4_K``, ``block_q5_K``, ``block_q6_K`` of ggml.
"""

from __future__ import annotations

import numpy as np

BLOCK_Q4_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)])
BLOCK_Q5_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)])
BLOCK_Q6_K = np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")])


def unpack_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, 12] -> scales uint8 [n, 8], mins uint8 [n, 8], all of 6 bits.

    ::

        byte 0..3    HHssssss   scale 0..3 in the low 6 bits, HH = top two bits of scale 4..7
        byte 4..7    HHmmmmmm   min   0..3 in the low 6 bits, HH = top two bits of min   4..7
        byte 8..11   mmmmssss   low four bits of scale 4..7 and of min 4..7
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    mins = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return scales, mins


def _nibbles(qs: np.ndarray) -> np.ndarray:
    """uint8 [n, 128] -> [n, 8, 32]: each run of 32 bytes holds two sub-blocks, low nibbles first."""
    runs = qs.reshape(-1, 4, 32)
    return np.stack([runs & 15, runs >> 4], axis=2).reshape(-1, 8, 32)  # [n, 4, 2, 32] -> [n, 8, 32]


def _affine(block: np.ndarray, q: np.ndarray) -> np.ndarray:
    """``x = (d * scale) * q - (dmin * min)`` per sub-block; q [n, 8, 32] -> float32 [n, 256]."""
    scales, mins = unpack_scales(block["scales"])
    step = block["d"].astype(np.float32)[:, None] * scales.astype(np.float32)  # [n, 8]
    floor = block["dmin"].astype(np.float32)[:, None] * mins.astype(np.float32)  # [n, 8]
    return (step[:, :, None] * q.astype(np.float32) - floor[:, :, None]).reshape(-1, 256)


def decode_q4_k(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 144] -> float32 [n, 256].

    ::

        byte 0..1     d        step of the scales, half precision
        byte 2..3     dmin     step of the mins, half precision
        byte 4..15    scales   8 scales and 8 mins of 6 bits (``unpack_scales``)
        byte 16..143  qs       8 sub-blocks x 32 weights of 4 bits
    """
    block = raw.view(BLOCK_Q4_K)[:, 0]
    return _affine(block, _nibbles(block["qs"]))


def decode_q5_k(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 176] -> float32 [n, 256]: Q4_K with a fifth bit.

    ::

        byte 0..15    d, dmin, scales   as in Q4_K
        byte 16..47   qh                bit s of byte i is the fifth bit of element i of sub-block s
        byte 48..175  qs                low four bits, as in Q4_K
    """
    block = raw.view(BLOCK_Q5_K)[:, 0]
    bits = np.arange(8, dtype=np.uint8)[None, :, None]
    fifth = (block["qh"][:, None, :] >> bits) & 1  # [n, 32] -> [n, 8, 32]
    return _affine(block, _nibbles(block["qs"]) | (fifth << 4))


def decode_q6_k(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 210] -> float32 [n, 256]: ``x = (d * scale) * (q - 32)``, a scale for every 16 weights.

    ::

        byte 0..127    ql       low four bits: 64 bytes a half, low nibbles = elements 0..63, high = 64..127
        byte 128..191  qh       top two bits: 32 bytes a half, bit pair p = elements 32p..32p+31
        byte 192..207  scales   16 signed bytes
        byte 208..209  d        half precision
    """
    block = raw.view(BLOCK_Q6_K)[:, 0]
    ql = block["ql"].reshape(-1, 2, 64)
    low = np.stack([ql & 15, ql >> 4], axis=2).reshape(-1, 2, 4, 32)  # [n, half, 2, 64] -> [n, half, 4, 32]
    pairs = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    high = (block["qh"].reshape(-1, 2, 1, 32) >> pairs) & 3  # [n, half, 4, 32]
    q = ((low | (high << 4)).astype(np.int8) - 32).reshape(-1, 16, 16).astype(np.float32)
    step = block["d"].astype(np.float32)[:, None] * block["scales"].astype(np.float32)  # [n, 16]
    return (step[:, :, None] * q).reshape(-1, 256)
