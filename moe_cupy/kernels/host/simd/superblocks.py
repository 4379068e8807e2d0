"""Formats of 256 weights with whole-number scales: what a super-block holds, as vectors.

A weight is ``d * scale * (code - offset)`` or ``d * scale * code - floor_step * floor``, with scales (and floors) per
16 or 32 weights. So the product with activations ``step * x`` is, in whole numbers up to the last line::

    total = sum over sub-blocks of scale * sum(code * x)
    low   = sum over sub-blocks of (scale or floor) * sum(x)        # sum(x) comes with the activations
    d * step * (total - offset * low)    or    d * step * total - floor_step * step * low
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_cupy.kernels.host.simd.code import I8, I16, I32, I64, Address, Code, Value, constant, like, vector
from moe_cupy.kernels.host.simd.isa import BYTES, Portable

LOW_6_BITS, LOW_4_BITS, LOW_2_BITS = 0x3F3F3F3F3F3F3F3F, 0x0F0F0F0F, 0x03030303  # of each of four bytes


@dataclass(frozen=True, slots=True)
class SuperBlock:
    """256 weights.

    ``scales`` are int16 [16], those of the first 16 weights of each part of 32, then of the others; ``floors``, or the
    scales that an offset is multiplied with, come in the order of the weights.
    """

    d: Value  # float32 [1]
    codes: Callable[[int], Value]  # part 0..7 -> 32 bytes, unsigned
    scales: Value
    floors: Value
    floor_step: Value = None  # float32 [1]; None: ``floors`` are scales
    offset_bits: int = 0  # the offset is 2 to this, if there are no floors; 0: none


Decoder = Callable[[Code, Portable, Address], SuperBlock]  # ..., address of the block


def halves(code: Code, isa: Portable, at: Address, offset: int, count: int) -> list[Value]:
    """``count`` half-precision numbers that stand side by side, each as float32 [1]."""
    if count == 1:
        return [isa.half(code, code.read(vector(I16, 1), at, offset))]
    both = isa.half(code, code.bitcast(code.read(I32, at, offset), vector(I16, 2)))
    return [code.pick(both, [i]) for i in range(2)]


def _bytes(code: Code, words: Sequence[Value]) -> Value:
    """Four int32 -> their bytes [16]."""
    return code.bitcast(code.side_by_side(words), vector(I8, 16))


def _first_then_second(code: Code, v: Value) -> Value:
    """[16] -> [16]: those of even, then of odd place."""
    return code.pick(v, [*range(0, 16, 2), *range(1, 16, 2)])


def packed_scales(code: Code, at: Address) -> tuple[Value, Value]:
    """The 12 bytes of Q4_K and Q5_K: 8 scales and 8 floors of 6 bits, as bytes (``moe_ref.quants.k.unpack_scales``).

    Whole numbers are free to compute beside vectors. Of the first 8 bytes and the last 4::

        first   HHmmmmmm of floors 0..3 | HHssssss of scales 0..3         (the last byte is the highest)
        last                              mmmmssss of both 4..7
        high    HHmmmm of floors 4..7   | HHssss of scales 4..7           once nibbles and top bits have met
    """
    first, last = code.read(I64, at), code.zext(code.read(I32, at, 8), I64)
    nibbles = code.mask(code.or_(last, code.left(last, 28)), 0x0F0F0F0F0F0F0F0F)
    low, high = code.mask(first, LOW_6_BITS), code.or_(code.mask(code.right(first, 2), 0x3030303030303030), nibbles)
    scales = code.or_(code.mask(low, 0xFFFFFFFF), code.left(high, 32))
    floors = code.or_(code.right(low, 32), code.mask(high, 0xFFFFFFFF00000000))
    return code.bitcast(scales, vector(I8, 8)), code.bitcast(floors, vector(I8, 8))


def q6_k(code: Code, isa: Portable, at: Address) -> SuperBlock:
    """byte 0 nibbles, 128 pairs of high bits, 192 signed scales, 208 d; a half has 64 bytes and 32 bytes of them."""

    def codes(part: int) -> Value:
        half, quarter = divmod(part, 4)
        low = code.right(code.read(BYTES, at, 64 * half + 32 * (quarter % 2)), 4 * (quarter // 2))
        high = code.right(code.read(BYTES, at, 128 + 32 * half), 2 * quarter)
        return code.or_(code.mask(low, 15), code.left(code.mask(high, 3), 4))

    (d,), given = halves(code, isa, at, 208, 1), code.read(vector(I8, 16), at, 192)
    scales = code.sext(_first_then_second(code, given), like(given, I16))
    return SuperBlock(d, codes, scales, code.sext(given, like(given, I16)), offset_bits=5)


def _pairs_of_bits(code: Code, at: Address, part: int) -> Value:
    """Q2_K, Q3_K: 32 bytes hold four parts."""
    return code.mask(code.right(code.read(BYTES, at, 32 * (part // 4)), 2 * (part % 4)), 3)


def q3_k(code: Code, isa: Portable, at: Address) -> SuperBlock:
    """byte 0 third bits, 32 pairs of low bits, 96 scales of 6 bits less 32, 108 d."""

    def codes(part: int) -> Value:
        third = code.mask(code.right(code.read(BYTES, at), part), 1)
        return code.or_(_pairs_of_bits(code, code.at(at, 32), part), code.left(third, 2))

    first, second, top = (code.read(I32, at, 96 + 4 * i) for i in range(3))
    lows = [code.mask(code.right(word, 4 * high), LOW_4_BITS) for high in (0, 1) for word in (first, second)]
    highs = [code.left(code.mask(code.right(top, 2 * i), LOW_2_BITS), 4) for i in range(4)]
    packed = _bytes(code, [code.or_(low, high) for low, high in zip(lows, highs, strict=True)])
    scales = code.sub(code.zext(packed, like(packed, I16)), constant(like(packed, I16), 32))
    (d,) = halves(code, isa, at, 108, 1)
    return SuperBlock(d, codes, _first_then_second(code, scales), scales, offset_bits=2)


def q2_k(code: Code, isa: Portable, at: Address) -> SuperBlock:
    """byte 0 nibbles of scale (low) and floor (high), 16 pairs of bits, 80 d, 82 floor step."""
    both = code.read(vector(I8, 16), at)
    scales, floors = (code.zext(code.mask(code.right(both, by), 15), like(both, I16)) for by in (0, 4))
    d, step = halves(code, isa, at, 80, 2)
    first = _first_then_second(code, scales)
    return SuperBlock(d, lambda part: _pairs_of_bits(code, code.at(at, 16), part), first, floors, step)


SUPER_BLOCKS: dict[str, Decoder] = {
    "Q2_K": q2_k, "Q3_K": q3_k, "Q6_K": q6_k,
}  # fmt: skip
