"""A model file rewritten: matrices stored together, in the layout of older files, or with other metadata."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf_writer import write_gguf

from moe_ref.gguf import GGUFArray, open_gguf

Stored = dict[str, tuple[str, tuple[int, ...], bytes]]


def rewritten(source: Path, target: Path, change: Callable[[Stored], None], **metadata: Any) -> Path:
    """A copy whose tensors went through ``change``; ``metadata`` replaces keys ("__" stands for a dot)."""
    with open_gguf(source) as file:
        keys = {k: list(v) if isinstance(v, GGUFArray) else v for k, v in file.metadata.items()}
        stored = {n: (t.type, t.shape, file.read(n).tobytes()) for n, t in file.tensors.items()}
    change(stored)
    keys |= {key.replace("__", "."): value for key, value in metadata.items()}
    return write_gguf(target, {k: v for k, v in keys.items() if v is not None}, stored)


def joined(stored: Stored, parts: list[str], axis: int = 0) -> tuple[str, tuple[int, ...], bytes]:
    """Several stored tensors of one type as one, along a NumPy axis that is not the last."""
    kinds, shapes, raws = zip(*(stored.pop(name) for name in parts), strict=True)
    assert len(set(kinds)) == 1
    rows = [np.frombuffer(raw, np.uint8).reshape(*shape[:-1], -1) for raw, shape in zip(raws, shapes, strict=True)]
    whole = np.concatenate(rows, axis=axis)
    return kinds[0], (*whole.shape[:-1], shapes[0][-1]), whole.tobytes()


def fuse_attention(stored: Stored) -> None:
    for block in sorted({n.rpartition(".attn_k.")[0] for n in stored if ".attn_k." in n}):
        for end in ("weight", "bias"):
            if f"{block}.attn_k.{end}" in stored:
                parts = [f"{block}.attn_{p}.{end}" for p in "qkv"]
                join = joined_vectors if len(stored[parts[0]][1]) == 1 else joined
                stored[f"{block}.attn_qkv.{end}"] = join(stored, parts)


def joined_vectors(stored: Stored, parts: list[str]) -> tuple[str, tuple[int, ...], bytes]:
    kinds, shapes, raws = zip(*(stored.pop(name) for name in parts), strict=True)
    return kinds[0], (sum(s[0] for s in shapes),), b"".join(raws)


def fuse_experts(stored: Stored) -> None:
    for name in [n for n in stored if n.endswith(".ffn_gate_exps.weight")]:
        up = name.replace("gate", "up")
        stored[name.replace("gate", "gate_up")] = joined(stored, [name, up], axis=1)


def merge_kv_b(stored: Stored) -> None:
    """The layout before the split, [H (plain + V), rank]: per head the rows that make keys, then those for values."""
    for name in [n for n in stored if n.endswith(".attn_k_b.weight")]:
        kind, (heads, rank, plain), raw = stored.pop(name)
        k_b = np.frombuffer(raw, "<u2").reshape(heads, rank, plain).transpose(0, 2, 1)
        _, (_, value, _), raw = stored.pop(name.replace("attn_k_b", "attn_v_b"))
        whole = np.concatenate([k_b, np.frombuffer(raw, "<u2").reshape(heads, value, rank)], axis=1)
        stored[name.replace("attn_k_b", "attn_kv_b")] = (kind, (heads * (plain + value), rank), whole.tobytes())


def interleave_delta(stored: Stored, key_heads: int) -> None:
    """qwen3next before attn_qkv and attn_gate: per key head its q, its k, and v and z of the value heads it serves."""
    for name in [n for n in stored if n.endswith(".attn_gate.weight")]:
        kind, (value_rows, width), z = stored.pop(name)
        _, (rows, _), qkv = stored.pop(name.replace("attn_gate", "attn_qkv"))
        key_rows = (rows - value_rows) // 2
        whole = np.frombuffer(qkv, np.uint8).reshape(rows, -1)
        parts = [whole[:key_rows], whole[key_rows : 2 * key_rows], whole[2 * key_rows :],
                 np.frombuffer(z, np.uint8).reshape(value_rows, -1)]  # fmt: skip
        by_head = np.concatenate([part.reshape(key_heads, -1, whole.shape[1]) for part in parts], axis=1)
        stored[name.replace("attn_gate", "ssm_in")] = (kind, (rows + value_rows, width), by_head.tobytes())
