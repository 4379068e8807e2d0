"""Vectors and matrices: norm, rounding, products, embedding, the largest logits."""

from __future__ import annotations

from typing import Any

from moe_cupy.kernels.cuda.launches.core import (
    BEST_BYTES,
    MOST_RANKS,
    MOST_SHARED_BYTES,
    NORMS,
    Launch,
    Pointers,
    ceil_div,
    is_q8,
    warp_each,
)  # fmt: skip
from moe_cupy.kernels.matrix import Matrix


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
    return warp_each("quantize_q8", x.size // 32, 1, 1, block, (out, x, x.size // 32))


def gemv(
    out: Any, w: Matrix, x: Any, bias: Any = None, *, heads: int = 1, scales: Any = None, scale: float = 1.0,
    add: bool = False, block: int = 128,
) -> Launch:  # fmt: skip
    """out [T, .] (+)= scale * x W^T + bias; x [T, .] or Q8. With heads, each its own: [T, H, .], w [H rows, .]."""
    rows, vectors, rounded = w.rows // heads, len(x) * heads, is_q8(x)
    x_stride = x.size // 40 * 32 // vectors if rounded else x.size // vectors
    args = (out, w.data, x, bias, scales, rows, w.cols, x_stride, out.size // vectors, scale, int(add))
    return warp_each(f"gemv{'_q8' if rounded else ''}_{w.type}", rows, len(x), heads, block, args)


def gemv_naive(out: Any, w: Matrix, x: Any, block: int = 128) -> Launch:
    """out [T, rows] = x W^T, a thread for each row; x [T, cols]. For measuring gemv against."""
    args = (out, w.data, x, w.rows, w.cols)
    return Launch(f"gemv_naive_{w.type}", (ceil_div(w.rows, block), len(x), 1), block, args)


def gemm(
    out: Any, weights: Any, like: Matrix, x: Any, order: Any = None, first: Any = None, *, ids: Any = None,
    weight: Any = None, scale: Any = None, bias: Any = None, per_row: int = 1, most: int = 0, add: bool = False,
    variant: str = "",
) -> Launch:  # fmt: skip
    """out [pairs, rows] (+)= weight scale x W_slot^T + bias; ``like`` gives type and shape.

    weights: Pointers, or uint64 [slots] in device memory. x [pairs / per_row, cols] (activations as they are) or Q8
    blocks, for which there are two variants, "mma" (tensor cores) and, of a few formats, "pipelined". order and first:
    see ``group_by_expert``; ``most`` bounds the pairs of a slot. ids int32 and weight [pairs], scale [E], bias
    [E, rows]: all pairs are expert 0 without ids.
    """
    slots = len(weights.arrays) if isinstance(weights, Pointers) else len(weights)
    pairs, grid = len(out), (ceil_div(like.rows, 64), ceil_div(most or len(out), 32), slots)
    args = (
        out, weights, x, order, first, ids, weight, scale, bias, pairs, like.rows, like.cols, per_row, int(add),
    )  # fmt: skip
    tile = 4 * (8 * (72 + 40) + 4 * 64 + 2 * 32) if is_q8(x) else 4 * 32 * (64 + 32)  # bytes
    name = "gemm" + (f"_{variant}" if variant else "" if is_q8(x) else "_float")
    return Launch(f"{name}_{like.type}", grid, 128, args, tile * (1 + (variant == "pipelined")))


def group_by_expert(order: Any, first: Any, slot_of: Any, block: int = 128) -> Launch:
    """slot_of [n] -> order [n], first [slots + 1]."""
    slots = len(first) - 1
    return Launch("group_by_expert", (1, 1, 1), block, (order, first, slot_of, slot_of.size, slots), 4 * (slots + 1))


def embed(out: Any, table: Matrix, ids: Any = None, scale: float = 1.0, block: int = 32) -> Launch:
    """out [T, cols] = scale * table[ids [T]]; without ids all rows of the table."""
    grid = (len(out), ceil_div(ceil_div(table.cols, 32), block), 1)
    return Launch(f"embed_{table.type}", grid, block, (out, table.data, ids, table.cols, scale))


def argmax(values: Any, ids: Any, logits: Any, block: int = 256) -> Launch:
    """logits [T, n] -> values, ids [T]."""
    args = (values, ids, logits, logits.shape[-1])
    return Launch("argmax", (len(logits), 1, 1), block, args, block // 32 * BEST_BYTES)


def top_k(values: Any, ids: Any, x: Any, x_ids: Any = None, block: int = 256) -> Launch:
    """x [T, n] -> values, ids [T, splits, k]: the best of each part; again with splits 1 on both: the best of all."""
    n_tokens, splits, k = values.shape
    n = x.size // n_tokens
    span = ceil_div(n, splits)
    shared = 4 * (span + span % 2) + block // 32 * BEST_BYTES
    if not (0 < k <= MOST_RANKS and shared <= MOST_SHARED_BYTES and (splits == 1 or span >= k)):
        raise ValueError(
            f"top_k: the {k} largest of {n} numbers in {splits} parts: k is 1 to {MOST_RANKS}, and a part has "
            f"k to {(MOST_SHARED_BYTES - 8 * BEST_BYTES) // 4} numbers; choose another number of parts"
        )
    return Launch("top_k", (splits, n_tokens, 1), block, (values, ids, x, x_ids, n, k), shared)


def top_k_parts(n: int, k: int) -> int:
    """Into how many parts to split n numbers: of about 4096, so that several multiprocessors work."""
    return max(1, min(n // max(k, 1), ceil_div(n, 4096)))
