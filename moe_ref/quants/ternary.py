"""Weights of very few values, for models trained that way: binary Q1_0, four-valued Q2_0, ternary TQ1_0 and TQ2_0.

Source: ``block_q1_0``, ``block_q2_0``, ``block_tq1_0``, ``block_tq2_0`` of ggml (0.25.3; gguf-py 0.19 knows
Q1_0 by size alone and Q2_0 not at all).
"""

from __future__ import annotations

import numpy as np

from moe_ref.quants.blocks import fields, planes, scale_runs

BLOCK_Q1_0 = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
BLOCK_Q2_0 = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
BLOCK_TQ1_0 = np.dtype([("qs", "u1", 48), ("qh", "u1", 4), ("d", "<f2")])
BLOCK_TQ2_0 = np.dtype([("qs", "u1", 64), ("d", "<f2")])


def _scale(block: np.ndarray) -> np.ndarray:
    """float32 [n, 1]."""
    return block["d"].astype(np.float32)[:, None]


def decode_q1_0(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 18] -> float32 [n, 128]: ``x = d`` where the bit is set, otherwise ``-d``.

    ::

        byte 0..1   d     half precision
        byte 2..17  qs    bit j of these 128 is element j
    """
    block = raw.view(BLOCK_Q1_0)[:, 0]
    d = _scale(block) * np.float32(1)  # any arithmetic makes a signalling NaN quiet, as ggml's conversion does
    return np.where(fields(block["qs"], 1).reshape(-1, 128) == 1, d, -d)


def decode_q2_0(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 18] -> float32 [n, 64]: ``x = d * (q - 1)``, that is -1, 0, 1 or 2 times d.

    ::

        byte 0..1   d     half precision
        byte 2..17  qs    bit pair j of these 64 is element j
    """
    block = raw.view(BLOCK_Q2_0)[:, 0]
    return scale_runs(_scale(block), fields(block["qs"], 2).astype(np.int8) - 1)


def trits(packed: np.ndarray, count: int) -> np.ndarray:
    """uint8 [n, w] -> int8 [n, count * w] of -1, 0 and 1: the first ternary digit of every byte, then the second, ...

    A byte b stands for the fraction b / 256, written in base 3 as 0.t0 t1 t2 t3 t4. Multiplying by 3^i
    moves digit i to the front (what leaves the byte at the top is the whole part, the digits before it),
    and multiplying by 3 once more makes that digit the whole part. 3^5 = 243 < 256: five fit a byte.
    """
    powers = (3 ** np.arange(count)).astype(np.uint8)[:, None]
    fraction = packed[:, None, :] * powers  # [n, w] -> [n, count, w], modulo 256
    return ((fraction.astype(np.uint16) * 3 >> 8).astype(np.int8) - 1).reshape(-1, count * packed.shape[1])


def decode_tq1_0(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 54] -> float32 [n, 256]: ``x = d * t``, five ternary digits a byte (``trits``).

    ::

        byte 0..31   qs    digit i of byte j = element 32i + j, i = 0..4
        byte 32..47  qs    digit i of byte 32 + j = element 160 + 16i + j, i = 0..4
        byte 48..51  qh    digit i of byte j = element 240 + 4i + j, i = 0..3
        byte 52..53  d     half precision
    """
    block = raw.view(BLOCK_TQ1_0)[:, 0]
    parts = trits(block["qs"][:, :32], 5), trits(block["qs"][:, 32:], 5), trits(block["qh"], 4)
    return scale_runs(_scale(block), np.concatenate(parts, axis=1))


def decode_tq2_0(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 66] -> float32 [n, 256]: ``x = d * (q - 1)``; -1, 0 and 1, though a fourth code would mean 2.

    ::

        byte 0..63   qs    32 bytes a half, bit pair p = elements 32p..32p+31
        byte 64..65  d     half precision
    """
    block = raw.view(BLOCK_TQ2_0)[:, 0]
    q = planes(block["qs"].reshape(-1, 2, 32), 2).astype(np.int8) - 1  # [n, half, 32] -> [n, half, 4, 32]
    return scale_runs(_scale(block), q)
