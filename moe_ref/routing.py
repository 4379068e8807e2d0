"""The router: which experts see a token, and with what weight.

Six steps, each a line of ``route``: scores; a bias for selection alone; groups; top-k; the scores (unbiased) of the
selected; their sum and scale. Architectures differ only in which steps do something.
"""

from __future__ import annotations

import numpy as np

from moe_ref.architectures import SELECTED
from moe_ref.attention import sigmoid, softmax
from moe_ref.config import ModelConfig

SMALLEST_SUM = 6.103515625e-5  # llama.cpp's floor for the sum of selected weights (smallest normal half)
GATES = {"softmax": softmax, "sigmoid": sigmoid, SELECTED: lambda logits: logits}


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest of each row, best first; equal scores go to the lower index. [T, E] -> [T, k]."""
    return np.argsort(-scores, axis=-1, kind="stable")[:, :k]


def best_groups(scores: np.ndarray, groups: int, used: int) -> np.ndarray:
    """scores [T, E] with -inf outside the ``used`` best groups; a group's score is the sum of its two best.

    As DeepSeek-V3 (arXiv 2412.19437) and llama.cpp do it; V2's own code takes the single best instead.
    """
    by_group = scores.reshape(len(scores), groups, -1)  # [T, groups, E / groups]
    group_scores = np.sort(by_group, axis=-1)[..., -2:].sum(axis=-1)
    kept = np.zeros(group_scores.shape, bool)
    np.put_along_axis(kept, top_k(group_scores, used), True, axis=-1)
    return np.where(kept[..., None], by_group, -np.inf).reshape(scores.shape)


def route(logits: np.ndarray, config: ModelConfig, bias: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Router logits [T, E], bias [E] -> expert ids int [T, k], best first, and their weights [T, k]."""
    scores = GATES[config.gating](logits)  # [T, E]
    choice = logits if config.quirks.select_by == "logit" else scores
    choice = choice if bias is None else choice + bias
    if config.expert_group_count > 1:
        choice = best_groups(choice, config.expert_group_count, config.expert_group_used_count)
    ids = top_k(choice, config.expert_used_count)  # [T, E] -> [T, k]
    weights = np.take_along_axis(scores, ids, axis=-1)
    if config.gating == SELECTED:
        weights = softmax(weights)
    if config.renormalise:
        weights = weights / np.maximum(weights.sum(axis=-1, keepdims=True), SMALLEST_SUM)
    return ids, (weights * config.expert_weights_scale).astype(logits.dtype)
