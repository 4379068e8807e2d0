"""Instruction sets: how vectors of 32 small whole numbers are multiplied and added up in groups of four.

All three give the same whole numbers, and their floats are added in the same order. On x86 the first step is
``pmaddubsw``, which multiplies unsigned with signed bytes and adds neighbours to 16 bits::

    codes   u0 u1 u2 u3 …   (0..128)
    x       x0 x1 x2 x3 …   (-127..127)
    pairs   u0 x0 + u1 x1, u2 x2 + u3 x3, …          at most 2 * 128 * 127 = 32512: it fits

The second, ``pmaddwd``, multiplies pairs with 16-bit scales and adds neighbours again, to 32 bits; VNNI's ``vpdpwssd``
also adds the result to a running total. Signed codes go in as (their size, x with their sign).
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache

from llvmlite import ir

from moe_cupy.kernels.host.simd.code import F16, F32, I8, I16, I32, Code, Value, constant, like, vector

BYTES, WORDS, LONGS = vector(I8, 32), vector(I16, 16), vector(I32, 8)
VARIABLE = "MOE_CUPY_SIMD"  # the environment's choice of an instruction set


def _neighbours(code: Code, v: Value) -> Value:
    """v [2n] -> the sums of neighbours [n]."""
    count = v.type.count
    return code.add(code.pick(v, range(0, count, 2)), code.pick(v, range(1, count, 2)))


@dataclass(frozen=True)
class Portable:
    """Plain vector arithmetic that LLVM maps to whatever the CPU has."""

    name: str = "portable"
    cpu: str = ""
    features: str = ""
    wide: int = 1  # vectors of 32 bytes that are taken as one where the format allows it
    columns: int = 4  # most vectors that a row is multiplied with at a time: as many as registers hold

    def pairs(self, code: Code, codes: Value, x: Value) -> Value:
        """Unsigned codes and signed x, 32 bytes each -> int16 [16], sums of two products."""
        wide = vector(I16, 32)
        return _neighbours(code, code.mul(code.zext(codes, wide), code.sext(x, wide)))

    def scaled(self, code: Code, total: Value, pairs: Value, scales: Value) -> Value:
        """total int32 [8] + sums of two of pairs * scales, both int16 [16]."""
        wide = vector(I32, 16)
        return code.add(total, _neighbours(code, code.mul(code.sext(pairs, wide), code.sext(scales, wide))))

    def fours(self, code: Code, codes: Value, x: Value) -> Value:
        """int32 [8], sums of four products."""
        return self.scaled(code, constant(LONGS, 0), self.pairs(code, codes, x), constant(WORDS, 1))

    def sizes(self, code: Code, v: Value) -> Value:
        """Absolute values of signed bytes."""
        return code.call_llvm("llvm.abs.v32i8", BYTES, v, ir.Constant(ir.IntType(1), 0))

    def signed_by(self, code: Code, x: Value, v: Value) -> Value:
        """x with the sign of v; what it is where v is 0 does not matter."""
        return code.select(code.icmp_signed("<", v, constant(BYTES, 0)), code.neg(x), x)

    def half(self, code: Code, bits: Value) -> Value:
        """Half precision, its bits as int16 (or a vector of them), as float32: a multiplication moves the exponent."""
        whole, real = like(bits, I32), like(bits, F32)
        wide = code.zext(bits, whole)
        size = code.bitcast(code.left(code.mask(wide, 0x7FFF), 13), real)
        moved = code.bitcast(code.fmul(size, constant(real, 2.0**112)), whole)
        special = code.icmp_unsigned("==", code.mask(wide, 0x7C00), constant(whole, 0x7C00))  # infinite or no number
        kept = code.or_(code.left(code.mask(wide, 0x3FF), 13), constant(whole, 0x7F800000))
        sign = code.left(code.mask(wide, 0x8000), 16)
        return code.bitcast(code.or_(code.select(special, kept, moved), sign), real)

    def look_up(self, code: Code, table: tuple[int, ...], index: Value) -> Value:
        """table[index] for 32 bytes of 0..15: halves of the table are chosen between, a bit of the index at a time."""
        layer = [constant(BYTES, value) for value in table]
        for bit in range(4):
            is_set = code.icmp_unsigned("!=", code.mask(index, 1 << bit), constant(BYTES, 0))
            layer = [code.select(is_set, b, a) for a, b in zip(layer[::2], layer[1::2], strict=True)]
        return layer[0]


@dataclass(frozen=True)
class Avx2(Portable):
    """x86 since 2013."""

    name: str = "avx2"
    cpu: str = "x86-64-v3"

    def pairs(self, code: Code, codes: Value, x: Value) -> Value:
        return code.call_llvm("llvm.x86.avx2.pmadd.ub.sw", WORDS, codes, x)

    def scaled(self, code: Code, total: Value, pairs: Value, scales: Value) -> Value:
        return code.add(total, code.call_llvm("llvm.x86.avx2.pmadd.wd", LONGS, pairs, scales))

    def signed_by(self, code: Code, x: Value, v: Value) -> Value:
        return code.call_llvm("llvm.x86.avx2.psign.b", BYTES, x, v)

    def half(self, code: Code, bits: Value) -> Value:
        if isinstance(bits.type, ir.VectorType):
            return code.fpext(code.bitcast(bits, like(bits, F16)), like(bits, F32))
        # Left to itself the compiler inserts a single one into a register that holds something else, for which it then
        # has to wait: if that is the running sum, a whole block's latency. vmovd writes all of its register.
        convert = ir.InlineAsm(ir.FunctionType(F32, [I32]), "vmovd $1, $0; vcvtph2ps $0, $0", "=x,r")
        return code.call(convert, [code.zext(bits, I32)])

    def look_up(self, code: Code, table: tuple[int, ...], index: Value) -> Value:
        return code.call_llvm("llvm.x86.avx2.pshuf.b", BYTES, constant(BYTES, table * 2), index)


@dataclass(frozen=True)
class Avx512(Avx2):
    """x86 with AVX-512 and VNNI: products are added to a total in one step, and there are 32 registers."""

    name: str = "avx512"
    cpu: str = "x86-64-v4"
    features: str = "+avx512vnni"
    wide: int = 2
    columns: int = 8

    def pairs(self, code: Code, codes: Value, x: Value) -> Value:
        if codes.type.count == 32:
            return super().pairs(code, codes, x)
        return code.call_llvm("llvm.x86.avx512.pmaddubs.w.512", vector(I16, 32), codes, x)

    def scaled(self, code: Code, total: Value, pairs: Value, scales: Value) -> Value:
        return code.call_llvm(f"llvm.x86.avx512.vpdpwssd.{16 * pairs.type.count}", total.type, total, pairs, scales)

    def fours(self, code: Code, codes: Value, x: Value) -> Value:
        return code.call_llvm("llvm.x86.avx512.vpdpbusd.256", LONGS, constant(LONGS, 0), codes, x)


SETS: dict[str, Portable] = {one.name: one for one in (Portable(), Avx2(), Avx512())}
NEEDS = {"portable": (), "avx2": ("avx2", "fma", "f16c", "bmi2"), "avx512": ("avx512bw", "avx512vl", "avx512vnni")}


def usable() -> tuple[str, ...]:
    """Names of the instruction sets that this CPU has, the best last."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ("portable",)
    from llvmlite import binding

    has = binding.get_host_cpu_features()
    return tuple(name for name, needed in NEEDS.items() if all(has.get(feature) for feature in needed))


@cache
def chosen() -> Portable:
    """The best instruction set of this CPU, or the one that the environment names. Raises ValueError for another."""
    names, asked = usable(), os.environ.get(VARIABLE, "")
    if asked and asked not in names:
        raise ValueError(f"{VARIABLE}={asked}: this CPU has {', '.join(names)}")
    return SETS[asked or names[-1]]
