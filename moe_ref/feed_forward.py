"""The second half of a layer: a dense network, or a router with its experts and what stands beside them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from moe_ref.attention import sigmoid
from moe_ref.block import Block
from moe_ref.experts import ACTIVATIONS, moe, outputs
from moe_ref.finite import check_finite
from moe_ref.routing import route

Observer = Callable[[str, np.ndarray], None]


def network(block: Block, x: np.ndarray, kind: str = "", index: int | None = None) -> np.ndarray:
    """``down(act(gate x) * (up x))``, x [T, D] -> [T, D]; ``kind`` is "", "_shexp" or "_exps" with an ``index``."""
    gate, up = (block.linear(x, f"ffn_{part}{kind}", index) for part in ("gate", "up"))
    return block.linear(ACTIVATIONS[block.config.quirks.activation](gate, up), f"ffn_down{kind}", index)


def feed_forward(block: Block, x: np.ndarray, observe: Observer) -> np.ndarray:
    """What is added to the residual stream x [T, D], before any norm that follows."""
    if block.layer.is_moe and block.config.quirks.dense_beside:
        return two_branches(block, x, observe)
    x = block.norm(x, block.config.quirks.ffn_norm)
    return routed(block, x, block.linear(x, "ffn_gate_inp"), observe) if block.layer.is_moe else network(block, x)


def routed(block: Block, x: np.ndarray, logits: np.ndarray, observe: Observer) -> np.ndarray:
    """Experts chosen by router logits [T, E], and the shared one; x [T, D] -> [T, D]."""
    c, layer = block.config, block.layer
    bias = block.vector("exp_probs_b.bias") if block.full("exp_probs_b.bias") in block.weights else None
    ids, weights = route(logits, c, bias)  # [T, k]
    observe(f"ffn_moe_logits-{layer.index}", logits)
    observe(f"ffn_moe_topk-{layer.index}", ids)
    observe(f"ffn_moe_weights-{layer.index}", weights)

    def expert(e: int, x: np.ndarray) -> np.ndarray:
        return network(block, x, "_exps", e)

    if c.quirks.weigh == "input":
        y = outputs(x[:, None] * weights[..., None], ids, expert).sum(axis=1)
    else:
        y = moe(x, ids, weights, expert)
    return y + shared_expert(block, x) if c.shared else y


def shared_expert(block: Block, x: np.ndarray) -> np.ndarray:
    """The expert that every token uses; in Qwen's models a gate of one number says how much of it."""
    y = network(block, x, "_shexp")
    if not block.config.quirks.shared_gate:
        return y
    return y * sigmoid(block.linear(x, "ffn_gate_inp_shexp"))


def two_branches(block: Block, x: np.ndarray, observe: Observer) -> np.ndarray:
    """gemma4: a dense network and the experts side by side, each between norms of its own; the router sees x itself."""
    dense = block.norm(network(block, block.norm(x, "ffn_norm")), "post_ffw_norm_1")
    seen = block.unit_norm(x) * x.dtype.type(1 / math.sqrt(x.shape[1])) * block.vector("ffn_gate_inp.scale")
    router = block.full("ffn_gate_inp.weight")
    logits = check_finite(block.weights.product(seen, router), f"the product with {router}")
    experts = routed(block, block.norm(x, "pre_ffw_norm_2"), logits, observe)
    return dense + block.norm(experts, "post_ffw_norm_2")
