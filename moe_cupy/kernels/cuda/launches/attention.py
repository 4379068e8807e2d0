"""Positions, the cache and attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_cupy.kernels.cuda.launches.core import MAX_VALUE_LENGTH, MOST_SHARED_BYTES, Launch, ceil_div, thread_each
from moe_cupy.kernels.kept import format_of, numbers_in


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
    """One layer's cache: k and v [ring, ...], which hold what is in ``kept.py``; position p is row p % ring.

    KV head g has its K keys at g * K of a row, its V values at g * V.
    """

    k: Any
    v: Any
    groups: int

    @property
    def format(self) -> str:
        """The name of its numbers' type."""
        return format_of(self.k)

    def shape_args(self, k_width: int, v_width: int) -> tuple[int, ...]:
        """The kernels' groups, K, V, strides (in numbers) and ring."""
        ring = len(self.k)
        strides = (numbers_in(a.size // ring, a) for a in (self.k, self.v))
        return self.groups, k_width, v_width, *strides, ring


def rope(x: Any, cos: Any, sin: Any, style: str, positions: Any = None, offset: int = 0, block: int = 128) -> Launch:
    """Turn x [T, heads, width] in place; tables [*, n_rot/2], row positions[t] (or t)."""
    n_tokens, heads, width = x.shape
    half = cos.shape[-1]
    args = (x, cos, sin, positions, n_tokens, heads, width, offset, half, int(style == "neox"))
    return thread_each("rope", n_tokens * heads * half, block, *args)


def hadamard(x: Any, count: int, block: int = 64) -> Launch:
    """Runs of ``count`` numbers of x (a power of two) times the orthonormal Hadamard matrix, in place."""
    return Launch("hadamard", (x.size // count, 1, 1), block, (x, count, count**-0.5), 4 * count)


def kv_store(cache: Any, x: Any, rows: Any, column: int = 0, width: int = 0, block: int = 128) -> Launch:
    """cache[rows[t], column:][:width] = x[t, :width]; x [T, .], cache [ring, .] as in ``kept.py``."""
    stride, row, kind = x.size // len(x), numbers_in(cache.size // len(cache), cache), format_of(cache)
    width = width or stride
    args: tuple[Any, ...] = (cache, x, rows, width, stride, row, column)
    grid = (ceil_div(width, block), len(x), 1)
    if kind in ("Q8_0", "Q4_0"):
        return Launch(f"kv_store_{kind.lower()}", grid, block, args)
    return Launch("kv_store", grid, block, (*args, ("F32", "F16", "BF16").index(kind)))


def attention_decode(partial: Any, q: Any, cache: CacheRows, positions: Any, sight: Sight, block: int = 128) -> Launch:
    """q [T, H, K] -> partial [T, H, splits, V + 2]."""
    n_tokens, heads, k_width = q.shape
    splits, v_width = partial.shape[2], partial.shape[3] - 2
    _check_widths(k_width, v_width)
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
    tile, shared = prefill_tile(k_width, v_width, warps, cache.groups == 1 and cache.k is cache.v)
    args = (
        out, q, cache.k, cache.v, sight.sinks, positions, n_tokens, *cache.shape_args(k_width, v_width), sight.scale,
        sight.softcap, sight.window, sight.chunk, tile,
    )  # fmt: skip
    return Launch(f"attention_prefill_{cache.format}", (ceil_div(n_tokens, warps), heads, 1), block, args, shared)


def prefill_tile(k_width: int, v_width: int, warps: int, one_row: bool) -> tuple[int, int]:
    """(positions that lie in shared memory at a time, bytes of it); ``one_row``: values are a part of the keys."""
    _check_widths(k_width, v_width)
    for tile in (32, 16, 8, 4):
        key_step = ceil_div(k_width, 32) * 32 + 32 // tile
        shared = 4 * (warps * (k_width + 32) + tile * (key_step + (0 if one_row else v_width)))
        if shared <= MOST_SHARED_BYTES:
            return tile, shared
    raise ValueError(
        f"attention: keys of {k_width} and values of {v_width} numbers do not fit into {MOST_SHARED_BYTES} bytes of "
        f"shared memory with {warps} queries a block; use a smaller block"
    )


def _check_widths(k_width: int, v_width: int) -> None:
    if v_width > MAX_VALUE_LENGTH:
        raise ValueError(
            f"attention: values of {v_width} numbers, keys of {k_width}; at most {MAX_VALUE_LENGTH} a value"
        )
