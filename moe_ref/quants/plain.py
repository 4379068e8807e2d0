"""Types that are numbers as they stand: no blocks, no scales."""

from __future__ import annotations

import numpy as np


def decode_f32(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 4] -> float32 [n, 1]."""
    return raw.view("<f4").astype(np.float32, copy=False)


def decode_f16(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 2] -> float32 [n, 1]: IEEE half precision (1 sign, 5 exponent, 10 fraction bits)."""
    return raw.view("<f2").astype(np.float32)


def decode_bf16(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 2] -> float32 [n, 1]: the upper half of a float32, so decoding is a shift by 16 bits."""
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
