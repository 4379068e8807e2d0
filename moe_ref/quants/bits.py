"""Small integers packed into words: the two ways in which ggml lays them out.

A byte holds two numbers of 4 bits, four of 2, eight of 1. Which elements are they? With ``fields`` they
are neighbours; with ``planes`` they lie a whole run apart, which is what vector instructions like best::

    word w0 = [b0 a0]   w1 = [b1 a1]      a in the low bits, b above it
    fields: a0 b0 a1 b1                   planes: a0 a1 b0 b1
"""

from __future__ import annotations

import numpy as np


def fields(words: np.ndarray, bits: int) -> np.ndarray:
    """uint [..., w] -> uint [..., w, fields]: the whole ``bits``-wide fields of each word, lowest first."""
    width = 8 * words.dtype.itemsize
    shifts = np.arange(0, width - bits + 1, bits).astype(words.dtype)
    return (words[..., None] >> shifts) & words.dtype.type(2**bits - 1)


def planes(words: np.ndarray, bits: int) -> np.ndarray:
    """uint [..., w] -> uint [..., fields, w]: plane f holds field f of every word, lowest field first."""
    return np.ascontiguousarray(fields(words, bits).swapaxes(-1, -2))


def scales_of(half: np.ndarray) -> np.ndarray:
    """float16 [n] -> float32 [n, 1]: a block's scale, ready to multiply a row of the block's numbers."""
    return half.astype(np.float32)[:, None]
