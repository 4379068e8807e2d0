"""Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245) over a KV cache."""

from __future__ import annotations

import numpy as np


def softmax(x: np.ndarray) -> np.ndarray:
    """Softmax over the last axis; the maximum is taken out first so that exp cannot overflow."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """Causal attention of the last T positions over all S; several query heads share a KV head.

    q [T, H, K], k [S, G, K], v [S, G, V] -> [T, H, V]; query t stands at position S - T + t.
    """
    n_tokens, n_heads, _ = q.shape
    n_positions, n_groups, _ = k.shape
    q = q.reshape(n_tokens, n_groups, n_heads // n_groups, -1).transpose(1, 2, 0, 3)  # [G, H/G, T, K]
    scores = q @ k.transpose(1, 2, 0)[:, None] * q.dtype.type(scale)  # [G, H/G, T, S]
    position = np.arange(n_positions - n_tokens, n_positions)
    future = np.arange(n_positions)[None, :] > position[:, None]  # [T, S]
    scores = np.where(future, -np.inf, scores)
    mixed = softmax(scores).astype(q.dtype) @ v.transpose(1, 0, 2)[:, None]  # [G, H/G, T, V]
    return mixed.transpose(2, 0, 1, 3).reshape(n_tokens, n_heads, -1)
