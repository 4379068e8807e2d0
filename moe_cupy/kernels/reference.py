"""What is right, op by op: the same buffers as the kernels, computed in float64 by ``moe_ref``'s functions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from moe_cupy.kernels.matrix import Matrix
from moe_ref.attention import attend
from moe_ref.experts import swiglu
from moe_ref.norm import rms_norm as ref_rms_norm
from moe_ref.quants import dequantize
from moe_ref.rope import apply_rope
from moe_ref.routing import route as ref_route


def expand(w: Matrix) -> np.ndarray:
    """A quantized matrix as float64 [rows, cols]."""
    return dequantize(w.data, w.type, (w.rows, w.cols)).astype(np.float64)


def embed(table: Matrix, ids: np.ndarray, out: np.ndarray) -> None:
    out[...] = expand(table)[ids]


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float, out: np.ndarray) -> None:
    out[...] = ref_rms_norm(x.astype(np.float64), weight.astype(np.float64), epsilon)


def linear(x: np.ndarray, w: Matrix, out: np.ndarray) -> None:
    out[...] = x.astype(np.float64) @ expand(w).T


def linear_add(x: np.ndarray, w: Matrix, out: np.ndarray) -> None:
    out += x.astype(np.float64) @ expand(w).T


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, style: str) -> None:
    x[...] = apply_rope(x.astype(np.float64), cos, sin, style)


def kv_store(cache: np.ndarray, new: np.ndarray, position: int) -> None:
    cache[position : position + len(new)] = new


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, n_past: int, scale: float, out: np.ndarray) -> None:
    seen = n_past + len(q)
    out[...] = attend(q.astype(np.float64), k[:seen].astype(np.float64), v[:seen].astype(np.float64), scale)


def route(logits: np.ndarray, scale: float, renormalise: bool, ids: np.ndarray, weights: np.ndarray) -> None:
    config: Any = SimpleNamespace(
        gating="softmax", renormalise=renormalise, expert_used_count=ids.shape[1], expert_weights_scale=scale,
        expert_group_count=1, quirks=SimpleNamespace(select_by="probability"),
    )  # fmt: skip
    ids[...], weights[...] = ref_route(logits.astype(np.float64), config)


def ffn_add(x: np.ndarray, gate: Matrix, up: Matrix, down: Matrix, out: np.ndarray) -> None:
    out += swiglu(x.astype(np.float64), (expand(gate), expand(up), expand(down)))


def expert(x: np.ndarray, chosen: Any, gate: Matrix, up: Matrix, down: Matrix, parts: np.ndarray) -> None:
    tokens, ranks = chosen
    parts[tokens, ranks] = swiglu(x[tokens].astype(np.float64), (expand(gate), expand(up), expand(down)))


def combine(parts: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    out += np.einsum("tk,tkd->td", weights.astype(np.float64), parts.astype(np.float64))
