"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864): position as a rotation of pairs."""

from __future__ import annotations

import numpy as np


def rope_tables(positions: np.ndarray, n_rot: int, freq_base: float, dtype=np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of ``position * freq_base**(-2i/n_rot)``; positions [T] -> two arrays [T, n_rot/2]."""
    frequency = float(freq_base) ** (-2.0 * np.arange(n_rot // 2) / n_rot)
    angle = positions[:, None].astype(np.float64) * frequency  # [T, n_rot/2]
    return np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)


def apply_rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, style: str) -> np.ndarray:
    """Rotate the first ``n_rot`` features of each head; x [T, H, K], cos and sin [T, n_rot/2].

    ``style`` says which features form a pair: "neox" (i, i + n_rot/2), "norm" (2i, 2i + 1).
    Features beyond ``n_rot`` pass through.
    """
    half = cos.shape[1]
    cos, sin = cos[:, None, :], sin[:, None, :]  # the same rotation for every head
    out = x.copy()
    first = slice(0, half) if style == "neox" else slice(0, 2 * half, 2)
    second = slice(half, 2 * half) if style == "neox" else slice(1, 2 * half, 2)
    a, b = x[..., first], x[..., second]
    out[..., first] = a * cos - b * sin
    out[..., second] = a * sin + b * cos
    return out
