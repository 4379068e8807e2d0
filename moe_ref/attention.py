"""Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245) over a KV cache."""

from __future__ import annotations

import numpy as np

from moe_ref.block import Block
from moe_ref.config import ModelConfig
from moe_ref.finite import nan_unless_finite
from moe_ref.kv import KV
from moe_ref.kv_types import FLOAT32, Kept
from moe_ref.layers import Layer
from moe_ref.rope import Tables


def softmax(x: np.ndarray) -> np.ndarray:
    """Softmax over the last axis; the maximum is taken out first so that exp cannot overflow."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """``1 / (1 + exp(-x))``; exp may overflow to infinity, which gives the right limit 0."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def visible(queries: np.ndarray, keys: np.ndarray, window: int = 0, chunked: bool = False) -> np.ndarray:
    """Which positions each query sees: itself and those before it, in its window or chunk if there is one.

    Positions of queries [T] and keys [S] -> bool [T, S].
    """
    t, s = queries[:, None], keys[None, :]
    seen = s <= t
    if window and chunked:
        return seen & (s >= t // window * window)
    return seen & (t - s < window) if window else seen


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: float,
    seen: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    kept: Kept = FLOAT32,
) -> np.ndarray:
    """Attention of T queries over S positions; several query heads share a KV head.

    q [T, H, K], k [S, G, K], v [S, G, V] -> [T, H, V]. ``seen`` [T, S], by default causal with the queries at the last
    T positions. ``sinks`` [H] are logits of one more position each, which takes its share and has no value. ``kept``
    says what k and v were rounded to, which has a say in the arithmetic.
    """
    q = nan_unless_finite(kept.as_query(q))  # else a score of minus infinity would hide it
    n_tokens, n_heads, _ = q.shape
    n_positions, n_groups, _ = k.shape
    if seen is None:
        seen = visible(np.arange(n_positions - n_tokens, n_positions), np.arange(n_positions))
    q = q.reshape(n_tokens, n_groups, n_heads // n_groups, -1).transpose(1, 2, 0, 3)  # [G, H/G, T, K]
    scores = q @ k.transpose(1, 2, 0)[:, None] * q.dtype.type(scale)  # [G, H/G, T, S]
    scores = np.where(seen, scores, -np.inf)
    if sinks is not None:
        sink = np.broadcast_to(sinks.reshape(n_groups, -1, 1, 1), (*scores.shape[:3], 1))
        scores = np.concatenate([scores, sink], axis=-1)
    share = softmax(scores)[..., :n_positions].astype(q.dtype)
    mixed = kept.as_share(share) @ v.transpose(1, 0, 2)[:, None]  # [G, H/G, T, V]
    return kept.as_mixed(mixed.transpose(2, 0, 1, 3).reshape(n_tokens, n_heads, -1))


def clamped(x: np.ndarray, limit: float) -> np.ndarray:
    """x within -limit..limit; 0 is no limit."""
    return np.clip(x, -limit, limit) if limit else x


def heads(block: Block, x: np.ndarray, part: str, count: int) -> np.ndarray:
    """Project x [T, D] to the heads of q or k [T, count, K]; olmoe normalises the whole row before it is split."""
    y = clamped(block.linear(x, f"attn_{part}"), block.config.clamp_kqv)
    if block.config.qk_norm == "row":
        y = block.norm(y, f"attn_{part}_norm")
    return y.reshape(len(x), count, -1)


def placed(block: Block, y: np.ndarray, part: str, rope: Tables | None) -> np.ndarray:
    """Heads [T, H, K] normalised, where the file has weights for it, and turned by their positions."""
    if block.config.qk_norm == "head" and block.has(f"attn_{part}_norm"):
        y = block.norm(y, f"attn_{part}_norm")
    if rope is None:
        return y
    y = block.rotate(y, rope)
    return block.unit_norm(y) if block.config.qk_norm == "unit" else y


def values(block: Block, x: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """v [T, G, V]: projected from x [T, D], or the keys, before their norm, where gemma4 has no matrix for it."""
    layer, c = block.layer, block.config
    if block.has("attn_v"):
        v = clamped(block.linear(x, "attn_v"), c.clamp_kqv).reshape(len(x), layer.head_count_kv, layer.value_length)
    else:
        v = keys
    return block.unit_norm(v) if c.quirks.value_norm else v


def temperature(c: ModelConfig, layer: Layer, positions: np.ndarray) -> np.ndarray | None:
    """Factor on q [T] that grows with the logarithm of the position, where the layer has no rotary positions."""
    if c.temperature is None or (c.quirks.no_rope_every and layer.rope is not None):
        return None
    scale, step, offset = c.temperature
    return 1 + scale * np.log(np.floor((positions + offset) / step) + 1)


def heated(block: Block, q: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Queries [T, H, K] times the temperature of their positions."""
    factor = temperature(block.config, block.layer, positions)
    return q if factor is None else (q * factor[:, None, None]).astype(q.dtype)


def attention(block: Block, x: np.ndarray, positions: np.ndarray, rope: Tables | None, kv: KV) -> np.ndarray:
    """One layer's attention: x [T, D] at ``positions`` [T] -> [T, D]; its keys and values go into ``kv``."""
    layer, c = block.layer, block.config
    q = heads(block, x, "q", layer.head_count)  # [T, H, K], or [T, H, 2K] with the gate behind
    q, gate = np.split(q, 2, axis=-1) if c.quirks.output_gate else (q, None)
    k = heads(block, x, "k", layer.head_count_kv)  # [T, G, K]
    v = values(block, x, k)
    q, k = placed(block, q, "q", rope), placed(block, k, "k", rope)
    keys, past, at = kv.append(k, v, positions[0])  # [S, G, K], [S, G, V], [S]
    sinks = block.vector("attn_sinks.weight") if c.quirks.sinks else None
    seen = visible(positions, at, layer.window, layer.chunked)
    mixed = attend(heated(block, q, positions), keys, past, layer.scale, seen, sinks, kv.kept)  # [T, H, V]
    if gate is not None:
        mixed = mixed * sigmoid(gate)
    return block.linear(mixed.reshape(len(x), -1), "attn_output")
