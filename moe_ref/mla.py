"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): a position is cached as one small vector for all heads.

Keys and values of a head are two projections of that vector, ``attn_k_b`` and ``attn_v_b``, beside a rotated key that
all heads share. Either they are rebuilt and cached head by head (plain), or, as q.(B c) = (q B).c, the projection moves
to the query and to the result (absorbed), and attention runs with a single KV head on the vector. The two agree but for
rounding. llama.cpp absorbs, except in old files that hold both projections as one matrix, ``attn_kv_b``.
"""

from __future__ import annotations

import numpy as np

from moe_ref.attention import attend, heated, visible
from moe_ref.block import Block
from moe_ref.kv import KV
from moe_ref.rope import Tables


def mla(block: Block, x: np.ndarray, positions: np.ndarray, rope: Tables, kv: KV, absorbed: bool = True) -> np.ndarray:
    """One layer's attention: x [T, D] at ``positions`` [T] -> [T, D]; ``kv`` receives what is cached."""
    layer, absorbed = block.layer, absorbed and not block.has("attn_kv_b")
    q, q_rot = queries(block, x, rope)  # [T, H, plain], [T, H, rot]
    latent, k_rot = latents(block, x, rope)  # [T, 1, rank], [T, 1, rot]
    if absorbed:
        q, k, v = per_head(block, q, "attn_k_b"), latent, latent  # q: [T, H, rank]
    else:
        k, v = rebuilt(block, latent)  # [T, H, plain], [T, H, V]
        k_rot = np.broadcast_to(k_rot, (*k.shape[:2], k_rot.shape[-1]))
    keys, values, at = kv.append(np.concatenate([k, k_rot], axis=-1), v, positions[0])
    q = heated(block, np.concatenate([q, q_rot], axis=-1), positions)
    mixed = attend(q, keys, values, layer.scale, visible(positions, at, layer.window), kept=kv.kept)
    mixed = per_head(block, mixed, "attn_v_b") if absorbed else mixed  # [T, H, V]
    return block.linear(mixed.reshape(len(x), -1), "attn_output")


def queries(block: Block, x: np.ndarray, rope: Tables) -> tuple[np.ndarray, np.ndarray]:
    """The two parts of each head's query: plain [T, H, K - rot] and rotated [T, H, rot]."""
    if block.has("attn_q_a"):
        q = block.linear(block.norm(block.linear(x, "attn_q_a"), "attn_q_a_norm"), "attn_q_b")
    else:
        q = block.linear(x, "attn_q")
    q = q.reshape(len(x), block.layer.head_count, -1)
    plain = block.layer.key_length - 2 * rope[0].shape[1]
    return q[..., :plain], block.rotate(q[..., plain:], rope)


def latents(block: Block, x: np.ndarray, rope: Tables) -> tuple[np.ndarray, np.ndarray]:
    """All there is of a position: the normalised latent [T, 1, rank] and the key that all heads share [T, 1, rot]."""
    both = block.linear(x, "attn_kv_a_mqa")[:, None, :]
    rank = block.mla.kv_lora_rank
    return block.norm(both[..., :rank], "attn_kv_a_norm"), block.rotate(both[..., rank:], rope)


def per_head(block: Block, x: np.ndarray, name: str) -> np.ndarray:
    """x [T, H, in] times each head's own matrix: [T, H, out]."""
    return np.stack([block.linear(x[:, h], name, h) for h in range(block.layer.head_count)], axis=1)


def rebuilt(block: Block, latent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unrotated keys [T, H, plain] and values [T, H, V] of every head from latents [T, 1, rank]."""
    heads, width = block.layer.head_count, block.layer.value_length
    if block.has("attn_kv_b"):  # per head first K's rows, then V's
        both = block.linear(latent[:, 0], "attn_kv_b").reshape(len(latent), heads, -1)
        return both[..., :-width], both[..., -width:]
    k = np.einsum("tr,hrp->thp", latent[:, 0], block.vector("attn_k_b.weight"))
    return k, per_head(block, np.broadcast_to(latent, (len(latent), heads, latent.shape[-1])), "attn_v_b")
