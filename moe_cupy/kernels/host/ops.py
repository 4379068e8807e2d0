"""The ops of the kernel table on the host: each prepares arguments and splits rows over threads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moe_cupy.kernels.host import layer, matmul
from moe_cupy.kernels.matrix import Matrix

Split = Callable[..., None]
Chosen = tuple[np.ndarray, np.ndarray]  # token indices [n] and ranks [n] of the tokens that chose an expert


def _multiply(split: Split, x: np.ndarray, w: Matrix, y: np.ndarray) -> None:
    kind, row_bytes = matmul.layout(w)
    split(matmul.matmul_rows, w.rows, w.cols * len(x), kind, row_bytes, w.data, x, y)


def embed(split: Split, table: Matrix, ids: np.ndarray, out: np.ndarray) -> None:
    """out[t] = table[ids[t]]; ids int64 [T], out [T, D]."""
    kind, row_bytes = matmul.layout(table)
    split(matmul.embed_rows, len(ids), table.cols, kind, row_bytes, table.data, ids, out)


def rms_norm(split: Split, x: np.ndarray, weight: np.ndarray, epsilon: float, out: np.ndarray) -> None:
    """out = rms_norm(x) * weight over the last axis; x [n, width] or [T, heads, width]."""
    width = x.shape[-1]
    layer.rms_norm(x.reshape(-1, width), weight, np.float32(epsilon), out.reshape(-1, width))


def linear(split: Split, x: np.ndarray, w: Matrix, out: np.ndarray) -> None:
    """out = x W^T; x [T, cols], out [T, rows]."""
    _multiply(split, x, w, out)


def linear_add(split: Split, x: np.ndarray, w: Matrix, out: np.ndarray) -> None:
    """out += x W^T: a projection back into the residual stream."""
    y = np.empty_like(out)
    _multiply(split, x, w, y)
    out += y


def rope(split: Split, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, style: str) -> None:
    """Rotate x [T, heads, K] in place."""
    layer.rope(x, cos, sin, style == "neox")


def kv_store(split: Split, cache: np.ndarray, new: np.ndarray, position: int) -> None:
    """cache[position:position+T] = new, rounded to the cache's type; cache [S, G, K], new [T, G, K]."""
    cache[position : position + len(new)] = new


def attention(
    split: Split, q: np.ndarray, k: np.ndarray, v: np.ndarray, n_past: int, scale: float, out: np.ndarray
) -> None:
    """Causal grouped-query attention; q [T, H, K], caches k and v [S, G, .], out [T, H, V]."""
    n_tokens, heads, width = q.shape
    k, v = (np.asarray(c[: n_past + n_tokens], np.float32) for c in (k, v))
    work = 2 * width * (n_past + n_tokens)
    split(layer.attention, n_tokens * heads, work, q, k, v, np.float32(scale), out)


def route(split: Split, logits: np.ndarray, scale: float, renormalise: bool, ids: np.ndarray, weights: np.ndarray):
    """Router logits [T, E] -> ids int64 [T, k], best first, and weights [T, k] (softmax gating)."""
    layer.route_softmax(logits, np.float32(scale), renormalise, ids, weights)


def _swiglu(split: Split, x: np.ndarray, gate: Matrix, up: Matrix, down: Matrix) -> np.ndarray:
    g, u = np.empty((len(x), gate.rows), np.float32), np.empty((len(x), up.rows), np.float32)
    _multiply(split, x, gate, g)
    _multiply(split, x, up, u)
    layer.swiglu(g, u)
    y = np.empty((len(x), down.rows), np.float32)
    _multiply(split, g, down, y)
    return y


def ffn_add(split: Split, x: np.ndarray, gate: Matrix, up: Matrix, down: Matrix, out: np.ndarray) -> None:
    """out += down(silu(gate x) * up x): a dense feed-forward network."""
    out += _swiglu(split, x, gate, up, down)


def expert(
    split: Split, x: np.ndarray, chosen: Chosen, gate: Matrix, up: Matrix, down: Matrix, parts: np.ndarray
) -> None:
    """parts[token, rank] = expert(x[token]) for the chosen (tokens, ranks); x [T, D], parts [T, k, D]."""
    parts[chosen] = _swiglu(split, x[chosen[0]], gate, up, down)


def combine(split: Split, parts: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    """out += sum over rank of weights [T, k] * parts [T, k, D], always in rank order."""
    layer.combine(parts, weights, out)
