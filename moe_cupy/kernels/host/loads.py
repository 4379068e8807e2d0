"""What decoders are made of: numbers at any byte of a row, and stores that leave a loop free to use vector lanes."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic


def _loader(element: types.Type):
    """An intrinsic (data uint8 [n], p) -> the little-endian ``element`` at byte p, which need not be aligned."""

    @intrinsic
    def load(typingctx, data, p):
        def codegen(context, builder, signature, args):
            array = context.make_array(signature.args[0])(context, builder, args[0])
            address = builder.bitcast(builder.gep(array.data, [args[1]]), context.get_value_type(element).as_pointer())
            value = builder.load(address)
            value.align = 1
            return value

        return element(data, types.int64), codegen

    return load


load_u8, load_i8, load_u16 = _loader(types.uint8), _loader(types.int8), _loader(types.uint16)
load_u32, load_f32 = _loader(types.uint32), _loader(types.float32)


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
def half_of(h):
    """Half precision in the low bits of a uint32 as float32: a multiplication moves the exponent, denormals' too."""
    value = float_from_bits(np.uint32((h & np.uint32(0x7FFF)) << np.uint32(13))) * np.float32(2.0**112)
    if (h & np.uint32(0x7C00)) == np.uint32(0x7C00):  # infinity or NaN
        value = float_from_bits(np.uint32(np.uint32(0x7F800000) | ((h & np.uint32(0x3FF)) << np.uint32(13))))
    return -value if h & np.uint32(0x8000) else value


@njit(inline="always")
def half(data, p):
    """Half precision at byte p as float32."""
    return half_of(np.uint32(load_u16(data, p)))


@njit(inline="always")
def lanes(n, out):
    """n, said so that the compiler cannot know it: a loop of known short length is unrolled before it is vectorised."""
    return min(n, out.size)
