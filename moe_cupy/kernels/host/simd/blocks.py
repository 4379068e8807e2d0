"""Formats of 32 weights with one float scale, of which four blocks are met at a time, and unquantized ones.

The codes of four blocks make two vectors of 64 bytes: of each block the first 16 weights, then of each the last 16. A
lane of four bytes meets one block only, so its sum of eight products is a whole number that one factor belongs to::

    lanes (of four bytes)    0    1    2    3    4    …    7    8    …   15
    block                    0    0    0    0    1    …    1    2    …    3

The activations lie in the same order in their panel (``rounding.round_q8_0``), with the sums of what each lane meets:
codes are made unsigned, as the CPU wants them, and so many offsets are taken away from their products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llvmlite import ir

from moe_cupy.kernels.host.simd.code import F32, I1, I8, I16, I32, I64, Address, Code, Value, constant, like, vector
from moe_cupy.kernels.host.simd.isa import Portable, nibbles
from moe_ref.quants.fp4 import E2M1_DOUBLED
from moe_ref.quants.iq4 import VALUES

FP4_UNSIGNED = tuple(int(v) + 16 for v in E2M1_DOUBLED)
IQ4_UNSIGNED = tuple(int(v) + 128 for v in VALUES)
POWERS = (0x200000, 0x400000, *((e - 1) << 23 for e in range(2, 256)))  # 2^(e - 128), bits of float32


@dataclass(frozen=True, slots=True)
class Blocks:
    """32 weights of each of four blocks, ``d * (code - offset)`` or ``d * code + base``."""

    d: Value  # float32 [4]
    codes: Sequence[Value]  # two times 64 bytes
    offset: int = 0  # as in ``Portable.eights``
    base: Value = None  # float32 [4]


BlockDecoder = Callable[[Code, Portable, Sequence[Address]], Blocks]


def _packed(code: Code, parts: Sequence[Value]) -> Value:
    """Whole numbers as one that holds them all; computed beside vectors, where it is free."""
    width = parts[0].type.width
    wide = ir.IntType(width * len(parts))
    made = code.zext(parts[0], wide)
    for i, part in enumerate(parts[1:], 1):
        made = code.or_(made, code.left(code.zext(part, wide), width * i))
    return code.kept_whole(made)


def _side_by_side(code: Code, kind: ir.IntType, at: Sequence[Address], offset: int) -> Value:
    return _packed(code, [code.read(kind, one, offset) for one in at])


def _halves(code: Code, isa: Portable, at: Sequence[Address], offset: int) -> Value:
    """A half-precision number of each block, float32 [4]."""
    return isa.half(code, code.bitcast(_side_by_side(code, I16, at, offset), vector(I16, 4)))


def _sixteens(code: Code, at: Sequence[Address], offset: int) -> Value:
    """16 bytes of each block."""
    return code.join([code.read(vector(I8, 16), one, offset) for one in at])


def _with_fifth_bits(code: Code, at: Sequence[Address], offset: int) -> list[Value]:
    """32 fifth bits, then 16 bytes of nibbles."""
    made = []
    for half, codes in enumerate(nibbles(code, _sixteens(code, at, offset + 4))):
        is_set = code.bitcast(_side_by_side(code, I16, at, offset + 2 * half), vector(I1, 64))
        made.append(code.select(is_set, code.add(codes, constant(codes.type, 16)), codes))
    return made


def q8_0(code: Code, isa: Portable, at: Sequence[Address]) -> Blocks:
    """byte 0 d, 2 signed bytes."""
    whole = code.join([code.read(vector(I8, 32), one, 2) for one in at])
    codes = [code.pick(whole, [32 * i + 16 * half + j for i in range(4) for j in range(16)]) for half in (0, 1)]
    return Blocks(_halves(code, isa, at, 0), [code.xor(v, constant(v.type, -128)) for v in codes], 128)


def q4_0(code: Code, isa: Portable, at: Sequence[Address]) -> Blocks:
    """byte 0 d, 2 nibbles less 8."""
    return Blocks(_halves(code, isa, at, 0), nibbles(code, _sixteens(code, at, 2)), 8)


def q4_1(code: Code, isa: Portable, at: Sequence[Address]) -> Blocks:
    """byte 0 d, 2 base, 4 nibbles."""
    return Blocks(_halves(code, isa, at, 0), nibbles(code, _sixteens(code, at, 4)), base=_halves(code, isa, at, 2))


def q5_0(code: Code, isa: Portable, at: Sequence[Address]) -> Blocks:
    """byte 0 d, 2 fifth bits, 6 nibbles; less 16."""
    return Blocks(_halves(code, isa, at, 0), _with_fifth_bits(code, at, 2), 16)


def q5_1(code: Code, isa: Portable, at: Sequence[Address]) -> Blocks:
    """byte 0 d, 2 base, 4 fifth bits, 8 nibbles."""
    return Blocks(_halves(code, isa, at, 0), _with_fifth_bits(code, at, 4), base=_halves(code, isa, at, 2))


def iq4_nl(code: Code, isa: Portable, at: Sequence[Address]) -> Blocks:
    """byte 0 d, 2 indices into a table of signed values."""
    return Blocks(_halves(code, isa, at, 0), isa.look_up_nibbles(code, IQ4_UNSIGNED, _sixteens(code, at, 2)), 128)


def mxfp4(code: Code, isa: Portable, at: Sequence[Address]) -> Blocks:
    """byte 0 exponent e, 1 indices into a table of doubled values: d is half of 2^(e - 127), denormal below e = 2."""
    table = code.table("powers", I32, POWERS)
    found = [code.read(I32, table, code.left(code.zext(code.read(I8, one), I64), 2)) for one in at]
    pairs = code.side_by_side([_packed(code, found[i : i + 2]) for i in (0, 2)])
    codes = isa.look_up_nibbles(code, FP4_UNSIGNED, _sixteens(code, at, 1))
    return Blocks(code.bitcast(pairs, vector(F32, 4)), codes, 16)


BLOCKS: dict[str, BlockDecoder] = {
    "Q8_0": q8_0, "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "IQ4_NL": iq4_nl, "MXFP4": mxfp4,
}  # fmt: skip
WITH_BASE = ("Q4_1", "Q5_1")


def add_blocks(
    kind: str, isa: Portable, code: Code, at: Sequence[Address], panel: Sequence[Value], sums: Sequence[Sequence[Value]]
) -> None:
    """Add the products of four blocks with each column."""
    blocks, (values, steps, block_sums) = BLOCKS[kind](code, isa, at), panel
    multiply = isa.eights(code, blocks.codes, blocks.offset)
    for c, (products, *bases) in enumerate(sums):
        x = [code.read(vector(I8, 64), values, 128 * c + 64 * half) for half in (0, 1)]
        total = multiply(x, code.read(vector(I16, 16), block_sums, 32 * c) if blocks.offset else None)
        factors = code.fmul(blocks.d, code.read(vector(F32, 4), steps, 16 * c))
        factors = code.pick(factors, [lane // 4 for lane in range(16)])
        code.store(code.multiply_add(code.float_of(total), factors, code.load(products)), products)
        for place in bases:
            given = code.read(vector(F32, 4), block_sums, 16 * c)
            code.store(code.multiply_add(blocks.base, given, code.load(place)), place)


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
