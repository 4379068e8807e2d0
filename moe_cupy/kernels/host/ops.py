"""The ops of the kernel table on the host: each prepares arguments and splits rows over threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from moe_cupy.kernels.host import attention as attending
from moe_cupy.kernels.host import delta, layer, matmul, products, routing
from moe_cupy.kernels.host.experts import MATRICES, run_experts
from moe_cupy.kernels.kept import format_of, numbers_in, store
from moe_cupy.kernels.matrix import Matrix
from moe_ref.quants.activations import round_for

Vector = np.ndarray | None  # None: there is none
NONE = np.empty(0, np.float32)


class Split(Protocol):
    """Splits a kernel's rows over threads; its crew does lists of products."""

    @property
    def crew(self) -> products.Crew: ...

    def __call__(self, kernel: Callable[..., None], rows: int, work_per_row: int, *args: Any) -> None: ...


def _vector(x: Vector) -> np.ndarray:
    return NONE if x is None else x


# Matrices


def _rounded(split: Split, x: np.ndarray, w: Matrix) -> np.ndarray:
    return round_for(x, w.type) if split.crew.act == "q8" else x


def _multiply(split: Split, x: np.ndarray, w: Matrix, y: np.ndarray, scale: float = 1.0, bias: Vector = None) -> None:
    if products.takes(w, split.crew.act):
        products.multiply(split.crew, x, w, y)
    else:
        kind, row_bytes = matmul.layout(w)
        x = _rounded(split, x, w)
        split(matmul.matmul_rows, w.rows, w.cols * len(x), kind, row_bytes, w.data, x, y)
    if scale != 1.0:
        y *= np.float32(scale)
    if bias is not None:
        y += bias


def embed(split: Split, table: Matrix, ids: np.ndarray, out: np.ndarray) -> None:
    """out[t] = table[ids[t]]; ids int32 [T], out [T, D]."""
    kind, row_bytes = matmul.layout(table)
    split(matmul.embed_rows, len(ids), table.cols, kind, row_bytes, table.data, ids, out)


def linear(split: Split, x: np.ndarray, w: Matrix, out: np.ndarray, scale: float = 1.0, bias: Vector = None) -> None:
    """out = scale * x W^T + bias; x [T, cols], bias [rows], out [T, rows]."""
    _multiply(split, x, w, out, scale, bias)


def linear_add(
    split: Split, x: np.ndarray, w: Matrix, out: np.ndarray, scale: float = 1.0, bias: Vector = None
) -> None:
    """out += scale * x W^T + bias: a projection back into the residual stream."""
    y = np.empty_like(out)
    _multiply(split, x, w, y, scale, bias)
    out += y


def linear_heads(
    split: Split, x: np.ndarray, w: Matrix, out: np.ndarray, scale: float | np.ndarray = 1.0, bias: Vector = None
) -> None:
    """out[t, h, :rows] = scale[h] * W[h] x[t, h, :cols] + bias[h]; x and out [T, H, .], bias [H, rows].

    w holds the H matrices one below the other.
    """
    rows = w.rows // x.shape[1]
    if products.takes(w, split.crew.act):
        products.multiply_stack(split.crew, x, w, out)
    else:
        given = _rounded(split, np.ascontiguousarray(x[..., : w.cols]), w)
        split(matmul.matmul_heads, w.rows, w.cols * len(x), matmul.layout(w), (rows, w.cols), w.data, given, out)
    if np.size(scale) > 1 or scale != 1.0:
        out[..., :rows] *= np.reshape(scale, (-1, 1)).astype(np.float32)
    if bias is not None:
        out[..., :rows] += bias


# Rows and elements


def norm_arguments(
    x: np.ndarray, weight: Vector, epsilon: float, out: np.ndarray, bias: Vector = None, centred: bool = False
) -> tuple[Any, ...]:
    """Those of ``layer.norm`` for the op ``norm``."""
    width, weight = x.shape[-1], _vector(weight)
    counted = weight.size or width
    rows, results = x.reshape(-1, width), out.reshape(-1, width)
    return rows, counted, weight, _vector(bias), np.float32(epsilon), centred, results


def norm(split: Split, x: np.ndarray, *given: Any, **named: Any) -> None:
    """out = x / sqrt(mean(x^2) + epsilon) * weight + bias over the last axis, of x less its mean if ``centred``.

    x and out [..., width]; a shorter weight normalises as many leading features, without one all.
    """
    layer.norm(*norm_arguments(x, *given, **named))


def columns(split: Split, x: np.ndarray, first: int, out: np.ndarray, at: int, count: int) -> None:
    """out[:, at : at + count] = x[:, first : first + count]; both [n, .]."""
    out[:, at : at + count] = x[:, first : first + count]


def scale(split: Split, x: np.ndarray, factor: float) -> None:
    """x *= factor."""
    x *= np.float32(factor)


def add(split: Split, x: np.ndarray, factor: float, out: np.ndarray) -> None:
    """out += factor * x."""
    out += np.float32(factor) * x


def clamp(split: Split, x: np.ndarray, limit: float) -> None:
    """x within -limit..limit; NaN where it is not finite."""
    unlimited = x - x  # 0, or NaN
    np.clip(x, np.float32(-limit), np.float32(limit), out=x)
    x += unlimited


def softcap(split: Split, x: np.ndarray, limit: float) -> None:
    """x = limit * tanh(x / limit); NaN where it is not finite."""
    unlimited = x - x  # 0, or NaN
    np.tanh(x / np.float32(limit), out=x)
    x *= np.float32(limit)
    x += unlimited


def activate(split: Split, gate: np.ndarray, up: np.ndarray, kind: str) -> None:
    """gate = act(gate) * up, both [n, F]; ``kind`` as in ``moe_ref.experts.ACTIVATIONS``."""
    layer.activate(layer.ACTIVATIONS[kind], gate, up)


def sigmoid_gate(split: Split, x: np.ndarray, gate: np.ndarray) -> None:
    """x *= sigmoid(gate); x [n, width], gate [n, width] or [n, 1]."""
    layer.gate_by(x, gate)


# Attention


def rope(split: Split, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, style: str, first: int = 0) -> None:
    """Rotate the features from ``first`` on of x [T, heads, K] in place; cos and sin [T, n_rot/2]."""
    layer.rope(x, cos, sin, style == "neox", first)


def hadamard(split: Split, x: np.ndarray, count: int) -> None:
    """Runs of ``count`` numbers of x [..., n] (a power of two) times the orthonormal Hadamard matrix."""
    runs = x.reshape(-1, count)
    split(attending.hadamard, len(runs), 8 * count, runs, np.float32(count**-0.5))


def kv_store(split: Split, cache: np.ndarray, new: np.ndarray, position: int) -> None:
    """cache[position:position+T] = new, rounded to the cache's type; cache [S, G, items of K], new [T, G, K]."""
    store(cache[position : position + len(new)], new)


NATIVE = {np.dtype(np.float32): attending.F32, np.dtype(np.float16): attending.F16}  # what attention reads as it is


def _kept(split: Split, cache: np.ndarray, at: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """A cache [S, G, .] as attention reads it, other types made float32 from ``at`` on, and ``rows_of``'s words."""
    if cache.dtype in NATIVE:
        return cache, (products.address(cache), NATIVE[cache.dtype], *cache.shape[1:])
    rows, width = (len(cache) - at) * cache.shape[1], numbers_in(cache.shape[2], cache)
    raw = cache[at:].reshape(-1).view(np.uint8)
    kind, row_bytes = matmul.layout(Matrix(format_of(cache), rows, width, raw))
    out, ids = np.empty((rows, width), np.float32), np.arange(rows, dtype=np.int32)
    split(matmul.embed_rows, rows, width, kind, row_bytes, raw, ids, out)
    begin = products.address(out) - 4 * at * cache.shape[1] * width
    return out, (begin, attending.F32, cache.shape[1], width)


def attention(
    split: Split,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    n_past: int,
    scale: float,
    out: np.ndarray,
    *,
    window: int = 0,
    chunked: bool = False,
    sinks: Vector = None,
    temperature: Vector = None,
) -> None:
    """Causal grouped-query attention; q [T, H, K], caches k [S, G, K] and v [S, G, at least V], out [T, H, V].

    What caches hold is in ``kept.py``.

    A query sees ``window`` positions, its own included, or those since the last multiple of it if ``chunked``; 0: all.
    ``sinks`` [H] are logits that take a share and have no value; ``temperature`` [T] multiplies a query's scores.
    """
    n_tokens, heads, width = q.shape
    at, end = attending.oldest.py_func(n_past, window, chunked), n_past + n_tokens
    held, keys = _kept(split, k[:end], at)
    held_too, values = (held, keys) if v is k else _kept(split, v[:end], at)
    scales = np.full(n_tokens, scale, np.float32) if temperature is None else np.float32(scale) * temperature
    factors, seen = (scales, _vector(sinks)), (n_past, window, int(chunked))
    split(attending.attention, n_tokens * heads, 2 * width * (end - at), q, (keys, values), factors, seen, out)
    del held, held_too  # their addresses were in use until here


# Recurrence


def convolve(
    split: Split, x: np.ndarray, before: np.ndarray, kernel: np.ndarray, after: np.ndarray, out: np.ndarray
) -> None:
    """out = silu of each channel's weighted sum of its last C inputs; ``after`` keeps the last C - 1.

    x and out [T, channels], before and after [C - 1, channels], kernel [channels, C].
    """
    delta.convolve(x, before, kernel, after, out)


def delta_gates(
    split: Split, alpha: np.ndarray, beta: np.ndarray, dt: np.ndarray, a: np.ndarray, fade: np.ndarray,
    share: np.ndarray,
) -> None:  # fmt: skip
    """fade = exp(softplus(alpha + dt) * a), share = sigmoid(beta); all [T, H], dt and a [H]."""
    delta.gates(alpha, beta, dt, a, fade, share)


def delta_rule(
    split: Split,
    qkv: np.ndarray,
    fade: np.ndarray,
    share: np.ndarray,
    key_heads: int,
    epsilon: float,
    out: np.ndarray,
    *,
    tiled: bool,
    before: np.ndarray,
    after: np.ndarray,
) -> None:
    """The gated delta rule for T tokens: state before -> after [H, S, S], out [T, H, S].

    qkv [T, (2 * key_heads + H) * S] side by side; q and k are brought to length one. fade and share [T, H].
    """
    n_tokens, heads, width = out.shape
    rule = (key_heads, tiled, np.float32(epsilon))
    split(delta.recur, heads, 3 * n_tokens * width * width, qkv, (fade, share), rule, (before, after), out)


# Experts


def route_arguments(
    logits: np.ndarray,
    scale: float,
    renormalise: bool,
    ids: np.ndarray,
    weights: np.ndarray,
    *,
    gating: str = "softmax",
    by_logit: bool = False,
    bias: Vector = None,
    groups: int = 1,
    groups_used: int = 1,
) -> tuple[Any, ...]:
    """Those of ``routing.route`` for the op ``route``."""
    rule = (routing.GATINGS[gating], int(by_logit), groups, groups_used, int(renormalise))
    return logits, _vector(bias), rule, np.float32(scale), ids, weights


def route(split: Split, logits: np.ndarray, *given: Any, **named: Any) -> None:
    """Router logits [T, E] -> ids int32 [T, k], best first, and weights [T, k]; see ``route_arguments``.

    ``bias`` [E] steers the selection alone, which is by probability or ``by_logit``, and within the best groups.
    """
    routing.route(*route_arguments(logits, *given, **named))


def experts(
    split: Split,
    x: np.ndarray,
    ids: np.ndarray,
    wanted: np.ndarray,
    gate: Sequence[Matrix],
    up: Sequence[Matrix],
    down: Sequence[Matrix],
    *,
    parts: np.ndarray,
    activation: str = "silu",
    weights: Vector = None,
    scales: Mapping[str, np.ndarray] | None = None,
    biases: Mapping[str, np.ndarray] | None = None,
) -> None:
    """parts[t, r] = expert ids[t, r] of x[t] for those of the experts that are wanted; x [T, D], parts [T, k, D].

    ``wanted`` int64 [n] are the experts whose matrices ``gate``, ``up`` and ``down`` [n] are. ``weights`` [T, k]
    multiply what goes in. ``scales`` and ``biases`` hold those of "gate", "up" and "down", [E] and [E, rows], if any.
    """
    scales, biases = scales or {}, biases or {}
    if all(products.takes(several[0], split.crew.act) for several in (gate, up, down)):
        matrices = gate, up, down
        run_experts(split.crew, x, (ids, wanted, matrices), (activation, weights, scales, biases), parts)
        return
    for e, *three in zip(wanted.tolist(), gate, up, down, strict=True):
        chosen = np.nonzero(ids == e)
        given = x[chosen[0]] if weights is None else x[chosen[0]] * weights[chosen][:, None]
        factors = {n: float(scales[n][e]) if n in scales else 1.0 for n in MATRICES}
        own = {n: (factors[n], biases[n][e] if n in biases else None) for n in MATRICES}
        parts[chosen] = _expert(split, given, dict(zip(MATRICES, three, strict=True)), own, activation)


def _expert(split: Split, x: np.ndarray, three: Any, own: Any, activation: str) -> np.ndarray:
    """One expert of x [n, D]; ``own`` holds scale and bias of each product."""

    def product(name: str, x: np.ndarray) -> np.ndarray:
        y = np.empty((len(x), three[name].rows), np.float32)
        _multiply(split, x, three[name], y, *own[name])
        return y

    g, u = product("gate", x), product("up", x)
    layer.activate(layer.ACTIVATIONS[activation], g, u)
    return product("down", g)


def combine(split: Split, parts: np.ndarray, weights: Vector, out: np.ndarray, add: bool = True) -> None:
    """out += sum over rank of weights [T, k] * parts [T, k, D], always in rank order; or = if not ``add``."""
    layer.combine(parts, np.empty((len(parts), 0), np.float32) if weights is None else weights, add, out)


def top_k(split: Split, logits: np.ndarray, values: np.ndarray, ids: np.ndarray) -> None:
    """The k largest of logits [T, n], best first, ties to the lower id: values and ids int32 [T, k].

    What is not finite counts as infinity, so that whoever looks at the values sees it.
    """
    seen = np.where(np.isfinite(logits), logits, np.float32(np.inf))
    ids[...] = np.argsort(-seen, axis=-1, kind="stable")[:, : ids.shape[1]]
    values[...] = np.take_along_axis(seen, ids, -1)
