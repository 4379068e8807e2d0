"""The router: which experts see a token, and with what weight."""

from __future__ import annotations

import numpy as np

from moe_ref.attention import softmax
from moe_ref.config import ModelConfig

SMALLEST_SUM = 6.103515625e-5  # llama.cpp's floor for the sum of selected weights (smallest normal half)

GATES = {"softmax": softmax}


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest of each row, best first; equal scores go to the lower index. [T, E] -> [T, k]."""
    return np.argsort(-scores, axis=-1, kind="stable")[:, :k]


def route(logits: np.ndarray, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Router logits [T, E] -> expert ids int [T, k], best first, and their weights [T, k]."""
    probabilities = GATES[config.quirks.gating](logits)  # [T, E]
    ids = top_k(probabilities, config.expert_used_count)  # [T, E] -> [T, k]
    weights = np.take_along_axis(probabilities, ids, axis=-1)
    if config.quirks.renormalise:
        weights = weights / np.maximum(weights.sum(axis=-1, keepdims=True), SMALLEST_SUM)
    return ids, (weights * config.expert_weights_scale).astype(logits.dtype)
