"""Q4_K and Q5_K: weights are moved so that a lane meets one sub-block only, and its scale is applied once.

The 128 bytes of nibbles are four rows of 32: row i holds sub-block 2i in the low bits and 2i + 1 in the high ones. The
first 16 bytes of all four make one vector, the last 16 the other::

    lanes (of four bytes)    0    1    2    3    4    5    6    7    …   15
    sub-blocks, low bits     0    0    0    0    2    2    2    2    …    6
                high bits    1    1    1    1    3    3    3    3    …    7

Both are multiplied and added into one vector of 16 sums, each at most 31 * 127 * 8 and so a 16-bit number, before any
scale is needed. Those of the low and of the high bits are packed into one vector of 32, which meets the scales.

The activations lie in the same order in their panel (``rounding.round_q8_k``): sub-blocks 0, 2, 4, 6, the first halves
of all four and then the second, and 1, 3, 5, 7 likewise. Their sums: of sub-block g in 16 bits, then 16 bits of zero.
"""

from __future__ import annotations

from collections.abc import Sequence

from moe_cupy.kernels.host.simd.code import F32, I8, I16, I32, Address, Code, Value, constant, like, vector
from moe_cupy.kernels.host.simd.isa import WORDS, Portable, nibbles
from moe_cupy.kernels.host.simd.superblocks import halves, packed_scales

BY_HALVES = ("Q4_K", "Q5_K")  # formats whose vectors are to lie in this order
LANES = 16, 8  # of the running sums: of products, and of floors


def _by_halves(code: Code, at: Address) -> Value:
    """The 128 bytes at an address: the first 16 of each 32, then the others."""
    rows = code.read(vector(I8, 128), at)
    return code.pick(rows, [32 * i + 16 * half + j for half in (0, 1) for i in range(4) for j in range(16)])


def _words(code: Code, isa: Portable, scales: Value) -> Value:
    """Bytes [8] -> int16 [32]: four times that of the low, then of the high bits."""
    many = isa.settled(code, code.pick(scales, [*range(8)] * 8))  # in each 16 bytes, where a shuffle finds them
    zero = many.type.count
    lanes = [w for i in range(4) for part in (2 * i, 2 * i + 1) for _ in range(4) for w in (16 * i + part, zero)]
    return code.bitcast(code.pick(many, lanes, constant(many.type, 0)), vector(I16, 32))


def _codes(code: Code, isa: Portable, kind: str, at: Address) -> list[Value]:
    """Of the sub-blocks in low bits, then of those in high bits, 128 bytes each."""
    packed = _by_halves(code, code.at(at, 16 if kind == "Q4_K" else 48))
    low, high = nibbles(code, packed)
    if kind == "Q4_K":
        return [low, high]
    bits = _fifth_bits(code, isa, at)
    return [code.or_(low, code.mask(bits, 16)), code.or_(high, code.mask(code.right(bits, 1), 16))]


def _fifth_bits(code: Code, isa: Portable, at: Address) -> Value:
    """Q5_K: bit g of each of 32 bytes from byte 16 on belongs to a weight of sub-block g; moved to bits 4 and 5."""
    bits = code.join([code.pick(code.read(vector(I8, 16), at, 16 + 16 * half), [*range(16)] * 4) for half in (0, 1)])
    by = [4 - 2 * i for _ in (0, 1) for i in range(4) for _ in range(4)]
    return code.bitcast(isa.moved(code, code.bitcast(bits, vector(I32, 32)), by), bits.type)


def add_by_halves(
    kind: str, isa: Portable, code: Code, at: Sequence[Address], panel: Sequence[Value], sums: Sequence[Sequence[Value]]
) -> None:
    """Add the products of 256 weights with each column.

    Byte 0 d, 2 floor step, 4 scales and floors, then nibbles; before them, in Q5_K, 32 bytes of fifth bits.
    """
    (at,), (values, steps, group_sums) = at, panel
    codes, (scales, floors) = _codes(code, isa, kind, at), packed_scales(code, code.at(at, 4))
    scales = _words(code, isa, scales)
    floors = code.bitcast(code.zext(floors, like(floors, I32)), vector(I16, 16))
    factors = halves(code, isa, at, 0, 2)
    for c, (products, lows) in enumerate(sums):
        x = [code.read(vector(I8, 128), values, 256 * c + 128 * odd) for odd in (0, 1)]
        total = isa.scaled(code, None, isa.packed_fours(code, codes, x), scales)
        low = isa.scaled(code, None, code.read(WORDS, group_sums, 32 * c), floors)
        step = code.read(vector(F32, 1), steps, 4 * c)
        d, floor_step = (
            code.pick(code.fmul(one, step), [0] * count) for one, count in zip(factors, LANES, strict=True)
        )
        code.store(code.multiply_add(code.float_of(total), d, code.load(products)), products)
        code.store(code.multiply_add(code.fneg(code.float_of(low)), floor_step, code.load(lows)), lows)
