"""Normalisation: by the root mean square (Zhang & Sennrich 2019, arXiv 1910.07467) or by mean and variance."""

from __future__ import annotations

import numpy as np

from moe_ref.finite import nan_unless_finite


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    """``x / sqrt(mean(x**2) + epsilon) * weight`` over the last axis; x [..., n], weight [n]."""
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float64).astype(x.dtype)
    root = np.sqrt(nan_unless_finite(mean_square) + x.dtype.type(epsilon))
    return x * (1 / root) * weight  # in this order, as in llama.cpp


def layer_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    """``rms_norm`` of x less its mean (Ba et al. 2016, arXiv 1607.06450); x [..., n], weight [n]."""
    return rms_norm(x - x.mean(axis=-1, keepdims=True), weight, epsilon)


def l2_norm(x: np.ndarray, epsilon: float) -> np.ndarray:
    """``x / sqrt(sum(x**2) + epsilon)`` over the last axis."""
    squares = nan_unless_finite(np.sum(np.square(x), axis=-1, keepdims=True))
    return x / np.sqrt(squares + x.dtype.type(epsilon))
