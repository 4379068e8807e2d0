"""k-quants: super-blocks of 256 whose sub-blocks have small integer scales of their own.

Two levels of scale make the average cost small: Q4_K spends 4.5 bits a weight, of which 4 are the
weight's own. ``d`` (and ``dmin``) are half precision, one each a super-block; every sub-block of 16
or 32 multiplies them by its integers of 4, 6 or 8 bits. Q2_K, Q4_K and Q5_K have minimums, Q3_K and
Q6_K are symmetric. Source: ``block_q2_K`` ... ``block_q8_K`` of ggml.
"""

from __future__ import annotations

import numpy as np

from moe_ref.quants.blocks import planes, scale_runs

BLOCK_Q2_K = np.dtype([("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")])
BLOCK_Q3_K = np.dtype([("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")])
BLOCK_Q4_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)])
BLOCK_Q5_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)])
BLOCK_Q6_K = np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")])
BLOCK_Q8_K = np.dtype([("d", "<f4"), ("qs", "i1", 256), ("bsums", "<i2", 16)])


def unpack_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, 12] -> scales uint8 [n, 8], mins uint8 [n, 8], all of 6 bits (Q4_K, Q5_K).

    ::

        byte 0..3    HHssssss   scale 0..3 in the low 6 bits, HH = top two bits of scale 4..7
        byte 4..7    HHmmmmmm   min   0..3 in the low 6 bits, HH = top two bits of min   4..7
        byte 8..11   mmmmssss   low four bits of scale 4..7 and of min 4..7
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    mins = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return scales, mins


def unpack_signed_scales(packed: np.ndarray) -> np.ndarray:
    """uint8 [n, 12] -> int8 [n, 16], of 6 bits less 32 (Q3_K).

    ::

        byte 0..7    hhhhllll   low four bits of scale 0..7 (l) and of scale 8..15 (h)
        byte 8..11   DDCCBBAA   top two bits of scale i (A), i + 4 (B), i + 8 (C), i + 12 (D)
    """
    low, top = planes(packed[:, :8], 4), planes(packed[:, 8:], 2)  # [n, 2, 8], [n, 4, 4]
    return (low.reshape(-1, 16) | (top.reshape(-1, 16) << 4)).astype(np.int8) - 32


def _steps(factor: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """A super-block's factor [n] times the integers of its sub-blocks [n, s] -> float32 [n, s]."""
    return factor.astype(np.float32)[:, None] * scales.astype(np.float32)


def _affine(block: np.ndarray, scales: np.ndarray, mins: np.ndarray, q: np.ndarray) -> np.ndarray:
    """``x = (d * scale) * q - (dmin * min)``: scales, mins [n, s]; q of 256 numbers a block -> float32 [n, 256]."""
    floors = _steps(block["dmin"], mins)  # [n, s]
    x = scale_runs(_steps(block["d"], scales), q).reshape(*floors.shape, 256 // floors.shape[1])
    return (x - floors[:, :, None]).reshape(-1, 256)


def decode_q2_k(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 84] -> float32 [n, 256]: ``x = (d * scale) * q - (dmin * min)``, q of 2 bits.

    ::

        byte 0..15   scales   mmmmssss: scale and min of the 16 sub-blocks of 16
        byte 16..79  qs       32 bytes a half, bit pair p = elements 32p..32p+31
        byte 80..81  d        step of the scales, half precision
        byte 82..83  dmin     step of the mins, half precision
    """
    block = raw.view(BLOCK_Q2_K)[:, 0]
    q = planes(block["qs"].reshape(-1, 2, 32), 2)  # [n, half, 32] -> [n, half, 4, 32]
    return _affine(block, block["scales"] & 15, block["scales"] >> 4, q)


def decode_q3_k(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 110] -> float32 [n, 256]: ``x = (d * scale) * (q - 4)``, q of 3 bits.

    ::

        byte 0..31     hmask    bit b of byte i is the third bit of element 32b + i
        byte 32..95    qs       low two bits, as in Q2_K
        byte 96..107   scales   16 of 6 bits (``unpack_signed_scales``)
        byte 108..109  d        half precision
    """
    block = raw.view(BLOCK_Q3_K)[:, 0]
    low = planes(block["qs"].reshape(-1, 2, 32), 2)  # [n, half, 32] -> [n, half, 4, 32]
    third = planes(block["hmask"], 1)  # [n, 32] -> [n, 8, 32]
    q = (low.reshape(-1, 256) | (third.reshape(-1, 256) << 2)).astype(np.int8) - 4
    return scale_runs(_steps(block["d"], unpack_signed_scales(block["scales"])), q)


def decode_q4_k(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 144] -> float32 [n, 256]: ``x = (d * scale) * q - (dmin * min)``, q of 4 bits.

    ::

        byte 0..1     d        step of the scales, half precision
        byte 2..3     dmin     step of the mins, half precision
        byte 4..15    scales   8 scales and 8 mins of 6 bits (``unpack_scales``)
        byte 16..143  qs       32 bytes hold two sub-blocks of 32, the first in the low nibbles
    """
    block = raw.view(BLOCK_Q4_K)[:, 0]
    q = planes(block["qs"].reshape(-1, 4, 32), 4)  # [n, 4, 32] -> [n, 4, 2, 32]
    return _affine(block, *unpack_scales(block["scales"]), q)


def decode_q5_k(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 176] -> float32 [n, 256]: Q4_K with a fifth bit.

    ::

        byte 0..15    d, dmin, scales   as in Q4_K
        byte 16..47   qh                bit s of byte i is the fifth bit of element i of sub-block s
        byte 48..175  qs                low four bits, as in Q4_K
    """
    block = raw.view(BLOCK_Q5_K)[:, 0]
    low = planes(block["qs"].reshape(-1, 4, 32), 4)  # [n, 4, 32] -> [n, 4, 2, 32]
    fifth = planes(block["qh"], 1)  # [n, 32] -> [n, 8, 32]
    return _affine(block, *unpack_scales(block["scales"]), low.reshape(-1, 256) | (fifth.reshape(-1, 256) << 4))


def decode_q6_k(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 210] -> float32 [n, 256]: ``x = (d * scale) * (q - 32)``, a scale for every 16 weights.

    ::

        byte 0..127    ql       low four bits: 64 bytes a half, low nibbles = elements 0..63, high = 64..127
        byte 128..191  qh       top two bits: 32 bytes a half, bit pair p = elements 32p..32p+31
        byte 192..207  scales   16 signed bytes
        byte 208..209  d        half precision
    """
    block = raw.view(BLOCK_Q6_K)[:, 0]
    low = planes(block["ql"].reshape(-1, 2, 64), 4)  # [n, half, 64] -> [n, half, 2, 64]
    top = planes(block["qh"].reshape(-1, 2, 32), 2)  # [n, half, 32] -> [n, half, 4, 32]
    q = (low.reshape(-1, 256) | (top.reshape(-1, 256) << 4)).astype(np.int8) - 32
    return scale_runs(_steps(block["d"], block["scales"]), q)


def decode_q8_k(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 292] -> float32 [n, 256]: ``x = d * q``; what activations become before they meet k-quants.

    ::

        byte 0..3      d       scale, single precision
        byte 4..259    qs      256 signed bytes
        byte 260..291  bsums   16 signed sums of 16 bytes each: for dot products with formats that have minimums
    """
    block = raw.view(BLOCK_Q8_K)[:, 0]
    return scale_runs(block["d"].astype(np.float32)[:, None], block["qs"])
