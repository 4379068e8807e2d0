"""What is right, op by op: the same buffers as the kernels, computed in float64 by ``moe_ref``'s functions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from moe_cupy.kernels.kept import numbers_of, stored
from moe_cupy.kernels.matrix import Matrix
from moe_ref import deltanet
from moe_ref.attention import attend, clamped, sigmoid, visible
from moe_ref.experts import ACTIVATIONS, silu
from moe_ref.kv_types import rotated
from moe_ref.norm import l2_norm, layer_norm, rms_norm
from moe_ref.quants import dequantize
from moe_ref.rope import apply_rope
from moe_ref.routing import route as ref_route


def expand(w: Matrix) -> np.ndarray:
    """A quantized matrix as float64 [rows, cols]."""
    return dequantize(w.data, w.type, (w.rows, w.cols)).astype(np.float64)


def wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)


def product(x: np.ndarray, w: Matrix, scale: float = 1.0, bias: Any = None) -> np.ndarray:
    y = wide(x) @ expand(w).T * scale
    return y if bias is None else y + bias


def embed(table: Matrix, ids: np.ndarray, out: np.ndarray) -> None:
    out[...] = expand(table)[ids]


def linear(x: np.ndarray, w: Matrix, out: np.ndarray, scale: float = 1.0, bias: Any = None) -> None:
    out[...] = product(x, w, scale, bias)


def linear_add(x: np.ndarray, w: Matrix, out: np.ndarray, scale: float = 1.0, bias: Any = None) -> None:
    out += product(x, w, scale, bias)


def linear_heads(x: np.ndarray, w: Matrix, out: np.ndarray, scale: Any = 1.0, bias: Any = None) -> None:
    stack = expand(w).reshape(x.shape[1], -1, w.cols)  # [H, rows, cols]
    y = np.einsum("thi,hoi->tho", wide(x)[..., : w.cols], stack) * np.reshape(scale, (-1, 1))
    out[..., : stack.shape[1]] = y if bias is None else y + bias


def norm(x: Any, weight: Any, epsilon: float, out: Any, bias: Any = None, centred: bool = False) -> None:
    width = x.shape[-1] if weight is None else len(weight)
    gain = np.ones(width) if weight is None else wide(weight)
    y = (layer_norm if centred else rms_norm)(wide(x[..., :width]), gain, epsilon)
    out[..., :width] = y if bias is None else y + bias


def columns(x: np.ndarray, first: int, out: np.ndarray, at: int, count: int) -> None:
    out[:, at : at + count] = x[:, first : first + count]


def scale(x: np.ndarray, factor: float) -> None:
    x *= factor


def add(x: np.ndarray, factor: float, out: np.ndarray) -> None:
    out += factor * wide(x)


def clamp(x: np.ndarray, limit: float) -> None:
    x[...] = clamped(x, limit)


def softcap(x: np.ndarray, limit: float) -> None:
    x[...] = np.tanh(x / limit) * limit


def activate(gate: np.ndarray, up: np.ndarray, kind: str) -> None:
    gate[...] = ACTIVATIONS[kind](wide(gate), wide(up))


def sigmoid_gate(x: np.ndarray, gate: np.ndarray) -> None:
    x *= sigmoid(wide(gate))


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, style: str, first: int = 0) -> None:
    x[..., first:] = apply_rope(wide(x[..., first:]), cos, sin, style)


def hadamard(x: np.ndarray, count: int) -> None:
    x[...] = rotated(wide(x), count)


def kv_store(cache: np.ndarray, new: np.ndarray, position: int) -> None:
    cache[position : position + len(new)] = stored(new, cache)


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, n_past: int, scale: float, out: np.ndarray, *,
    window: int = 0, chunked: bool = False, sinks: Any = None, temperature: Any = None,
) -> None:  # fmt: skip
    seen = n_past + len(q)
    q = wide(q) if temperature is None else wide(q) * wide(temperature)[:, None, None]
    masked = visible(np.arange(n_past, seen), np.arange(seen), window, chunked)
    sinks = None if sinks is None else wide(sinks)
    out[...] = attend(
        q, wide(numbers_of(k[:seen])), wide(numbers_of(v[:seen]))[..., : out.shape[-1]], scale, masked, sinks
    )


def convolve(x: np.ndarray, before: np.ndarray, kernel: np.ndarray, after: np.ndarray, out: np.ndarray) -> None:
    total, after[...] = deltanet.convolve(wide(x), wide(before), wide(kernel))
    out[...] = silu(total)


def delta_gates(alpha: Any, beta: Any, dt: Any, a: Any, fade: Any, share: Any) -> None:
    fade[...] = np.exp(np.logaddexp(0, wide(alpha) + dt) * a)
    share[...] = sigmoid(wide(beta))


def delta_rule(
    qkv: Any, fade: Any, share: Any, key_heads: int, epsilon: float, out: Any, *, tiled: bool, before: Any, after: Any
) -> None:
    n_tokens, heads, width = out.shape
    q, k, v = np.split(wide(qkv), [key_heads * width, 2 * key_heads * width], axis=-1)
    which = np.arange(heads) % key_heads if tiled else np.arange(heads) // (heads // key_heads)
    q, k = (l2_norm(y.reshape(n_tokens, key_heads, width), epsilon)[:, which] for y in (q, k))
    v = v.reshape(n_tokens, heads, width)
    out[...], after[...] = deltanet.recur(q, k, v, wide(fade), wide(share), wide(before))


def route(
    logits: np.ndarray, scale: float, renormalise: bool, ids: np.ndarray, weights: np.ndarray, *,
    gating: str = "softmax", by_logit: bool = False, bias: Any = None, groups: int = 1, groups_used: int = 1,
) -> None:  # fmt: skip
    config: Any = SimpleNamespace(
        gating=gating, renormalise=renormalise, expert_used_count=ids.shape[1], expert_weights_scale=scale,
        expert_group_count=groups, expert_group_used_count=groups_used,
        quirks=SimpleNamespace(select_by="logit" if by_logit else "probability"),
    )  # fmt: skip
    ids[...], weights[...] = ref_route(wide(logits), config, bias)


def experts(
    x: np.ndarray, ids: np.ndarray, wanted: np.ndarray, gate: Any, up: Any, down: Any, *, parts: np.ndarray,
    activation: str = "silu", weights: Any = None, scales: Any = None, biases: Any = None,
) -> None:  # fmt: skip
    scales, biases = scales or {}, biases or {}

    def own(y: np.ndarray, name: str, w: Matrix, e: int) -> np.ndarray:
        return product(y, w, scales[name][e] if name in scales else 1.0, biases[name][e] if name in biases else None)

    for i, e in enumerate(wanted):
        chosen = np.nonzero(ids == e)
        given = wide(x[chosen[0]])
        if weights is not None:
            given = given * weights[chosen][:, None]
        g, u = own(given, "gate", gate[i], e), own(given, "up", up[i], e)
        parts[chosen] = own(ACTIVATIONS[activation](g, u), "down", down[i], e)


def combine(parts: np.ndarray, weights: Any, out: np.ndarray, add: bool = True) -> None:
    total = parts.sum(axis=1, dtype=np.float64) if weights is None else np.einsum("tk,tkd->td", wide(weights), parts)
    out[...] = out + total if add else total


def top_k(logits: Any, values: Any, ids: Any) -> None:
    seen = np.where(np.isfinite(logits), logits, np.inf)
    ids[...] = np.argsort(-seen, axis=-1, kind="stable")[:, : ids.shape[1]]
    values[...] = np.take_along_axis(seen, ids, -1)
