"""How each kernel is launched: shapes in, grid, block and arguments out. Arrays may be NumPy's or CuPy's.

One function a kernel, so that the emulated device, a GPU and the tests launch alike. Arrays are C-contiguous,
float32 and int32 unless said; ``None`` is a null pointer. ``block`` is the number of threads of a block, a multiple
of 32 up to 256. Q8 blocks are uint8 [..., cols / 32, 40]. What each kernel computes is in the head of its file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_cupy.kernels.matrix import Matrix


@dataclass(frozen=True, slots=True)
class Pointers:
    """A table of addresses in device memory: of the slots of experts, for example."""

    arrays: Sequence[Any]


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch; ``args`` are arrays, Pointers, None, ints and floats in the kernel's order."""

    kernel: str
    grid: tuple[int, int, int]
    block: int
    args: tuple[Any, ...]
    shared_bytes: int = 0


ACTIVATIONS = {"silu": 0, "gelu": 1, "swiglu_oai": 2}
GATINGS = {"softmax": 0, "sigmoid": 1, "softmax over the selected": 2}
NORMS = {"rms": 0, "layer": 1, "unit": 2}
MAX_VALUE_LENGTH = 512  # of attention's value rows
BEST_BYTES = 8


def ceil_div(n: int, d: int) -> int:
    """n / d, rounded up."""
    return -(-n // d)


def _is_q8(x: Any) -> bool:
    return bool(x.dtype == "uint8")


def _warp_each(kernel: str, rows: int, y: int, z: int, block: int, args: tuple[Any, ...]) -> Launch:
    """A warp for each row."""
    return Launch(kernel, (ceil_div(rows, block // 32), y, z), block, args)


def _thread_each(kernel: str, n: int, block: int, *args: Any) -> Launch:
    """A thread for each of n numbers."""
    return Launch(kernel, (ceil_div(n, block), 1, 1), block, args)


# ---------------------------------------------------------------------------------------------------------
# vectors and matrices


def rms_norm(
    out: Any, x: Any, weight: Any = None, epsilon: float = 1e-6, *, residual: Any = None, bias: Any = None,
    kind: str = "rms", width: int = 0, block: int = 128,
) -> Launch:  # fmt: skip
    """out [..., width] = norm(x) over the last axis (or its first ``width`` features); x += residual first."""
    rows, stride = x.size // x.shape[-1], x.shape[-1]
    args = (out, x, residual, weight, bias, width or stride, stride, out.shape[-1], epsilon, NORMS[kind])
    return Launch("rms_norm", (rows, 1, 1), block, args, block // 32 * 4)


def quantize_q8(out: Any, x: Any, block: int = 128) -> Launch:
    """x [..., cols] -> out, Q8 blocks; cols is a multiple of 32."""
    return _warp_each("quantize_q8", x.size // 32, 1, 1, block, (out, x, x.size // 32))


def gemv(
    out: Any, w: Matrix, x: Any, bias: Any = None, *, heads: int = 1, scales: Any = None, scale: float = 1.0,
    add: bool = False, block: int = 128,
) -> Launch:  # fmt: skip
    """out [T, .] (+)= scale * x W^T + bias; x [T, .] or Q8. With heads, each its own: [T, H, .], w [H rows, .]."""
    rows, vectors, is_q8 = w.rows // heads, len(x) * heads, _is_q8(x)
    x_stride = x.size // 40 * 32 // vectors if is_q8 else x.size // vectors
    args = (out, w.data, x, bias, scales, rows, w.cols, x_stride, out.size // vectors, scale, int(add))
    return _warp_each(f"gemv{'_q8' if is_q8 else ''}_{w.type}", rows, len(x), heads, block, args)


def gemv_naive(out: Any, w: Matrix, x: Any, block: int = 128) -> Launch:
    """out [T, rows] = x W^T, a thread for each row; x [T, cols]. For measuring gemv against."""
    args = (out, w.data, x, w.rows, w.cols)
    return Launch(f"gemv_naive_{w.type}", (ceil_div(w.rows, block), len(x), 1), block, args)


def gemm(
    out: Any, weights: Pointers, like: Matrix, x: Any, order: Any = None, first: Any = None, *, bias: Any = None,
    per_row: int = 1, most: int = 0, add: bool = False,
) -> Launch:  # fmt: skip
    """out [pairs, rows] (+)= x W_slot^T + bias; ``like`` gives type and shape, ``most`` bounds the pairs of a slot."""
    pairs = len(out)
    grid = (ceil_div(like.rows, 64), ceil_div(most or pairs, 32), len(weights.arrays))
    args = (out, weights, x, order, first, bias, pairs, like.rows, like.cols, per_row, int(add))
    return Launch(f"gemm_{like.type}", grid, 128, args, 4 * (12 * 64 + 10 * 32))


def group_by_expert(order: Any, first: Any, slot_of: Any, block: int = 128) -> Launch:
    """slot_of [n] -> order [n], first [slots + 1]."""
    slots = len(first) - 1
    return Launch("group_by_expert", (1, 1, 1), block, (order, first, slot_of, slot_of.size, slots), 4 * (slots + 1))


def embed(out: Any, table: Matrix, ids: Any = None, scale: float = 1.0, block: int = 32) -> Launch:
    """out [T, cols] = scale * table[ids [T]]; without ids all rows of the table."""
    grid = (len(out), ceil_div(ceil_div(table.cols, 32), block), 1)
    return Launch(f"embed_{table.type}", grid, block, (out, table.data, ids, table.cols, scale))


def argmax(ids: Any, logits: Any, block: int = 256) -> Launch:
    """logits [T, n] -> ids [T]."""
    return Launch("argmax", (len(logits), 1, 1), block, (ids, logits, logits.shape[-1]), block // 32 * BEST_BYTES)


# ---------------------------------------------------------------------------------------------------------
# experts


def router(
    ids: Any, weights: Any, logits: Any, bias: Any = None, *, gating: str = "softmax", select_logits: bool = False,
    groups: int = 1, groups_used: int = 1, renormalise: bool = True, scale: float = 1.0, block: int = 32,
) -> Launch:  # fmt: skip
    """logits [T, E] -> ids, weights [T, used]."""
    experts, used = logits.shape[-1], ids.shape[-1]
    args = (
        ids, weights, logits, bias, experts, used, groups, groups_used, GATINGS[gating], int(select_logits),
        int(renormalise), scale,
    )  # fmt: skip
    shared = 4 * (2 * experts + groups) + block // 32 * BEST_BYTES
    return Launch("router", (len(logits), 1, 1), block, args, shared)


@dataclass(frozen=True, slots=True)
class Slots:
    """Where experts lie: addresses of their matrices by slot, and which slot [T, used] holds which expert [T, used]."""

    matrices: tuple[Pointers, ...]
    slot_of: Any
    ids: Any


def expert_gate_up(
    h: Any, x: Any, slots: Slots, like: Matrix, activation: str = "silu", *, biases: tuple[Any, Any] = (None, None),
    scales: tuple[Any, Any] = (None, None), input_weights: Any = None, block: int = 128,
) -> Launch:  # fmt: skip
    """h [T, used, F] = act(gate x, up x); x [T, D] or Q8 blocks; ``like`` gives type and shape [F, D]."""
    n_tokens, used = slots.slot_of.shape
    args = (
        h, x, *slots.matrices, slots.slot_of, slots.ids, *biases, *scales, input_weights, like.rows, like.cols,
        ACTIVATIONS[activation],
    )  # fmt: skip
    name = f"expert_gate_up{'_q8' if _is_q8(x) else ''}_{like.type}"
    return _warp_each(name, like.rows, used, n_tokens, block, args)


def expert_down(
    out: Any, h: Any, slots: Slots, like: Matrix, weights: Any = None, *, bias: Any = None, scale: Any = None,
    add: bool = False, block: int = 128,
) -> Launch:  # fmt: skip
    """out [T, D] (+)= weighted sum of down h; h [T, used, F] or Q8 blocks; ``like`` gives type and shape [D, F]."""
    n_tokens, used = slots.slot_of.shape
    args = (
        out, h, *slots.matrices, slots.slot_of, slots.ids, weights, bias, scale, like.rows, like.cols, used, int(add),
    )  # fmt: skip
    name = f"expert_down{'_q8' if _is_q8(h) else ''}_{like.type}"
    return _warp_each(name, like.rows, n_tokens, 1, block, args)


@dataclass(frozen=True, slots=True)
class Residency:
    """A pool's integers on the device: see resolve.cu. ``state`` [6], ``slot_of`` [keys], the others [n_slots]."""

    state: Any
    slot_of: Any
    key_of: Any
    last_use: Any


def resolve(
    slots: Any, loads: tuple[Any, Any], ids: Any, residency: Residency, first_key: int, block: int = 128
) -> Launch:
    """ids [used] of one layer of one token -> slots [used] and the loads (keys [used], slots [used])."""
    r = residency
    args = (slots, *loads, r.state, ids, r.slot_of, r.key_of, r.last_use, first_key, ids.size, r.key_of.size)
    return Launch("resolve", (1, 1, 1), block, args, block // 32 * 8)


def fill(
    slot_at: Pointers, source_of: Pointers, loads: tuple[Any, Any], state: Any, n: int, blocks: int = 16,
    block: int = 256,
) -> Launch:  # fmt: skip
    """Bring the loads of ``resolve``, n bytes each, from host memory into their slots."""
    return Launch("fill", (blocks, loads[0].size, 1), block, (slot_at, source_of, *loads, state, n))


# ---------------------------------------------------------------------------------------------------------
# attention


@dataclass(frozen=True, slots=True)
class Sight:
    """What queries see: a window or an aligned chunk (0: all); how scores are scaled and capped (0: not); sinks [H]."""

    scale: float
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    sinks: Any = None


@dataclass(frozen=True, slots=True)
class CacheRows:
    """One layer's cache: k and v [ring, ...] float32, float16 or (uint8) Q8_0 blocks; position p is row p % ring.

    KV head g has its K keys at g * K of a row, its V values at g * V.
    """

    k: Any
    v: Any
    groups: int

    @property
    def format(self) -> str:
        """The name of its numbers' type."""
        return {"float16": "F16", "float32": "F32", "uint8": "Q8_0"}[str(self.k.dtype)]

    def shape_args(self, k_width: int, v_width: int) -> tuple[int, ...]:
        """The kernels' groups, K, V, strides (in numbers) and ring."""
        ring = len(self.k)
        strides = (a.size // ring * (32 if self.format == "Q8_0" else 34) // 34 for a in (self.k, self.v))
        return self.groups, k_width, v_width, *strides, ring


def rope(x: Any, cos: Any, sin: Any, style: str, positions: Any = None, offset: int = 0, block: int = 128) -> Launch:
    """Turn x [T, heads, width] in place; tables [*, n_rot/2], row positions[t] (or t)."""
    n_tokens, heads, width = x.shape
    half = cos.shape[-1]
    args = (x, cos, sin, positions, n_tokens, heads, width, offset, half, int(style == "neox"))
    return _thread_each("rope", n_tokens * heads * half, block, *args)


def kv_store(cache: Any, x: Any, rows: Any, column: int = 0, width: int = 0, block: int = 128) -> Launch:
    """cache[rows[t], column:][:width] = x[t, :width]; x [T, .], cache [ring, .] float32, float16 or Q8_0 blocks."""
    stride, row = x.size // len(x), cache.size // len(cache)
    width = width or stride
    if cache.dtype == "uint8":
        args: tuple[Any, ...] = (cache, x, rows, width, stride, row // 34 * 32, column)
        return Launch("kv_store_q8_0", (ceil_div(width, block), len(x), 1), block, args)
    args = (cache, x, rows, width, stride, row, column, int(cache.dtype == "float16"))
    return Launch("kv_store", (ceil_div(width, block), len(x), 1), block, args)


def attention_decode(partial: Any, q: Any, cache: CacheRows, positions: Any, sight: Sight, block: int = 128) -> Launch:
    """q [T, H, K] -> partial [T, H, splits, V + 2]."""
    n_tokens, heads, k_width = q.shape
    splits, v_width = partial.shape[2], partial.shape[3] - 2
    args = (
        partial, q, cache.k, cache.v, positions, *cache.shape_args(k_width, v_width), sight.scale, sight.softcap,
        sight.window, sight.chunk,
    )  # fmt: skip
    shared = 4 * (k_width + block // 32 * (32 + v_width + 2))
    return Launch(f"attention_decode_{cache.format}", (splits, heads, n_tokens), block, args, shared)


def attention_combine(out: Any, partial: Any, sinks: Any = None, block: int = 64) -> Launch:
    """partial [T, H, splits, V + 2] -> out [T, H, V]."""
    n_tokens, heads, splits, width = partial.shape
    return Launch("attention_combine", (heads, n_tokens, 1), block, (out, partial, sinks, splits, width - 2))


def attention_prefill(out: Any, q: Any, cache: CacheRows, positions: Any, sight: Sight, block: int = 128) -> Launch:
    """q [T, H, K] -> out [T, H, V]."""
    n_tokens, heads, k_width = q.shape
    v_width, warps = out.shape[-1], block // 32
    args = (
        out, q, cache.k, cache.v, sight.sinks, positions, n_tokens, *cache.shape_args(k_width, v_width), sight.scale,
        sight.softcap, sight.window, sight.chunk,
    )  # fmt: skip
    shared = 4 * (warps * (k_width + 32) + 32 * (k_width + 1) + 32 * v_width)
    return Launch(f"attention_prefill_{cache.format}", (ceil_div(n_tokens, warps), heads, 1), block, args, shared)


# ---------------------------------------------------------------------------------------------------------
# small ops, in place unless there is an ``out``


def add_scaled(out: Any, x: Any, scale: float = 1.0, block: int = 256) -> Launch:
    """out += scale * x."""
    return _thread_each("add_scaled", out.size, block, out, x, scale, out.size)


def multiply(x: Any, factor: Any = None, *, is_gate: bool = False, scale: float = 1.0, block: int = 256) -> Launch:
    """x *= scale * factor (or its sigmoid); a number of ``factor`` serves as many neighbours of x as there are each."""
    span = 1 if factor is None else x.size // factor.size
    return _thread_each("multiply", x.size, block, x, factor, span, int(is_gate), scale, x.size)


def activate(out: Any, gate: Any, up: Any, activation: str = "silu", block: int = 256) -> Launch:
    """out = act(gate, up)."""
    return _thread_each("activate", out.size, block, out, gate, up, ACTIVATIONS[activation], out.size)


def softcap(x: Any, limit: float, block: int = 256) -> Launch:
    """x = limit * tanh(x / limit)."""
    return _thread_each("softcap", x.size, block, x, limit, x.size)


def clamp(x: Any, limit: float, block: int = 256) -> Launch:
    """x within -limit..limit."""
    return _thread_each("clamp", x.size, block, x, limit, x.size)


def combine(out: Any, parts: Any, weights: Any, add: bool = True, block: int = 256) -> Launch:
    """out [T, D] (+)= sum over rank of weights [T, used] * parts [T, used, D]."""
    args = (out, parts, weights, weights.shape[-1], out.shape[-1], int(add), out.size)
    return _thread_each("combine", out.size, block, *args)


def delta_convolve(out: Any, x: Any, states: tuple[Any, Any], kernel: Any, block: int = 128) -> Launch:
    """out, x [T, channels]; states: inputs before and after, [C - 1, channels]; kernel [channels, C], C <= 8."""
    channels, taps = kernel.shape
    return _thread_each("delta_convolve", channels, block, out, x, *states, kernel, len(x), channels, taps)


def delta_gates(alpha: Any, beta: Any, dt: Any, a: Any, block: int = 128) -> Launch:
    """alpha [T, heads] becomes the fade, beta [T, heads] its sigmoid."""
    return _thread_each("delta_gates", alpha.size, block, alpha, beta, dt, a, dt.size, alpha.size)


def delta_recur(
    out: Any, mixed: Any, gates: tuple[Any, Any], states: tuple[Any, Any], key_heads: int, *, epsilon: float = 1e-6,
    tiled: bool = False, block: int = 128,
) -> Launch:  # fmt: skip
    """mixed [T, (2 key_heads + H) width], out [T, H, width]; gates: fade, beta [T, H]; states [H, width, width]."""
    n_tokens, heads, width = out.shape
    args = (out, mixed, *gates, *states, n_tokens, heads, key_heads, width, epsilon, int(tiled))
    shared = 4 * (34 * width + block)
    return Launch("delta_recur", (ceil_div(width, 32), heads, 1), block, args, shared)
