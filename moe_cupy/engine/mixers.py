"""How tokens see each other: the three mixers as launches, each from x [T, D] to what its last matrix takes.

The formulas are those of ``moe_ref``'s attention.py, mla.py and deltanet.py, whose names are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_cupy.engine.block import UNIT, Block


def attention(block: Block, x: Any) -> Any:
    """Grouped-query attention: [T, H * V]."""
    layer, c, t = block.layer, block.config, block.n_tokens
    q, gate = queries(block, x)
    k = heads(block, x, "k").reshape(t, layer.head_count_kv, layer.key_length)
    v = values(block, x, k)
    placed(block, q, "q")
    placed(block, k, "k")
    keys, past = block.run.kv.layer(layer.index)
    mixed = attend(block, q, (keys, k), (past, v), layer.value_length).reshape(t, -1)
    if c.quirks.output_gate:
        block.launch("sigmoid_gate", x=mixed, gate=gate.reshape(t, -1))
    return mixed


def heads(block: Block, x: Any, part: str) -> Any:
    """Project x to q or k, [T, rows]; the whole row is normalised where the architecture does that."""
    y = clamped(block, block.linear(x, f"attn_{part}"))
    return block.norm(y, f"attn_{part}_norm") if block.config.qk_norm == "row" else y


def clamped(block: Block, y: Any) -> Any:
    if block.config.clamp_kqv:
        block.launch("clamp", x=y, limit=block.config.clamp_kqv)
    return y


def queries(block: Block, x: Any) -> tuple[Any, Any]:
    """q [T, H, K], and the gate of the output [T, H, K] that stands behind each head's query, if there is one."""
    layer, t = block.layer, block.n_tokens
    shape = (t, layer.head_count, layer.key_length)
    y = heads(block, x, "q")
    if not block.config.quirks.output_gate:
        return y.reshape(shape), None
    both = y.reshape(t * layer.head_count, -1)
    q, gate = block.split(both, {"query": layer.key_length, "gate": layer.key_length})
    return q.reshape(shape), gate.reshape(shape)


def values(block: Block, x: Any, k: Any) -> Any:
    """v [T, G, V]: a projection of x, or the keys k [T, G, K] before their norm; some are normalised."""
    layer = block.layer
    if "attn_v" not in block.weights.linears:
        return block.normalise(k, UNIT, block.buffer("values", layer.head_count_kv, layer.value_length))
    v = clamped(block, block.linear(x, "attn_v")).reshape(-1, layer.head_count_kv, layer.value_length)
    return block.normalise(v, UNIT) if block.config.quirks.value_norm else v


def placed(block: Block, y: Any, part: str) -> None:
    """Heads [T, H, K] normalised, where the file has weights for it, and turned by their positions, in place."""
    if block.config.qk_norm == "head" and f"attn_{part}_norm" in block.weights.norms:
        block.norm(y, f"attn_{part}_norm")
    if block.layer.rope is not None:
        block.rotate(y)
        if block.config.qk_norm == "unit":
            block.normalise(y, UNIT)


def attend(block: Block, q: Any, keys: tuple[Any, Any], past: tuple[Any, Any], width: int) -> Any:
    """Store the new keys and values, both given as (cache, new), and mix what q sees: [T, H, width].

    A quantized cache holds them rotated, which spreads outliers: queries are turned likewise, the mixture back.
    """
    layer, run = block.layer, block.run
    by_key, by_value = run.kv.rotations(layer.index)
    for x, count in ((q, by_key), (keys[1], by_key), (past[1], by_value)):
        if count:
            block.launch("hadamard", x=x, count=count)
    block.launch("kv_store", cache=keys[0], new=keys[1], position=run.kv.length)
    if past[0] is not keys[0]:
        block.launch("kv_store", cache=past[0], new=past[1], position=run.kv.length)
    out = block.buffer("mixed", layer.head_count, width)
    block.launch(
        "attention", q=q, k=keys[0], v=past[0], n_past=run.kv.length, scale=layer.scale, out=out, window=layer.window,
        chunked=layer.chunked, sinks=block.weights.vectors.get("attn_sinks.weight"),
        temperature=run.temperature.get(layer.index),
    )  # fmt: skip
    if by_value:
        block.launch("hadamard", x=out, count=by_value)
    return out


def latent_attention(block: Block, x: Any) -> Any:
    """Multi-head latent attention, absorbed: attention runs on the cached latents, [T, H * V]."""
    layer, rank, t = block.layer, block.mla.kv_lora_rank, block.n_tokens
    assert layer.rope is not None
    plain, n_rot = layer.key_length - layer.rope.n_rot, layer.rope.n_rot
    q = latent_queries(block, x).reshape(t, layer.head_count, layer.key_length)
    block.rotate(q, plain)
    absorbed = block.buffer("absorbed", layer.head_count, rank + n_rot)
    block.heads(q, "attn_k_b", absorbed)
    rows = absorbed.reshape(-1, rank + n_rot)
    block.launch("columns", x=q.reshape(-1, layer.key_length), first=plain, out=rows, at=rank, count=n_rot)
    latent = block.linear(x, "attn_kv_a_mqa").reshape(t, 1, rank + n_rot)
    block.norm(latent, "attn_kv_a_norm")  # its weight is as long as the latent: the key behind it stays
    block.rotate(latent, rank)
    cache, _ = block.run.kv.layer(layer.index)
    mixed = attend(block, absorbed, (cache, latent), (cache, latent), rank)
    out = block.buffer("unabsorbed", layer.head_count, layer.value_length)
    block.heads(mixed, "attn_v_b", out)
    return out.reshape(t, -1)


def latent_queries(block: Block, x: Any) -> Any:
    """[T, H * K]: projected directly, or through a normalised vector of lower rank."""
    if "attn_q_a" not in block.weights.linears:
        return block.linear(x, "attn_q")
    return block.linear(block.norm(block.linear(x, "attn_q_a"), "attn_q_a_norm"), "attn_q_b")


def delta_net(block: Block, x: Any) -> Any:
    """The gated delta net, [T, Hv * S]; its state is read from one copy and written to the other."""
    d, t, vectors = block.delta, block.n_tokens, block.weights.vectors
    mixed, z = projections(block, x)
    (inputs, matrix), (new_inputs, new_matrix) = block.run.kv.state(block.layer.index)
    convolved = block.buffer("convolved", mixed.shape[1])
    kernel = vectors["ssm_conv1d.weight"]
    block.launch("convolve", x=mixed, before=inputs, kernel=kernel, after=new_inputs, out=convolved)
    fade, share = gates(block, x)
    out = block.buffer("recurred", d.time_step_rank, d.state_size)
    block.launch(
        "delta_rule", qkv=convolved, fade=fade, share=share, key_heads=d.group_count, out=out, before=matrix,
        after=new_matrix, epsilon=block.config.norm_epsilon, tiled=block.config.quirks.recurrent == "tile",
    )  # fmt: skip
    block.normalise(out, block.weights.norms["ssm_norm"])
    block.launch("activate", gate=z, up=out.reshape(t, -1), kind="silu")
    return z


def projections(block: Block, x: Any) -> tuple[Any, Any]:
    """q, k and v side by side [T, channels], and the output gate z [T, Hv * S]; old files interleave them by head."""
    d, t = block.delta, block.n_tokens
    if "ssm_in" not in block.weights.linears:
        return block.linear(x, "attn_qkv"), block.linear(x, "attn_gate")
    served = d.value_width // d.group_count
    by_head = block.linear(x, "ssm_in").reshape(t * d.group_count, -1)
    q, k, v, z = block.split(by_head, {"q": d.state_size, "k": d.state_size, "v": served, "z": served})
    mixed, first = block.buffer("qkv", 2 * d.key_width + d.value_width), 0
    for part in (q.reshape(t, -1), k.reshape(t, -1), v.reshape(t, -1)):
        block.launch("columns", x=part, first=0, out=mixed, at=first, count=part.shape[1])
        first += part.shape[1]
    return mixed, z.reshape(t, -1)


def gates(block: Block, x: Any) -> tuple[Any, Any]:
    """How much of the matrix is left, and how much of the correction is taken, both [T, Hv]."""
    d, t, vectors = block.delta, block.n_tokens, block.weights.vectors
    if "ssm_ba" in block.weights.linears:  # for each key head: beta, then alpha, of the value heads it serves
        by_head = block.linear(x, "ssm_ba").reshape(t * d.group_count, -1)
        served = by_head.shape[1] // 2
        beta, alpha = (part.reshape(t, -1) for part in block.split(by_head, {"beta": served, "alpha": served}))
    else:
        beta, alpha = block.linear(x, "ssm_beta"), block.linear(x, "ssm_alpha")
    fade, share = block.buffer("fade", d.time_step_rank), block.buffer("share", d.time_step_rank)
    dt, a = vectors["ssm_dt.bias"], vectors["ssm_a"]
    block.launch("delta_gates", alpha=alpha, beta=beta, dt=dt, a=a, fade=fade, share=share)
    return fade, share


MIXERS: dict[str, tuple[Callable[[Block, Any], Any], str]] = {  # and the matrix that leads back
    "gqa": (attention, "attn_output"),
    "mla": (latent_attention, "attn_output"),
    "delta": (delta_net, "ssm_out"),
}
