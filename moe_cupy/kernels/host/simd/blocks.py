"""Formats of 32 weights with one float scale, and unquantized ones: what a block holds, as vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moe_cupy.kernels.host.simd.code import F32, I8, I16, I32, Address, Code, Value, constant, like, vector
from moe_cupy.kernels.host.simd.isa import BYTES, Portable
from moe_cupy.kernels.host.simd.superblocks import IQ4_VALUES, halves, table_codes
from moe_ref.quants.fp4 import E2M1_DOUBLED

FP4_VALUES = tuple(int(v) for v in E2M1_DOUBLED)
NIBBLES = tuple(range(-8, 8))


@dataclass(frozen=True, slots=True)
class Block:
    """32 weights of each row, ``d * code``, or ``d * code + base`` with codes that are not signed."""

    d: Value  # float32 [1]
    codes: Value  # 32 bytes, signed unless there is a base
    base: Value = None  # float32 [1]


BlockDecoder = Callable[[Code, Portable, Address], Block]


def _fifth_bits(code: Code, at: Address) -> Value:
    """32 bits -> 32 bytes, 16 where the bit is set: byte i looks at bit i % 8 of byte i / 8."""
    bits = code.each(code.read(vector(I8, 4), at), [i // 8 for i in range(32)])
    own = code.and_(bits, code.for_each(I8, [1 << i % 8 for i in range(32)]))
    zero = constant(bits.type, 0)
    return code.select(code.icmp_unsigned("!=", own, zero), constant(bits.type, 16), zero)


def _nibbles(code: Code, at: Address) -> Value:
    """32 bytes: the low, then the high nibbles of 16."""
    packed = code.read(vector(I8, 16), at)
    return code.each(code.mask(packed, 15), range(32), code.right(packed, 4))


def q8_0(code: Code, isa: Portable, at: Address) -> Block:
    """byte 0 d, 2 signed bytes."""
    return Block(halves(code, isa, at, 0, 1)[0], code.read(BYTES, at, 2))


def q4_0(code: Code, isa: Portable, at: Address) -> Block:
    """byte 0 d, 2 nibbles less 8."""
    return Block(halves(code, isa, at, 0, 1)[0], table_codes(code, isa, NIBBLES, code.at(at, 2)))


def q4_1(code: Code, isa: Portable, at: Address) -> Block:
    """byte 0 d, 2 base, 4 nibbles."""
    d, base = halves(code, isa, at, 0, 2)
    return Block(d, _nibbles(code, code.at(at, 4)), base)


def q5_0(code: Code, isa: Portable, at: Address) -> Block:
    """byte 0 d, 2 fifth bits, 6 nibbles; less 16."""
    codes = code.or_(_nibbles(code, code.at(at, 6)), _fifth_bits(code, code.at(at, 2)))
    return Block(halves(code, isa, at, 0, 1)[0], code.sub(codes, constant(codes.type, 16)))


def q5_1(code: Code, isa: Portable, at: Address) -> Block:
    """byte 0 d, 2 base, 4 fifth bits, 8 nibbles."""
    d, base = halves(code, isa, at, 0, 2)
    return Block(d, code.or_(_nibbles(code, code.at(at, 8)), _fifth_bits(code, code.at(at, 4))), base)


def iq4_nl(code: Code, isa: Portable, at: Address) -> Block:
    """byte 0 d, 2 indices into a table of signed values."""
    return Block(halves(code, isa, at, 0, 1)[0], table_codes(code, isa, IQ4_VALUES, code.at(at, 2)))


def mxfp4(code: Code, isa: Portable, at: Address) -> Block:
    """byte 0 exponent e, 1 indices into a table of doubled values: d is half of 2^(e - 127), denormal below e = 2."""
    given = code.read(I8, at)
    e = code.zext(given, like(given, I32))
    normal = code.left(code.sub(e, constant(e.type, 1)), 23)
    small = code.shl(constant(e.type, 0x200000), code.mask(e, 1))
    bits = code.select(code.icmp_unsigned(">", e, constant(e.type, 1)), normal, small)
    return Block(code.bitcast(bits, like(bits, F32)), table_codes(code, isa, FP4_VALUES, code.at(at, 1)))


BLOCKS: dict[str, BlockDecoder] = {
    "Q8_0": q8_0, "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "IQ4_NL": iq4_nl, "MXFP4": mxfp4,
}  # fmt: skip


def f32(code: Code, isa: Portable, at: Address) -> Value:
    return code.read(vector(F32, 16), at)


def bf16(code: Code, isa: Portable, at: Address) -> Value:
    given = code.read(vector(I16, 16), at)
    return code.bitcast(code.left(code.zext(given, like(given, I32)), 16), like(given, F32))


def f16(code: Code, isa: Portable, at: Address) -> Value:
    return isa.half(code, code.read(vector(I16, 16), at))


FLOATS: dict[str, tuple[int, Callable[[Code, Portable, Address], Value]]] = {  # bytes a weight, 16 weights as float32
    "F32": (4, f32), "F16": (2, f16), "BF16": (2, bf16),
}  # fmt: skip
