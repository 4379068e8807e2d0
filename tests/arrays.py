"""Arrays as tests look at them: bit for bit, as what a matrix stands for, as halves hold them."""

from __future__ import annotations

import numpy as np

from moe_cupy.kernels.matrix import Matrix
from moe_ref.quants import dequantize


def same_bits(got: np.ndarray, expected: np.ndarray, context: str) -> None:
    assert got.dtype == np.float32 and got.shape == expected.shape, (context, got.dtype, got.shape, expected.shape)
    a, b = got.ravel().view(np.uint32), np.ascontiguousarray(expected, np.float32).ravel().view(np.uint32)
    wrong = np.flatnonzero(a != b)
    assert not wrong.size, (
        f"{context}: {wrong.size} of {a.size} differ, first at {wrong[0]}: "
        f"{got.ravel()[wrong[0]]} ({a[wrong[0]]:#010x}), expected {expected.ravel()[wrong[0]]} ({b[wrong[0]]:#010x})"
    )


def weights(w: Matrix) -> np.ndarray:
    return dequantize(w.data, w.type, (w.rows, w.cols))


def halves(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)
