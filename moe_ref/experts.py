"""Feed-forward networks: one dense, or many experts of which each token uses k."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Expert = tuple[np.ndarray, np.ndarray, np.ndarray]  # gate [F, D], up [F, D], down [D, F]


def silu(x: np.ndarray) -> np.ndarray:
    """``x * sigmoid(x)`` (Elfwing et al. 2017); exp may overflow to infinity, which gives the right limit 0."""
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def swiglu(x: np.ndarray, expert: Expert) -> np.ndarray:
    """``down(silu(gate x) * (up x))`` (Shazeer 2020, arXiv 2002.05202); x [T, D] -> [T, D]."""
    gate, up, down = expert
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def moe(x: np.ndarray, ids: np.ndarray, weights: np.ndarray, expert: Callable[[int], Expert]) -> np.ndarray:
    """Weighted sum of the chosen experts; x [T, D], ids and weights [T, k], ``expert(e)`` fetches weights.

    Tokens are grouped by expert, so each expert that any token chose is fetched once.
    """
    parts = np.empty((*ids.shape, x.shape[1]), x.dtype)  # [T, k, D]
    for e in np.unique(ids):
        token, rank = np.nonzero(ids == e)
        parts[token, rank] = swiglu(x[token], expert(int(e)))
    return np.einsum("tk,tkd->td", weights, parts)
