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

from moe_cupy.kernels.host.simd.code import I8, I16, I32, I64, Code, Value, constant, vector
from moe_cupy.kernels.host.simd.isa import BYTES, Portable
from moe_ref.quants.iq4 import VALUES

IQ4_VALUES = tuple(int(v) for v in VALUES)
LOW_6_BITS, LOW_4_BITS, LOW_2_BITS = 0x3F3F3F3F, 0x0F0F0F0F, 0x03030303  # of each of four bytes


@dataclass(frozen=True, slots=True)
class SuperBlock:
    """256 weights. ``scales`` and ``floors`` are int16 [16], one for each 16 weights."""

    d: Value  # float32
    codes: Callable[[int], Value]  # part 0..7 -> 32 bytes, unsigned unless ``signed``
    scales: Value
    floors: Value = None
    floor_step: Value = None  # float32
    offset_bits: int = 0  # the offset is 2 to this, if there are no floors; 0: none
    signed: bool = False


Decoder = Callable[[Code, Portable, Value], SuperBlock]  # ..., address of the block


def _bytes(code: Code, words: Sequence[Value]) -> Value:
    """Four or two int32 -> a vector of their bytes."""
    whole = constant(vector(I32, len(words)), 0)
    for i, word in enumerate(words):
        whole = code.insert_element(whole, word, constant(I32, i))
    return code.bitcast(whole, vector(I8, 4 * len(words)))


def _doubled(code: Code, v: Value, first: int = 0) -> Value:
    """Eight values from ``first`` on -> [16], each twice: scales of 32 weights as scales of 16."""
    return code.pick(v, [first + i // 2 for i in range(16)])


def _scales_and_floors(code: Code, at: Value) -> tuple[Value, Value]:
    """The 12 bytes of Q4_K and Q5_K: 8 scales and 8 floors of 6 bits (``moe_ref.quants.k.unpack_scales``).

    As four 32-bit words, the last of which is not ours::

        v       HHssssss of scales 0..3 | HHmmmmmm of floors 0..3 | mmmmssss of both 4..7 | …
        low     ssssss 0..3             | mmmmmm 0..3
        high    HHssss 4..7             | HHmmmm 4..7               from the third word, shifted by 0 and 4
    """
    v = code.read(vector(I32, 4), at)
    low, top = code.mask(v, LOW_6_BITS), code.mask(code.right(v, 2), 0x30303030)
    nibbles = code.mask(code.lshr(code.pick(v, [2] * 4), constant(vector(I32, 4), [0, 4, 0, 0])), LOW_4_BITS)
    all_words = code.pick(low, [0, 4, 1, 5], code.or_(nibbles, top))  # scales 0..3, 4..7, floors 0..3, 4..7
    wide = code.zext(code.bitcast(all_words, vector(I8, 16)), vector(I16, 16))
    return _doubled(code, wide), _doubled(code, wide, 8)


def _nibbles(code: Code, at: Value, part: int) -> Value:
    """Q4_K, Q5_K: 32 bytes hold two parts, the even one in the low bits."""
    return code.mask(code.right(code.read(BYTES, at, 32 * (part // 2)), 4 * (part % 2)), 15)


def q4_k(code: Code, isa: Portable, at: Value) -> SuperBlock:
    """byte 0 d, 2 floor step, 4 scales and floors, 16 nibbles."""
    d, step = (isa.half(code, code.read(I16, at, offset)) for offset in (0, 2))
    scales, floors = _scales_and_floors(code, code.at(at, 4))
    return SuperBlock(d, lambda part: _nibbles(code, code.at(at, 16), part), scales, floors, step)


def q5_k(code: Code, isa: Portable, at: Value) -> SuperBlock:
    """Q4_K with a fifth bit: bit ``part`` of 32 bytes from byte 16 on; nibbles from byte 48."""
    d, step = (isa.half(code, code.read(I16, at, offset)) for offset in (0, 2))
    scales, floors = _scales_and_floors(code, code.at(at, 4))

    def codes(part: int) -> Value:
        high = code.read(BYTES, at, 16)
        moved = code.left(high, 4 - part) if part <= 4 else code.right(high, part - 4)
        return code.or_(_nibbles(code, code.at(at, 48), part), code.mask(moved, 16))

    return SuperBlock(d, codes, scales, floors, step)


def q6_k(code: Code, isa: Portable, at: Value) -> SuperBlock:
    """byte 0 nibbles, 128 pairs of high bits, 192 signed scales, 208 d; a half has 64 bytes and 32 bytes of them."""

    def codes(part: int) -> Value:
        half, quarter = divmod(part, 4)
        low = code.right(code.read(BYTES, at, 64 * half + 32 * (quarter % 2)), 4 * (quarter // 2))
        high = code.right(code.read(BYTES, at, 128 + 32 * half), 2 * quarter)
        return code.or_(code.mask(low, 15), code.left(code.mask(high, 3), 4))

    scales = code.sext(code.read(vector(I8, 16), at, 192), vector(I16, 16))
    return SuperBlock(isa.half(code, code.read(I16, at, 208)), codes, scales, offset_bits=5)


def _pairs_of_bits(code: Code, at: Value, part: int) -> Value:
    """Q2_K, Q3_K: 32 bytes hold four parts."""
    return code.mask(code.right(code.read(BYTES, at, 32 * (part // 4)), 2 * (part % 4)), 3)


def q3_k(code: Code, isa: Portable, at: Value) -> SuperBlock:
    """byte 0 third bits, 32 pairs of low bits, 96 scales of 6 bits less 32, 108 d."""

    def codes(part: int) -> Value:
        third = code.mask(code.right(code.read(BYTES, at), part), 1)
        return code.or_(_pairs_of_bits(code, code.at(at, 32), part), code.left(third, 2))

    first, second, top = (code.read(I32, at, 96 + 4 * i) for i in range(3))
    lows = [code.mask(code.right(word, 4 * high), LOW_4_BITS) for high in (0, 1) for word in (first, second)]
    highs = [code.left(code.mask(code.right(top, 2 * i), LOW_2_BITS), 4) for i in range(4)]
    packed = _bytes(code, [code.or_(low, high) for low, high in zip(lows, highs, strict=True)])
    scales = code.sub(code.zext(packed, vector(I16, 16)), constant(vector(I16, 16), 32))
    return SuperBlock(isa.half(code, code.read(I16, at, 108)), codes, scales, offset_bits=2)


def q2_k(code: Code, isa: Portable, at: Value) -> SuperBlock:
    """byte 0 nibbles of scale (low) and floor (high), 16 pairs of bits, 80 d, 82 floor step."""
    both = code.read(vector(I8, 16), at)
    scales, floors = (code.zext(code.mask(code.right(both, by), 15), vector(I16, 16)) for by in (0, 4))
    d, step = (isa.half(code, code.read(I16, at, offset)) for offset in (80, 82))
    return SuperBlock(d, lambda part: _pairs_of_bits(code, code.at(at, 16), part), scales, floors, step)


def table_codes(code: Code, isa: Portable, table: tuple[int, ...], at: Value) -> Value:
    """32 signed bytes: entries of a table at the low, then at the high nibbles of 16 bytes."""
    packed = code.read(vector(I8, 16), at)
    return isa.look_up(code, table, code.pick(code.mask(packed, 15), range(32), code.right(packed, 4)))


def iq4_xs(code: Code, isa: Portable, at: Value) -> SuperBlock:
    """byte 0 d, 2 top two bits and 4 low four bits of 8 scales less 32, 8 indices into a table of signed values."""
    low, high = code.zext(code.read(I32, at, 4), I64), code.zext(code.read(I16, at, 2), I64)
    scales = constant(vector(I16, 8), 0)
    for i in range(8):
        scale = code.or_(code.mask(code.right(low, 4 * i), 15), code.left(code.mask(code.right(high, 2 * i), 3), 4))
        scales = code.insert_element(scales, code.trunc(scale, I16), constant(I32, i))
    scales = _doubled(code, code.sub(scales, constant(vector(I16, 8), 32)))
    d = isa.half(code, code.read(I16, at))
    return SuperBlock(
        d, lambda part: table_codes(code, isa, IQ4_VALUES, code.at(at, 8 + 16 * part)), scales, signed=True
    )


SUPER_BLOCKS: dict[str, Decoder] = {
    "Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k, "IQ4_XS": iq4_xs,
}  # fmt: skip
