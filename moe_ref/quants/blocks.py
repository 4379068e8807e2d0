"""What the block formats share: small integers packed into words, and scales that hold for a run of weights.

A byte holds two numbers of 4 bits, four of 2, eight of 1. Which weights are they? In ``fields`` they are
neighbours; in ``planes`` they lie a whole run apart, which is what vector instructions like best::

    two bytes, each b in the high bits and a in the low:   [b0 a0] [b1 a1]
    fields:  a0 b0 a1 b1
    planes:  a0 a1 b0 b1
"""

from __future__ import annotations

from math import prod

import numpy as np


def _shifts(words: np.ndarray, bits: int) -> np.ndarray:
    """Where the whole ``bits``-wide fields of such words begin, lowest first."""
    return np.arange(0, 8 * words.dtype.itemsize - bits + 1, bits).astype(words.dtype)


def fields(words: np.ndarray, bits: int) -> np.ndarray:
    """uint [..., w] -> uint [..., w, f]: the f fields of each word side by side, lowest first."""
    return (words[..., None] >> _shifts(words, bits)) & words.dtype.type(2**bits - 1)


def planes(words: np.ndarray, bits: int) -> np.ndarray:
    """uint [..., w] -> uint [..., f, w]: the lowest field of every word, then the next of every word, ..."""
    return (words[..., None, :] >> _shifts(words, bits)[:, None]) & words.dtype.type(2**bits - 1)


def pack_fields(numbers: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [..., w, f] -> uint8 [..., w]: undoes ``fields``; the numbers must fit their bits."""
    return np.bitwise_or.reduce(numbers << np.arange(0, 8, bits, dtype=np.uint8), axis=-1)


def pack_planes(numbers: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [..., f, w] -> uint8 [..., w]: undoes ``planes``; the numbers must fit their bits."""
    return np.bitwise_or.reduce(numbers << np.arange(0, 8, bits, dtype=np.uint8)[:, None], axis=-2)


def round_half_away(x: np.ndarray) -> np.ndarray:
    """To the nearest whole number, halves away from zero as C's ``roundf`` (NumPy's own goes to the even one)."""
    size = np.abs(x)
    whole = np.floor(size)
    return np.copysign(whole + (size - whole >= 0.5), x)


def inverse(d: np.ndarray, times: int = 1) -> np.ndarray:
    """``times / d``, and 0 where d is 0: a block of zeros has no scale."""
    return np.divide(times, d, out=np.zeros_like(d), where=d != 0)


def whole(x: np.ndarray, dtype: type = np.uint8) -> np.ndarray:
    """Numbers cut to integers. What is not finite (a block so small that ``1 / d`` overflows) becomes 0, as in ggml."""
    return np.where(np.isfinite(x), x, 0).astype(dtype)


def raw_bytes(blocks: np.ndarray) -> np.ndarray:
    """Records [n] -> uint8 [n, block_bytes]."""
    return blocks.view(np.uint8).reshape(len(blocks), blocks.dtype.itemsize)


def scale_runs(step: np.ndarray, q: np.ndarray) -> np.ndarray:
    """``x = step * q``: float32 [n, runs], numbers [n, ...] -> float32 [n, elements], runs of equal length."""
    n, runs = step.shape
    in_runs = q.reshape(n, runs, prod(q.shape[1:]) // runs).astype(np.float32, copy=False)
    return (step[:, :, None] * in_runs).reshape(n, prod(q.shape[1:]))
