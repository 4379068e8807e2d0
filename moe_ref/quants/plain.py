"""Types that are numbers as they stand: no blocks, no scales. What is wider than float32 is rounded to it."""

from __future__ import annotations

from collections.abc import Callable

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


def decode_f64(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 8] -> float32 [n, 1]: to the nearest float32, ties to even; too large becomes infinity."""
    return raw.view("<f8").astype(np.float32)


def integer_decoder(width: int) -> Callable[[np.ndarray], np.ndarray]:
    """A decoder of signed little-endian integers of ``width`` bytes: uint8 [n, width] -> float32 [n, 1].

    Exact up to 2^24 in magnitude; beyond, to the nearest float32, ties to even.
    """
    return lambda raw: raw.view(f"<i{width}").astype(np.float32)


def encode_f32(x: np.ndarray) -> np.ndarray:
    """float32 [n, 1] -> uint8 [n, 4]."""
    return x.astype("<f4", copy=False).view(np.uint8)


def encode_f16(x: np.ndarray) -> np.ndarray:
    """float32 [n, 1] -> uint8 [n, 2]: to the nearest half, ties to even; beyond 65504 to infinity."""
    return x.astype("<f2").view(np.uint8)


def encode_bf16(x: np.ndarray) -> np.ndarray:
    """float32 [n, 1] -> uint8 [n, 2]: the upper half, rounded to nearest, ties to even; a NaN becomes a quiet one."""
    bits = x.view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1) >> 16).astype("<u2")
    quiet = (bits >> 16 | 0x40).astype("<u2")
    return np.where(np.isnan(x), quiet, rounded).view(np.uint8)
