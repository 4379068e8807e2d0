"""IQ4_XS: 256 weights as two times four parts of 32 with a scale each, met like four blocks (``blocks.py``)."""

from __future__ import annotations

from collections.abc import Sequence

from moe_cupy.kernels.host.simd.blocks import IQ4_UNSIGNED
from moe_cupy.kernels.host.simd.code import F32, I8, I16, I32, I64, Address, Code, Value, constant, vector
from moe_cupy.kernels.host.simd.isa import WORDS, Portable
from moe_cupy.kernels.host.simd.superblocks import halves

NIBBLES = (16, 0x0000FFFF0000FFFF), (8, 0x00FF00FF00FF00FF), (4, 0x0F0F0F0F0F0F0F0F)
PAIRS = (24, 0x000000FF000000FF), (12, 0x000F000F000F000F), (6, 0x0303030303030303)


def _spread(code: Code, bits: Value, steps: Sequence[tuple[int, int]]) -> Value:
    """Groups of bits that stand side by side, each into a byte of int64: halves are moved apart, then their halves."""
    bits = code.zext(bits, I64)
    for by, kept in steps:
        bits = code.mask(code.or_(bits, code.left(bits, by)), kept)
    return bits


def _scales(code: Code, at: Address) -> Value:
    """float32 [8]: of each, byte 2 has two high bits and byte 4 four low ones; less 32."""
    low, high = _spread(code, code.read(I32, at, 4), NIBBLES), _spread(code, code.read(I16, at, 2), PAIRS)
    scales = code.bitcast(code.or_(low, code.left(high, 4)), vector(I8, 8))
    scales = code.sub(code.zext(scales, vector(I32, 8)), constant(vector(I32, 8), 32))
    return code.float_of(scales)


def add_iq4_xs(
    isa: Portable, code: Code, at: Sequence[Address], panel: Sequence[Value], sums: Sequence[Sequence[Value]]
) -> None:
    """Add the products of 256 weights with each column. Byte 0 d, 2 scales, 8 indices into a table of signed values."""
    (at,), (values, steps, lane_sums) = at, panel
    (d,) = halves(code, isa, at, 0, 1)
    scales = code.fmul(_scales(code, at), code.pick(d, [0] * 8))  # exact: 11 and 6 bits
    for half in (0, 1):
        codes = isa.look_up_nibbles(code, IQ4_UNSIGNED, code.read(vector(I8, 64), at, 8 + 64 * half))
        multiply = isa.eights(code, codes, 128)
        own = code.pick(scales, [4 * half + lane // 4 for lane in range(16)])
        for c, (place,) in enumerate(sums):
            x = [code.read(vector(I8, 64), values, 256 * c + 128 * half + 64 * i) for i in (0, 1)]
            total = code.float_of(multiply(x, code.read(WORDS, lane_sums, 64 * c + 32 * half)))
            factors = code.fmul(own, code.splat(code.read(F32, steps, 4 * c), 16))
            code.store(code.multiply_add(total, factors, code.load(place)), place)
