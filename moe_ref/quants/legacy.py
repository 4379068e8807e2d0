"""Blocks of 32 with one half-precision scale: llama.cpp's first formats (``block_q4_0``, ``block_q8_0``)."""

from __future__ import annotations

import numpy as np

BLOCK_Q4_0 = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
BLOCK_Q8_0 = np.dtype([("d", "<f2"), ("qs", "i1", 32)])


def decode_q4_0(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 18] -> float32 [n, 32]: ``x = d * (q - 8)``.

    ::

        byte 0..1   d     scale, half precision
        byte 2..17  qs    low nibble = element j, high nibble = element j + 16
    """
    block = raw.view(BLOCK_Q4_0)[:, 0]
    nibbles = np.stack([block["qs"] & 15, block["qs"] >> 4], axis=1).reshape(-1, 32)  # [n, 2, 16] -> [n, 32]
    return block["d"].astype(np.float32)[:, None] * (nibbles.astype(np.int8) - 8).astype(np.float32)


def decode_q8_0(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 34] -> float32 [n, 32]: ``x = d * q``.

    ::

        byte 0..1   d     scale, half precision
        byte 2..33  qs    32 signed bytes
    """
    block = raw.view(BLOCK_Q8_0)[:, 0]
    return block["d"].astype(np.float32)[:, None] * block["qs"].astype(np.float32)
