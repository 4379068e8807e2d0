"""A tiny DeepSeek-like model whose latent vector and heads are whole blocks of 32: its cache can be quantized."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from gguf_writer import write_gguf

LAYERS, WIDTH, INNER, VOCAB, HEADS, Q_RANK, RANK, ROT, PLAIN, VALUE = 2, 64, 96, 384, 2, 48, 64, 32, 32, 32


def keys(old: bool) -> dict[str, Any]:
    """Metadata; old files know nothing of a head's widths but those of rebuilt keys and values."""
    widths = {"attention.key_length": PLAIN + ROT, "attention.value_length": VALUE}
    if not old:
        widths = {"attention.key_length": RANK + ROT, "attention.value_length": RANK}
        widths |= {"attention.key_length_mla": PLAIN + ROT, "attention.value_length_mla": VALUE}
    numbers = {
        "block_count": LAYERS, "context_length": 64, "embedding_length": WIDTH, "feed_forward_length": INNER,
        "attention.head_count": HEADS, "attention.head_count_kv": HEADS if old else 1, "vocab_size": VOCAB,
        "attention.q_lora_rank": Q_RANK, "attention.kv_lora_rank": RANK, "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": ROT, "rope.freq_base": 10000.0, "leading_dense_block_count": LAYERS,
        "expert_count": 2, "expert_used_count": 1, "expert_shared_count": 1, "expert_feed_forward_length": INNER,
        "expert_weights_scale": 1.0, "expert_gating_func": 1,
    }  # fmt: skip
    general = {"general.architecture": "deepseek2", "tokenizer.ggml.model": "none"}
    return general | {f"deepseek2.{key}": value for key, value in (numbers | widths).items()}


def latent_model(path: str | os.PathLike, old: bool = False) -> Path:
    """Write it, always the same, all float32; ``old``: with both projections as one matrix. Returns the path."""
    rng, made = np.random.default_rng(11), {}

    def put(name: str, array: np.ndarray) -> None:
        made[name + ".weight"] = ("F32", array.shape, array.astype("<f4").tobytes())

    def matrix(name: str, *shape: int) -> None:
        put(name, rng.normal(0, 1.4 * shape[-1] ** -0.5, shape))

    matrix("token_embd", VOCAB, WIDTH)
    matrix("output", VOCAB, WIDTH)
    put("output_norm", rng.normal(1, 0.1, WIDTH))
    for block in (f"blk.{i}." for i in range(LAYERS)):
        norms = {"attn_norm": WIDTH, "ffn_norm": WIDTH, "attn_q_a_norm": Q_RANK, "attn_kv_a_norm": RANK}
        for name, width in norms.items():
            put(block + name, rng.normal(1, 0.1, width))
        matrix(block + "attn_q_a", Q_RANK, WIDTH)
        matrix(block + "attn_q_b", HEADS * (PLAIN + ROT), Q_RANK)
        matrix(block + "attn_kv_a_mqa", RANK + ROT, WIDTH)
        matrix(block + "attn_output", WIDTH, HEADS * VALUE)
        both = rng.normal(0, 1.4 * RANK**-0.5, (HEADS, PLAIN + VALUE, RANK))
        if old:
            put(block + "attn_kv_b", both.reshape(-1, RANK))
        else:
            put(block + "attn_k_b", both[:, :PLAIN].transpose(0, 2, 1))
            put(block + "attn_v_b", both[:, PLAIN:])
        matrix(block + "ffn_gate", INNER, WIDTH)
        matrix(block + "ffn_up", INNER, WIDTH)
        matrix(block + "ffn_down", WIDTH, INNER)
    return write_gguf(path, keys(old), made)
