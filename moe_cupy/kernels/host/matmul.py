"""``y = x W^T`` on quantized rows: a row is decoded into a cache-resident buffer, then used for every token.

Per call: reads ``rows * row_bytes`` of weights once, whatever the number of tokens; 2 * T * rows * cols
FLOPs. One compiled kernel serves every format: the switch on the format is taken once a row. Each
(row, token) product is the same code in decode and prefill, so chunking never changes a bit.

The decoders stand in this file, beside their caller, because Numba's disk cache watches only the file
of the function it caches.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from moe_cupy.kernels.matrix import Matrix
from moe_ref.quants import BY_NAME

F32, F16, BF16, Q4_0, Q8_0, Q4_K, Q5_K, Q6_K = (
    BY_NAME[name].id for name in ("F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
)
SUPPORTED: tuple[str, ...] = ("F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
REASSOCIATE = {"reassoc", "contract", "nsz"}  # lets a sum use vector lanes; NaN and infinity keep their meaning


def _loader(element: types.Type):
    """An intrinsic (data uint8 [n], p) -> the little-endian ``element`` at byte p, which need not be aligned."""

    @intrinsic
    def load(typingctx, data, p):
        def codegen(context, builder, signature, args):
            array = context.make_array(signature.args[0])(context, builder, args[0])
            address = builder.bitcast(
                builder.gep(array.data, [args[1]]), context.get_value_type(element).as_pointer()
            )
            value = builder.load(address)
            value.align = 1
            return value

        return element(data, types.int64), codegen

    return load


load_u8, load_i8, load_u16 = _loader(types.uint8), _loader(types.int8), _loader(types.uint16)
load_f32 = _loader(types.float32)


@intrinsic
def put(typingctx, out, i, value):
    """out[i] = value for float32 out, without the test for a negative index that would keep a loop scalar."""

    def codegen(context, builder, signature, args):
        array = context.make_array(signature.args[0])(context, builder, args[0])
        builder.store(args[2], builder.gep(array.data, [args[1]]))
        return context.get_dummy_value()

    return types.void(out, types.int64, types.float32), codegen


@intrinsic
def float_from_bits(typingctx, bits):
    """Reinterpret a uint32 as float32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@njit(inline="always")
def half(data, p):
    """Half precision at byte p as float32: move the exponent by a multiplication, which also does denormals."""
    h = np.uint32(load_u16(data, p))
    value = float_from_bits(np.uint32((h & np.uint32(0x7FFF)) << np.uint32(13))) * np.float32(2.0**112)
    if (h & np.uint32(0x7C00)) == np.uint32(0x7C00):  # infinity or NaN
        value = float_from_bits(np.uint32(np.uint32(0x7F800000) | ((h & np.uint32(0x3FF)) << np.uint32(13))))
    return -value if h & np.uint32(0x8000) else value


@njit(inline="always")
def lanes(n, out):
    """n, said so that the compiler cannot know it: a loop of known short length is unrolled before it is vectorised."""
    return min(n, out.size)


@njit
def decode_plain(kind, data, p, out):
    """F32, F16 and BF16 rows."""
    if kind == F32:
        for i in range(out.size):
            out[i] = load_f32(data, p + 4 * i)
    elif kind == F16:
        for i in range(out.size):
            out[i] = half(data, p + 2 * i)
    else:
        for i in range(out.size):
            out[i] = float_from_bits(np.uint32(np.uint32(load_u16(data, p + 2 * i)) << np.uint32(16)))


@njit
def decode_q8_0(data, p, out):
    """Blocks of 32: half scale, 32 signed bytes."""
    for b in range(out.size // 32):
        d = half(data, p)
        for i in range(lanes(32, out)):
            put(out, 32 * b + i, d * np.float32(load_i8(data, p + 2 + i)))
        p += 34


@njit
def decode_q4_0(data, p, out):
    """Blocks of 32: half scale, 16 bytes of nibbles."""
    for b in range(out.size // 32):
        d = half(data, p)
        for i in range(lanes(16, out)):
            q = np.int32(load_u8(data, p + 2 + i))
            put(out, 32 * b + i, d * np.float32((q & np.int32(15)) - np.int32(8)))
            put(out, 32 * b + 16 + i, d * np.float32((q >> np.int32(4)) - np.int32(8)))
        p += 18


@njit(inline="always")
def scale_and_min(data, p, s):
    """Six-bit scale and min of sub-block s of a Q4_K or Q5_K super-block whose packed scales start at p."""
    if s < 4:
        return np.float32(data[p + s] & 63), np.float32(data[p + 4 + s] & 63)
    scale = (data[p + 4 + s] & 15) | ((data[p + s - 4] >> 6) << 4)
    floor = (data[p + 4 + s] >> 4) | ((data[p + s] >> 6) << 4)
    return np.float32(scale), np.float32(floor)


@njit
def decode_q4_k(data, p, out):
    """Super-blocks of 256: 8 sub-blocks with 6-bit scale and min; 32 bytes hold two sub-blocks."""
    for b in range(out.size // 256):
        d, dmin = half(data, p), half(data, p + 2)
        for s in range(4):
            scale, floor = scale_and_min(data, p + 4, 2 * s)
            step, base = d * scale, dmin * floor
            scale, floor = scale_and_min(data, p + 4, 2 * s + 1)
            high_step, high_base = d * scale, dmin * floor
            for i in range(lanes(32, out)):
                q = np.int32(load_u8(data, p + 16 + 32 * s + i))
                put(out, 256 * b + 64 * s + i, step * np.float32(q & np.int32(15)) - base)
                put(out, 256 * b + 64 * s + 32 + i, high_step * np.float32(q >> np.int32(4)) - high_base)
        p += 144


@njit
def decode_q5_k(data, p, out):
    """Q4_K with a fifth bit in 32 bytes before the nibbles."""
    for b in range(out.size // 256):
        d, dmin = half(data, p), half(data, p + 2)
        for s in range(8):
            scale, floor = scale_and_min(data, p + 4, s)
            step, base = d * scale, dmin * floor
            shift, bit = np.int32(4 * (s & 1)), np.int32(s)
            for i in range(lanes(32, out)):
                low = (np.int32(load_u8(data, p + 48 + 32 * (s >> 1) + i)) >> shift) & np.int32(15)
                high = (np.int32(load_u8(data, p + 16 + i)) >> bit) & np.int32(1)
                put(out, 256 * b + 32 * s + i, step * np.float32(low | (high << np.int32(4))) - base)
        p += 176


@njit
def decode_q6_k(data, p, out):
    """Super-blocks of 256: 16 signed scales, 4 + 2 bits a weight."""
    for b in range(out.size // 256):
        d = half(data, p + 208)
        for s in range(16):  # 16 weights: half s >> 3, bit pair (s >> 1) & 3
            low_at, high_at = p + 64 * (s >> 3) + 16 * (s & 3), p + 128 + 32 * (s >> 3) + 16 * (s & 1)
            low_shift, high_shift = np.int32(4 * ((s >> 2) & 1)), np.int32(2 * ((s >> 1) & 3))
            step = d * np.float32(load_i8(data, p + 192 + s))
            for i in range(lanes(16, out)):
                low = (np.int32(load_u8(data, low_at + i)) >> low_shift) & np.int32(15)
                high = (np.int32(load_u8(data, high_at + i)) >> high_shift) & np.int32(3)
                put(out, 256 * b + 16 * s + i, step * np.float32((low | (high << np.int32(4))) - np.int32(32)))
        p += 210


@njit
def decode_row(kind, data, p, out):
    """Decode the row that starts at byte p into out [cols]; ``kind`` is the ggml type id."""
    if kind == Q4_K:
        decode_q4_k(data, p, out)
    elif kind == Q6_K:
        decode_q6_k(data, p, out)
    elif kind == Q5_K:
        decode_q5_k(data, p, out)
    elif kind == Q8_0:
        decode_q8_0(data, p, out)
    elif kind == Q4_0:
        decode_q4_0(data, p, out)
    else:
        decode_plain(kind, data, p, out)


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


@njit("void(i8, i8, u1[::1], i8[::1], f4[:, ::1], i8, i8)", nogil=True, cache=True)
def embed_rows(kind, row_bytes, data, ids, y, first, last):
    """y[t] = W[ids[t]] for t in first..last-1; y [T, cols]."""
    for t in range(first, last):
        decode_row(kind, data, ids[t] * row_bytes, y[t])


def layout(w: Matrix) -> tuple[int, int]:
    """(ggml type id, bytes of a row) as the kernels take them."""
    kind = BY_NAME[w.type]
    return kind.id, kind.row_bytes(w.cols)
