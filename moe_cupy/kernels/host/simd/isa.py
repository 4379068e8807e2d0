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
from collections.abc import Sequence
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
    """Plain vector arithmetic that LLVM maps to whatever the CPU has. Vectors have 32 bytes for each row."""

    name: str = "portable"
    cpu: str = ""
    features: str = ""
    wide: int = 1  # vectors of 32 bytes that are taken as one where the format allows it
    rows: int = 1  # that a single vector is multiplied with at once
    columns: int = 4  # most vectors that a row is multiplied with at a time: as many as registers hold

    def pairs(self, code: Code, codes: Value, x: Value) -> Value:
        """Unsigned codes and signed x, 32 bytes each -> int16 [16], sums of two products."""
        return _neighbours(code, code.mul(code.zext(codes, like(codes, I16)), code.sext(x, like(x, I16))))

    def scaled(self, code: Code, total: Value, pairs: Value, scales: Value) -> Value:
        """total int32 [8] (None: zeros) + sums of two of pairs * scales, both int16 [16]."""
        wide = like(pairs, I32)
        sums = _neighbours(code, code.mul(code.sext(pairs, wide), code.sext(scales, wide)))
        return sums if total is None else code.add(total, sums)

    def fours(self, code: Code, codes: Value, x: Value) -> Value:
        """int32 [8], sums of four products."""
        pairs = self.pairs(code, codes, x)
        return self.scaled(code, None, pairs, constant(pairs.type, 1))

    def signed_fours(self, code: Code, codes: Value, x: Value) -> Value:
        """int32 [8], sums of four products of signed codes."""
        return self.fours(code, self.sizes(code, codes), self.signed_by(code, x, codes))

    def packed_fours(self, code: Code, codes: Sequence[Value], x: Sequence[Value]) -> Value:
        """Two times: codes below 16 and x, 128 bytes -> sums of four products, those of the last 64 bytes added.

        As int16 [32]: of each 16 bytes, the four sums of the first codes, then those of the second.
        """
        sums = []
        for some, other in zip(codes, x, strict=True):
            first, last = ([code.each(v, range(i, i + 64)) for v in (some, other)] for i in (0, 64))
            sums.append(_neighbours(code, code.add(self.pairs(code, *first), self.pairs(code, *last))))
        lanes = [4 * i + 16 * which + j for i in range(4) for which in (0, 1) for j in range(4)]
        return code.each(sums[0], lanes, sums[1])

    def sizes(self, code: Code, v: Value) -> Value:
        """Absolute values of signed bytes."""
        return code.call_llvm(f"llvm.abs.v{v.type.count}i8", v.type, v, ir.Constant(ir.IntType(1), 0))

    def signed_by(self, code: Code, x: Value, v: Value) -> Value:
        """x with the sign of v; what it is where v is 0 does not matter."""
        return code.select(code.icmp_signed("<", v, constant(v.type, 0)), code.neg(x), x)

    def half(self, code: Code, bits: Value) -> Value:
        """Half precision, its bits as a vector of int16, as float32: a multiplication moves the exponent."""
        whole, real = like(bits, I32), like(bits, F32)
        wide = code.zext(bits, whole)
        size = code.bitcast(code.left(code.mask(wide, 0x7FFF), 13), real)
        moved = code.bitcast(code.fmul(size, constant(real, 2.0**112)), whole)
        special = code.icmp_unsigned("==", code.mask(wide, 0x7C00), constant(whole, 0x7C00))  # infinite or no number
        kept = code.or_(code.left(code.mask(wide, 0x3FF), 13), constant(whole, 0x7F800000))
        sign = code.left(code.mask(wide, 0x8000), 16)
        return code.bitcast(code.or_(code.select(special, kept, moved), sign), real)

    def settled(self, code: Code, v: Value) -> Value:
        """v, of which the compiler is not to think how it was made: many values are made of it more cheaply."""
        return v

    def look_up(self, code: Code, table: tuple[int, ...], index: Value) -> Value:
        """table[index] for bytes of 0..15: halves of the table are chosen between, a bit of the index at a time."""
        layer = [constant(index.type, value) for value in table]
        for bit in range(4):
            is_set = code.icmp_unsigned("!=", code.mask(index, 1 << bit), constant(index.type, 0))
            layer = [code.select(is_set, b, a) for a, b in zip(layer[::2], layer[1::2], strict=True)]
        return layer[0]


@dataclass(frozen=True)
class Avx2(Portable):
    """x86 since 2013."""

    name: str = "avx2"
    cpu: str = "x86-64-v3"
    rows: int = 1
    register: str = "x"
    bits: int = 256

    def split(self, code: Code, name: str, result: ir.Type, *args: Value) -> Value:
        """An instruction of 32 bytes, of as many times 32 as there are; ``result`` is for 32."""
        times = args[0].type.count * args[0].type.element.width // 256
        parts = zip(*(code.parts(a, times) for a in args), strict=True)
        return code.join([code.call_llvm(name, result, *some) for some in parts])

    def pairs(self, code: Code, codes: Value, x: Value) -> Value:
        return self.split(code, "llvm.x86.avx2.pmadd.ub.sw", WORDS, codes, x)

    def scaled(self, code: Code, total: Value, pairs: Value, scales: Value) -> Value:
        sums = self.split(code, "llvm.x86.avx2.pmadd.wd", LONGS, pairs, scales)
        return sums if total is None else code.add(total, sums)

    def signed_by(self, code: Code, x: Value, v: Value) -> Value:
        return self.split(code, "llvm.x86.avx2.psign.b", BYTES, x, v)

    def settled(self, code: Code, v: Value) -> Value:
        parts = code.parts(v, max(1, v.type.count * v.type.element.width // self.bits))
        same = ir.InlineAsm(ir.FunctionType(parts[0].type, [parts[0].type]), "", f"={self.register},0")
        return code.join([code.call(same, [part]) for part in parts])

    def half(self, code: Code, bits: Value) -> Value:
        count = bits.type.count
        if count >= 8:
            return code.fpext(code.bitcast(bits, like(bits, F16)), like(bits, F32))
        if count == 1:
            return self._single_half(code, code.extract_element(bits, constant(I32, 0)))
        padded = code.pick(bits, [min(i, count) for i in range(4)], constant(bits.type, 0))
        return code.pick(code.fpext(code.bitcast(padded, vector(F16, 4)), vector(F32, 4)), range(count))

    def _single_half(self, code: Code, bits: Value) -> Value:
        # Left to itself the compiler inserts a single one into a register that holds something else, for which it then
        # has to wait: if that is the running sum, a whole block's latency. vmovd writes all of its register.
        convert = ir.InlineAsm(ir.FunctionType(F32, [I32]), "vmovd $1, $0; vcvtph2ps $0, $0", f"={self.register},r")
        return code.side_by_side([code.call(convert, [code.zext(bits, I32)])])

    def look_up(self, code: Code, table: tuple[int, ...], index: Value) -> Value:
        tables = constant(index.type, table * (index.type.count // 16))
        return self.split(code, "llvm.x86.avx2.pshuf.b", BYTES, tables, index)


@dataclass(frozen=True)
class Avx512(Avx2):
    """x86 with AVX-512 and VNNI: products are added to a total in one step, and there are 32 registers."""

    name: str = "avx512"
    cpu: str = "x86-64-v4"
    features: str = "+avx512vnni"
    wide: int = 2
    rows: int = 2
    columns: int = 8
    register: str = "v"
    bits: int = 512

    def pairs(self, code: Code, codes: Value, x: Value) -> Value:
        if codes.type.count == 32:
            return super().pairs(code, codes, x)
        return code.call_llvm("llvm.x86.avx512.pmaddubs.w.512", vector(I16, 32), codes, x)

    def scaled(self, code: Code, total: Value, pairs: Value, scales: Value) -> Value:
        if total is None:  # zeros to add to would cost a register and an instruction
            return super().scaled(code, None, pairs, scales)
        return code.call_llvm(f"llvm.x86.avx512.vpdpwssd.{16 * pairs.type.count}", total.type, total, pairs, scales)

    def fours(self, code: Code, codes: Value, x: Value) -> Value:
        total = constant(vector(I32, codes.type.count // 4), 0)
        return code.call_llvm(f"llvm.x86.avx512.vpdpbusd.{8 * codes.type.count}", total.type, total, codes, x)

    def signed_fours(self, code: Code, codes: Value, x: Value) -> Value:
        if codes.type.count == 32:
            return super().signed_fours(code, codes, x)
        raised = self.fours(code, code.xor(codes, constant(codes.type, -128)), x)  # codes + 128 are unsigned
        own = code.pick(x, range(32))  # all rows meet the same
        return code.sub(raised, code.for_all(self.fours(code, constant(own.type, -128), own)))

    def packed_fours(self, code: Code, codes: Sequence[Value], x: Sequence[Value]) -> Value:
        if code.rows > 1:
            return super().packed_fours(code, codes, x)
        sums = []
        for some, other in zip(codes, x, strict=True):
            total = constant(vector(I32, 16), 0)
            for i in (0, 64):
                now = [code.pick(v, range(i, i + 64)) for v in (some, other)]
                total = code.call_llvm("llvm.x86.avx512.vpdpbusd.512", total.type, total, *now)
            sums.append(total)
        return code.call_llvm("llvm.x86.avx512.packssdw.512", vector(I16, 32), *sums)

    def signed_by(self, code: Code, x: Value, v: Value) -> Value:
        return super().signed_by(code, x, v) if v.type.count == 32 else Portable.signed_by(self, code, x, v)

    def look_up(self, code: Code, table: tuple[int, ...], index: Value) -> Value:
        if index.type.count == 32:
            return super().look_up(code, table, index)
        return code.call_llvm("llvm.x86.avx512.pshuf.b.512", index.type, constant(index.type, table * 4), index)


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
