"""The dense half of a layer's feed-forward part: everything around the routed experts, as launches.

The formulas are those of ``moe_ref``'s feed_forward.py, whose names are kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_cupy.engine.block import Block
from moe_cupy.engine.weights import ROUTER_NORM


def inner(block: Block, x: Any, kind: str = "") -> Any:
    """``act(gate x) * (up x)``, [T, F]; ``kind`` is "" or "_shexp"."""
    gate, up = block.linear(x, f"ffn_gate{kind}"), block.linear(x, f"ffn_up{kind}")
    block.launch("activate", gate=gate, up=up, kind=block.config.quirks.activation)
    return gate


def dense(block: Block) -> None:
    """A layer without experts: its network's result is added to the residual stream."""
    x = block.norm(block.run.x, block.config.quirks.ffn_norm, block.buffer("h", block.config.embedding_length))
    block.add_product(inner(block, x), "ffn_down", "post_ffw_norm")


def router_logits(block: Block, ahead: str = "") -> tuple[Any, Any]:
    """What the experts see, h [T, D], and the router's logits [T, E], both from the residual stream.

    With ``ahead`` (a prefix of the buffers' names) they are a guess: the layer's turn has not come.
    """
    c, x = block.config, block.run.x
    if c.quirks.dense_beside:
        seen = block.normalise(x, block.weights.norms[ROUTER_NORM], block.buffer(ahead + "seen", c.embedding_length))
        h = seen if ahead else block.norm(x, "pre_ffw_norm_2", block.buffer("h", c.embedding_length))
    else:
        seen = h = block.norm(x, c.quirks.ffn_norm, block.buffer(ahead + "h", c.embedding_length))
    logits = block.buffer(ahead + "router", c.expert_count)
    block.run.product("linear", seen, logits, block.weights.linears["ffn_gate_inp"])
    return h, logits


def route(block: Block, logits: Any, ahead: str = "") -> tuple[Any, Any]:
    """Expert ids [T, k], best first, and their weights [T, k]."""
    c = block.config
    ids = block.buffer(ahead + "ids", c.expert_used_count, dtype=np.int32)
    weights = block.buffer(ahead + "weights", c.expert_used_count)
    block.launch(
        "route", logits=logits, scale=c.expert_weights_scale, renormalise=c.renormalise, ids=ids, weights=weights,
        gating=c.gating, by_logit=c.quirks.select_by == "logit", bias=block.weights.vectors.get("exp_probs_b.bias"),
        groups=c.expert_group_count, groups_used=c.expert_group_used_count,
    )  # fmt: skip
    return ids, weights


def routed(block: Block) -> tuple[Any, Any, Any, Any]:
    """What the experts see, h [T, D], the router's logits, and its choice: ids and weights [T, k]."""
    h, logits = router_logits(block)
    return h, logits, *route(block, logits)


def beside(block: Block, h: Any) -> Any:
    """What every token computes beside the routed experts, which see h [T, D]: [T, D], or None if there is nothing."""
    if block.config.quirks.dense_beside:
        x = block.norm(block.run.x, "ffn_norm", block.buffer("dense", block.config.embedding_length))
        return block.norm(block.linear(inner(block, x), "ffn_down"), "post_ffw_norm_1")
    if not block.config.shared:
        return None
    y = block.linear(inner(block, h, "_shexp"), "ffn_down_shexp")
    if block.config.quirks.shared_gate:
        block.launch("sigmoid_gate", x=y, gate=block.linear(h, "ffn_gate_inp_shexp"))
    return y


def join(block: Block, parts: Any, weights: Any, others: Any) -> None:
    """Sum what the experts made, parts [T, k, D], and the others [T, D] or None, into the residual stream."""
    c, x = block.config, block.run.x
    weights = None if c.quirks.weigh == "input" else weights
    if block.is_plain:
        block.launch("combine", parts=parts, weights=weights, out=x, add=True)
        if others is not None:
            block.launch("add", x=others, factor=1.0, out=x)
        return
    y = block.buffer("experts", c.embedding_length)
    block.launch("combine", parts=parts, weights=weights, out=y, add=False)
    if c.quirks.dense_beside:
        block.norm(y, "post_ffw_norm_2")
    if others is not None:
        block.launch("add", x=others, factor=1.0, out=y)
    block.add(y, "post_ffw_norm")
