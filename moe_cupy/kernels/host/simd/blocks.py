"""Formats of 32 weights with one float scale, and unquantized ones: what a block holds, as vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moe_cupy.kernels.host.simd.code import F32, I8, I16, I32, Code, Value, constant, vector
from moe_cupy.kernels.host.simd.isa import BYTES, Portable
from moe_cupy.kernels.host.simd.superblocks import IQ4_VALUES, table_codes
from moe_ref.quants.fp4 import E2M1_DOUBLED

FP4_VALUES = tuple(int(v) for v in E2M1_DOUBLED)
NIBBLES = tuple(range(-8, 8))


@dataclass(frozen=True, slots=True)
class Block:
    """32 weights ``d * code``, or ``d * code + base`` with codes that are not signed."""

    d: Value  # float32
    codes: Value  # 32 bytes, signed unless there is a base
    base: Value = None  # float32


BlockDecoder = Callable[[Code, Portable, Value], Block]


def _fifth_bits(code: Code, at: Value) -> Value:
    """32 bits -> 32 bytes, 16 where the bit is set: byte i looks at bit i % 8 of byte i / 8."""
    bits = code.pick(code.read(vector(I8, 4), at), [i // 8 for i in range(32)])
    own = code.and_(bits, constant(BYTES, [1 << i % 8 for i in range(32)]))
    return code.select(code.icmp_unsigned("!=", own, constant(BYTES, 0)), constant(BYTES, 16), constant(BYTES, 0))


def _nibbles(code: Code, at: Value) -> Value:
    """32 bytes: the low, then the high nibbles of 16."""
    packed = code.read(vector(I8, 16), at)
    return code.pick(code.mask(packed, 15), range(32), code.right(packed, 4))


def q8_0(code: Code, isa: Portable, at: Value) -> Block:
    """byte 0 d, 2 signed bytes."""
    return Block(isa.half(code, code.read(I16, at)), code.read(BYTES, at, 2))


def q4_0(code: Code, isa: Portable, at: Value) -> Block:
    """byte 0 d, 2 nibbles less 8."""
    return Block(isa.half(code, code.read(I16, at)), table_codes(code, isa, NIBBLES, code.at(at, 2)))


def q4_1(code: Code, isa: Portable, at: Value) -> Block:
    """byte 0 d, 2 base, 4 nibbles."""
    d, base = (isa.half(code, code.read(I16, at, offset)) for offset in (0, 2))
    return Block(d, _nibbles(code, code.at(at, 4)), base)


def q5_0(code: Code, isa: Portable, at: Value) -> Block:
    """byte 0 d, 2 fifth bits, 6 nibbles; less 16."""
    codes = code.or_(_nibbles(code, code.at(at, 6)), _fifth_bits(code, code.at(at, 2)))
    return Block(isa.half(code, code.read(I16, at)), code.sub(codes, constant(BYTES, 16)))


def q5_1(code: Code, isa: Portable, at: Value) -> Block:
    """byte 0 d, 2 base, 4 fifth bits, 8 nibbles."""
    d, base = (isa.half(code, code.read(I16, at, offset)) for offset in (0, 2))
    return Block(d, code.or_(_nibbles(code, code.at(at, 8)), _fifth_bits(code, code.at(at, 4))), base)


def iq4_nl(code: Code, isa: Portable, at: Value) -> Block:
    """byte 0 d, 2 indices into a table of signed values."""
    return Block(isa.half(code, code.read(I16, at)), table_codes(code, isa, IQ4_VALUES, code.at(at, 2)))


def mxfp4(code: Code, isa: Portable, at: Value) -> Block:
    """byte 0 exponent e, 1 indices into a table of doubled values: d is half of 2^(e - 127), denormal below e = 2."""
    e = code.zext(code.read(I8, at), I32)
    normal = code.left(code.sub(e, constant(I32, 1)), 23)
    small = code.shl(constant(I32, 0x200000), code.mask(e, 1))
    bits = code.select(code.icmp_unsigned(">", e, constant(I32, 1)), normal, small)
    return Block(code.bitcast(bits, F32), table_codes(code, isa, FP4_VALUES, code.at(at, 1)))


BLOCKS: dict[str, BlockDecoder] = {
    "Q8_0": q8_0, "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "IQ4_NL": iq4_nl, "MXFP4": mxfp4,
}  # fmt: skip


def f32(code: Code, isa: Portable, at: Value) -> Value:
    return code.read(vector(F32, 8), at)


def bf16(code: Code, isa: Portable, at: Value) -> Value:
    wide = code.zext(code.read(vector(I16, 8), at), vector(I32, 8))
    return code.bitcast(code.left(wide, 16), vector(F32, 8))


def f16(code: Code, isa: Portable, at: Value) -> Value:
    return isa.half(code, code.read(vector(I16, 8), at))


FLOATS: dict[str, tuple[int, Callable[[Code, Portable, Value], Value]]] = {  # bytes a weight, 8 weights as float32
    "F32": (4, f32), "F16": (2, f16), "BF16": (2, bf16),
}  # fmt: skip
