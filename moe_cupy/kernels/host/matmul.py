"""``y = x W^T`` on quantized rows: a row is decoded into a cache-resident buffer, then used for every token.

Per call: reads ``rows * row_bytes`` of weights once, whatever the number of tokens; 2 * T * rows * cols
FLOPs. One compiled kernel serves every format: the switch on the format is taken once a row. Each
(row, token) product is the same code in decode and prefill, so chunking never changes a bit.

Numba's disk cache watches only the file of the function that it caches; ``numba_cache.tidy`` watches the others.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from moe_cupy.kernels.host import decoders as d
from moe_cupy.kernels.host.grid_decoders import GRIDS, decode_grid
from moe_cupy.kernels.matrix import Matrix
from moe_ref.quants import BY_NAME

SUPPORTED: tuple[str, ...] = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ4_NL", "IQ4_XS", "MXFP4", *GRIDS,
)  # fmt: skip
F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4 = (
    BY_NAME[name].id for name in SUPPORTED[:16]
)
REASSOCIATE = {"reassoc", "contract", "nsz"}  # lets a sum use vector lanes; NaN and infinity keep their meaning


@njit
def decode_row(kind, data, p, out):
    """Decode the row that starts at byte p into out [cols]; ``kind`` is the ggml type id."""
    if kind == Q4_K:
        d.decode_q4_k(data, p, out)
    elif kind == Q6_K:
        d.decode_q6_k(data, p, out)
    elif kind == Q5_K:
        d.decode_q5_k(data, p, out)
    elif kind == Q8_0:
        d.decode_q8_0(data, p, out)
    elif kind == Q4_0:
        d.decode_q4_0(data, p, out)
    elif kind in (Q4_1, Q5_0, Q5_1):
        d.decode_legacy(kind, data, p, out)
    elif kind in (IQ4_NL, MXFP4):
        d.decode_table(kind, data, p, out)
    elif kind == IQ4_XS:
        d.decode_iq4_xs(data, p, out)
    elif kind == Q3_K:
        d.decode_q3_k(data, p, out)
    elif kind == Q2_K:
        d.decode_q2_k(data, p, out)
    elif kind in (F32, F16, BF16):
        d.decode_plain(kind, data, p, out)
    else:
        decode_grid(kind, data, p, out)


@njit(fastmath=REASSOCIATE)
def dot(a, b):
    """Sum of products in float32, in vector lanes."""
    total = np.float32(0)
    for i in range(a.size):
        total += a[i] * b[i]
    return total


@njit("void(i8, i8, u1[::1], f4[:, ::1], f4[:, ::1], i8, i8)", nogil=True, cache=True)
def matmul_rows(kind, row_bytes, data, x, y, first, last):
    """y[:, first:last] = x @ W[first:last].T; x [T, cols], y [T, rows], data uint8 [rows * row_bytes]."""
    row = np.empty(x.shape[1], np.float32)
    for r in range(first, last):
        decode_row(kind, data, r * row_bytes, row)
        for t in range(x.shape[0]):
            y[t, r] = dot(row, x[t])


@njit("void(UniTuple(i8, 2), UniTuple(i8, 2), u1[::1], f4[:, :, ::1], f4[:, :, ::1], i8, i8)", nogil=True, cache=True)
def matmul_heads(layout, shape, data, x, y, first, last):
    """y[t, h, r] = W[h][r] . x[t, h] for rows first..last-1 of H*rows; x [T, H, at least cols], y likewise.

    ``layout`` is (kind, row_bytes), ``shape`` is (rows, cols) of one W[h].
    """
    (kind, row_bytes), (rows, cols) = layout, shape
    row = np.empty(cols, np.float32)
    for i in range(first, last):
        decode_row(kind, data, i * row_bytes, row)
        for t in range(x.shape[0]):
            y[t, i // rows, i % rows] = dot(row, x[t, i // rows, :cols])


@njit("void(i8, i8, u1[::1], i4[::1], f4[:, ::1], i8, i8)", nogil=True, cache=True)
def embed_rows(kind, row_bytes, data, ids, y, first, last):
    """y[t] = W[ids[t]] for t in first..last-1; y [T, cols]."""
    for t in range(first, last):
        decode_row(kind, data, ids[t] * row_bytes, y[t])


def layout(w: Matrix) -> tuple[int, int]:
    """(ggml type id, bytes of a row) as the kernels take them."""
    kind = BY_NAME[w.type]
    return kind.id, kind.row_bytes(w.cols)
