"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): a position is cached as one small vector for all heads.

Keys and values of a head are two projections of that vector, ``attn_k_b`` and ``attn_v_b``, beside a rotated key that
all heads share. Either they are rebuilt (plain), or, as q.(B c) = (q B).c, the projection moves to the query and to the
result (absorbed), and attention runs with a single KV head on what is cached. The two agree but for rounding.
"""

from __future__ import annotations

import numpy as np

from moe_ref.attention import attend, heated, visible
from moe_ref.block import Block
from moe_ref.kv import KV
from moe_ref.layers import Layer
from moe_ref.rope import Tables


def mla(
    block: Block, x: np.ndarray, positions: np.ndarray, rope: Tables, kv: KV, absorbed: bool = True
) -> np.ndarray:
    """One layer's attention: x [T, D] at ``positions`` [T] -> [T, D]; ``kv`` receives [latent, rotated key]."""
    layer = block.layer
    q, q_rot = queries(block, x, rope)  # [T, H, plain], [T, H, rot]
    latent, k_rot = latents(block, x, rope)  # [T, 1, rank], [T, 1, rot]
    keys, values, at = kv.append(np.concatenate([latent, k_rot], axis=-1), latent, positions[0])
    seen = visible(positions, at, layer.window)
    if absorbed:
        q = np.concatenate([per_head(block, q, "attn_k_b"), q_rot], axis=-1)  # [T, H, rank + rot]
        mixed = attend(kv.as_query(heated(block, q, positions)), keys, values, layer.scale, seen)  # [T, H, rank]
        mixed = per_head(block, kv.as_mixed(mixed), "attn_v_b")  # [T, H, V]
    else:
        q = np.concatenate([q, q_rot], axis=-1)
        mixed = attend(heated(block, q, positions), *rebuilt(block, keys, values), layer.scale, seen)
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
    """What is cached: the normalised latent [T, 1, rank] and the key that all heads share [T, 1, rot]."""
    both = block.linear(x, "attn_kv_a_mqa")[:, None, :]
    rank = block.mla.kv_lora_rank
    return block.norm(both[..., :rank], "attn_kv_a_norm"), block.rotate(both[..., rank:], rope)


def per_head(block: Block, x: np.ndarray, name: str) -> np.ndarray:
    """x [T, H, in] times each head's own matrix: [T, H, out]."""
    if block.has("attn_kv_b"):
        return np.einsum("thi,hoi->tho", x, split_kv_b(block)[name])
    return np.stack([block.linear(x[:, h], name, h) for h in range(block.layer.head_count)], axis=1)


def split_kv_b(block: Block) -> dict[str, np.ndarray]:
    """The matrices of a file that stores them as one."""
    whole = block.vector("attn_kv_b.weight")
    return dict(zip(("attn_k_b", "attn_v_b"), split_rows(whole, block.layer), strict=True))


def split_rows(whole: np.ndarray, layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """[H * (plain + V), rank] -> [H, rank, plain], [H, V, rank]: per head first K's rows, transposed, then V's."""
    by_head = whole.reshape(layer.head_count, -1, whole.shape[1])  # [H, plain + V, rank]
    plain = by_head.shape[1] - layer.value_length
    return by_head[:, :plain].transpose(0, 2, 1), by_head[:, plain:]


def rebuilt(block: Block, keys: np.ndarray, latent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys [S, H, K] and values [S, H, V] of every head from what is cached, [S, 1, rank + rot] and [S, 1, rank]."""
    parts = split_kv_b(block) if block.has("attn_kv_b") else {
        name: block.vector(name + ".weight") for name in ("attn_k_b", "attn_v_b")
    }  # fmt: skip
    heads, rank = block.layer.head_count, latent.shape[-1]
    plain = np.einsum("sr,hrp->shp", latent[:, 0], parts["attn_k_b"])
    rotated = np.broadcast_to(keys[..., rank:], (len(keys), heads, keys.shape[-1] - rank))
    return np.concatenate([plain, rotated], axis=-1), np.einsum("sr,hvr->shv", latent[:, 0], parts["attn_v_b"])
