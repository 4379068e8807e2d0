"""Tiny random models for tests: any shape, any mix of formats, deterministic from a seed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_cupy.kernels.samples import random_matrix
from tests.gguf_writer import write_gguf


@dataclass(frozen=True)
class Shape:
    """Hyper-parameters of a tiny model; ``expert_types`` are those of (gate, up, down), layer by layer in turn."""

    layers: int = 3
    experts: int = 6
    used: int = 2
    width: int = 64
    inner: int = 32
    heads: int = 4
    kv_heads: int = 2
    head: int = 16
    vocab: int = 96
    dense_type: str = "F32"
    expert_types: tuple[tuple[str, str, str], ...] = (("F32", "F32", "F32"),)
    tied: bool = False
    freq_base: float = 10000.0


def metadata(s: Shape) -> dict[str, Any]:
    """Keys of a qwen3moe file of this shape."""
    return {
        "general.architecture": "qwen3moe",
        "qwen3moe.block_count": s.layers,
        "qwen3moe.context_length": 128,
        "qwen3moe.embedding_length": s.width,
        "qwen3moe.attention.head_count": s.heads,
        "qwen3moe.attention.head_count_kv": s.kv_heads,
        "qwen3moe.attention.key_length": s.head,
        "qwen3moe.attention.value_length": s.head,
        "qwen3moe.rope.freq_base": s.freq_base,
        "qwen3moe.attention.layer_norm_rms_epsilon": 1e-6,
        "qwen3moe.expert_count": s.experts,
        "qwen3moe.expert_used_count": s.used,
    }


def tensors(s: Shape, seed: int) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Random tensors; norms near one, matrices large enough that routing is decided."""
    rng = np.random.default_rng(seed)
    made: dict[str, tuple[str, tuple[int, ...], bytes]] = {}

    def vector(name: str, n: int) -> None:
        made[name] = ("F32", (n,), rng.normal(1, 0.2, n).astype("<f4").tobytes())

    def matrix(name: str, kind: str, *shape: int) -> None:
        rows = int(np.prod(shape[:-1]))
        made[name] = (kind, shape, random_matrix(rng, kind, rows, shape[-1]).data.tobytes())

    def router(name: str) -> None:
        made[name] = ("F32", (s.experts, s.width), rng.normal(0, 0.5, (s.experts, s.width)).astype("<f4").tobytes())

    matrix("token_embd.weight", "F32", s.vocab, s.width)
    vector("output_norm.weight", s.width)
    if not s.tied:
        matrix("output.weight", s.dense_type, s.vocab, s.width)
    for layer in range(s.layers):
        block, types = f"blk.{layer}.", s.expert_types[layer % len(s.expert_types)]
        for name in ("attn_norm", "ffn_norm"):
            vector(f"{block}{name}.weight", s.width)
        for name in ("attn_q_norm", "attn_k_norm"):
            vector(f"{block}{name}.weight", s.head)
        matrix(block + "attn_q.weight", s.dense_type, s.heads * s.head, s.width)
        matrix(block + "attn_k.weight", s.dense_type, s.kv_heads * s.head, s.width)
        matrix(block + "attn_v.weight", s.dense_type, s.kv_heads * s.head, s.width)
        matrix(block + "attn_output.weight", s.dense_type, s.width, s.heads * s.head)
        router(block + "ffn_gate_inp.weight")
        matrix(block + "ffn_gate_exps.weight", types[0], s.experts, s.inner, s.width)
        matrix(block + "ffn_up_exps.weight", types[1], s.experts, s.inner, s.width)
        matrix(block + "ffn_down_exps.weight", types[2], s.experts, s.width, s.inner)
    return made


def tiny_moe(path: str | os.PathLike, shape: Shape = Shape(), seed: int = 0, zero: tuple[str, ...] = ()) -> Any:
    """Write a tiny model; tensors whose name contains one of ``zero`` are all zeros. Returns ``path``."""
    made = tensors(shape, seed)
    for name, (kind, dims, raw) in made.items():
        if any(part in name for part in zero):
            made[name] = (kind, dims, bytes(len(raw)))
    write_gguf(path, metadata(shape), made)
    return path
