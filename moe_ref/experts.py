"""Feed-forward networks: one dense, or many experts of which each token uses k, and what stands beside them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from moe_ref.architectures import SWIGLU_OAI_ALPHA, SWIGLU_OAI_LIMIT

Expert = tuple[np.ndarray, np.ndarray, np.ndarray]  # gate [F, D], up [F, D], down [D, F]


def silu(x: np.ndarray) -> np.ndarray:
    """``x * sigmoid(x)`` (Elfwing et al. 2017); exp may overflow to infinity, which gives the right limit 0."""
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    """Gaussian error linear unit in its tanh form (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""
    return (0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x)))).astype(x.dtype)


def swiglu_oai(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """gpt-oss: both clamped, a steeper sigmoid, and one added to ``up``."""
    gate, up = np.minimum(gate, SWIGLU_OAI_LIMIT), np.clip(up, -SWIGLU_OAI_LIMIT, SWIGLU_OAI_LIMIT)
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(gate.dtype.type(-SWIGLU_OAI_ALPHA) * gate)) * (up + 1)


ACTIVATIONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "silu": lambda gate, up: silu(gate) * up,
    "gelu": lambda gate, up: gelu(gate) * up,
    "swiglu_oai": swiglu_oai,
}


def swiglu(x: np.ndarray, expert: Expert) -> np.ndarray:
    """``down(silu(gate x) * (up x))`` (Shazeer 2020, arXiv 2002.05202); x [T, D] -> [T, D]."""
    gate, up, down = expert
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def moe(
    x: np.ndarray, ids: np.ndarray, weights: np.ndarray, expert: Callable[[int, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Weighted sum of the chosen experts; x [T, D], ids and weights [T, k], ``expert(e, x)`` applies one.

    Tokens are grouped by expert, so each expert that any token chose is fetched once.
    """
    return np.einsum("tk,tkd->td", weights, outputs(x, ids, expert))


def outputs(x: np.ndarray, ids: np.ndarray, expert: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
    """What each chosen expert makes of its token: x [T, D] or, one for each choice, [T, k, D] -> [T, k, D]."""
    each = np.broadcast_to(x[:, None], (*ids.shape, x.shape[-1])) if x.ndim == 2 else x
    parts = np.empty((*ids.shape, x.shape[-1]), x.dtype)  # [T, k, D]
    for e in np.unique(ids):
        token, rank = np.nonzero(ids == e)
        parts[token, rank] = expert(int(e), each[token, rank])
    return parts
