"""Gated delta net (Yang et al. 2024, arXiv 2412.06464): attention that keeps one matrix a head instead of a KV cache.

A token first fades the matrix, then corrects what it answers to the token's key towards the token's value::

    S <- exp(g) S;   S <- S + k (x) beta (v - k.S);   output = q.S / sqrt(width)
"""

from __future__ import annotations

import numpy as np

from moe_ref.attention import sigmoid
from moe_ref.block import Block
from moe_ref.experts import silu
from moe_ref.kv import Cache
from moe_ref.norm import l2_norm, rms_norm


def delta_net(block: Block, x: np.ndarray, cache: Cache) -> np.ndarray:
    """One recurrent layer: x [T, D] -> [T, D]; its state in ``cache`` moves on by T tokens."""
    d, index = block.delta, block.layer.index
    mixed, z = projections(block, x)  # [T, channels], [T, Hv, width]
    inputs, matrix = cache.state.get(index) or initial_state(block, x.dtype)
    convolved, inputs = convolve(mixed, inputs, block.vector("ssm_conv1d.weight"))
    q, k, v = np.split(silu(convolved), [d.key_width, 2 * d.key_width], axis=-1)
    q, k = (shared_heads(block, y.reshape(len(x), -1, d.state_size)) for y in (q, k))
    fade, beta = gates(block, x)  # [T, Hv] each
    out, matrix = recur(q, k, v.reshape(z.shape), fade, beta, matrix)
    cache.state[index] = inputs, matrix
    out = rms_norm(out, block.vector("ssm_norm.weight"), block.config.norm_epsilon) * silu(z)
    return block.linear(out.reshape(len(x), -1), "ssm_out")


def initial_state(block: Block, dtype) -> tuple[np.ndarray, np.ndarray]:
    """Zeros: the last ``conv_kernel`` - 1 inputs [C - 1, channels], and a matrix for each head [Hv, width, width]."""
    d = block.delta
    matrix = (d.time_step_rank, d.state_size, d.state_size)
    return np.zeros((d.conv_kernel - 1, 2 * d.key_width + d.value_width), dtype), np.zeros(matrix, dtype)


def projections(block: Block, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """q, k and v side by side [T, channels], and the output gate z [T, Hv, width].

    Old qwen3next files interleave them: for each key head its q, its k, and v and z of the value heads it serves.
    """
    d = block.delta
    if not block.has("ssm_in"):
        z = block.linear(x, "attn_gate")
        return block.linear(x, "attn_qkv"), z.reshape(len(x), d.time_step_rank, d.state_size)
    served = d.value_width // d.group_count
    by_head = block.linear(x, "ssm_in").reshape(len(x), d.group_count, -1)
    parts = np.split(by_head, np.cumsum([d.state_size, d.state_size, served]), axis=-1)
    *qkv, z = (part.reshape(len(x), -1) for part in parts)
    return np.concatenate(qkv, axis=-1), z.reshape(len(x), d.time_step_rank, d.state_size)


def convolve(x: np.ndarray, before: np.ndarray, kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each channel's weighted sum of its last C inputs, [T, channels], and the last C - 1 inputs.

    x [T, channels], before [C - 1, channels], kernel [channels, C].
    """
    padded, width = np.concatenate([before, x]), kernel.shape[1]
    total = np.sum([padded[i : i + len(x)] * kernel[:, i] for i in range(width)], axis=0)
    return total, padded[len(padded) - width + 1 :]


def shared_heads(block: Block, y: np.ndarray) -> np.ndarray:
    """Key heads [T, Hk, width], each brought to length one, for every value head [T, Hv, width]."""
    d, y = block.delta, l2_norm(y, block.config.norm_epsilon)
    times = d.time_step_rank // d.group_count
    return np.repeat(y, times, axis=1) if block.config.quirks.recurrent == "repeat" else np.tile(y, (1, times, 1))


def gates(block: Block, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much of the matrix is left, exp(g) with g = -softplus(alpha + dt) e^A, and beta, both [T, Hv]."""
    d = block.delta
    if block.has("ssm_ba"):  # for each key head: beta, then alpha, of the value heads it serves
        by_head = block.linear(x, "ssm_ba").reshape(len(x), d.group_count, 2, -1)
        beta, alpha = (by_head[:, :, i].reshape(len(x), -1) for i in range(2))
    else:
        beta, alpha = block.linear(x, "ssm_beta"), block.linear(x, "ssm_alpha")
    softplus = np.logaddexp(0, alpha + block.vector("ssm_dt.bias"))
    return np.exp(softplus * block.vector("ssm_a")).astype(x.dtype), sigmoid(beta)  # ssm_a holds -e^A


def recur(q, k, v, fade, beta, matrix) -> tuple[np.ndarray, np.ndarray]:
    """The rule above, token by token; q, k, v [T, H, width], fade and beta [T, H], matrix [H, key, value]."""
    out = np.empty_like(v)
    for t in range(len(v)):
        matrix = matrix * fade[t, :, None, None]
        answer = np.einsum("hk,hkv->hv", k[t], matrix)
        matrix = matrix + np.einsum("hk,hv->hkv", k[t], (v[t] - answer) * beta[t, :, None])
        out[t] = np.einsum("hk,hkv->hv", q[t], matrix)
    return out * out.dtype.type(q.shape[-1] ** -0.5), matrix
