"""Instruction sets: how vectors of small whole numbers are multiplied and added up in groups of four.

All three give the same whole numbers, and their floats are added in the same order. On x86 the first step is
``pmaddubsw``, which multiplies unsigned with signed bytes and adds neighbours to 16 bits::

    codes   u0 u1 u2 u3 …   (0..128)
    x       x0 x1 x2 x3 …   (-127..127)
    pairs   u0 x0 + u1 x1, u2 x2 + u3 x3, …          at most 2 * 128 * 127 = 32512: it fits

The second, ``pmaddwd``, multiplies pairs with 16-bit scales and adds neighbours again, to 32 bits; VNNI's ``vpdpwssd``
also adds the result to a running total, and ``vpdpbusd`` does both steps. Signed codes go in as (their size, x with
their sign), or made unsigned by an offset.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from llvmlite import ir

from moe_cupy.kernels.host.simd.code import F16, F32, I8, I16, I32, Code, Value, constant, like, vector

Products = Callable[[Sequence[Value], Value], Value]  # of what was given before with these
BYTES, WORDS, LONGS = vector(I8, 32), vector(I16, 16), vector(I32, 8)
VARIABLE = "MOE_CUPY_SIMD"  # the environment's choice of an instruction set


def _neighbours(code: Code, v: Value) -> Value:
    """v [2n] -> the sums of neighbours [n]."""
    count = v.type.count
    return code.add(code.pick(v, range(0, count, 2)), code.pick(v, range(1, count, 2)))


def nibbles(code: Code, packed: Value) -> tuple[Value, Value]:
    """The low and the high ones of bytes."""
    return code.mask(packed, 15), code.mask(code.right(packed, 4), 15)


@dataclass(frozen=True)
class Portable:
    """Plain vector arithmetic that LLVM maps to whatever the CPU has."""

    name: str = "portable"
    cpu: str = ""
    features: str = ""
    wide: int = 1  # vectors of 32 bytes that are taken as one where the format allows it
    rows: int = 1  # of unquantized weights that several vectors are multiplied with at once
    columns: int = 4  # most vectors that a row is multiplied with at a time: as many as registers hold

    def pairs(self, code: Code, codes: Value, x: Value) -> Value:
        """Unsigned codes and signed x, 32 bytes each -> int16 [16], sums of two products."""
        return _neighbours(code, code.mul(code.zext(codes, like(codes, I16)), code.sext(x, like(x, I16))))

    def scaled(self, code: Code, total: Value, pairs: Value, scales: Value) -> Value:
        """total int32 [8] (None: zeros) + sums of two of pairs * scales, both int16 [16]."""
        wide = like(pairs, I32)
        sums = _neighbours(code, code.mul(code.sext(pairs, wide), code.sext(scales, wide)))
        return sums if total is None else code.add(total, sums)

    def eights(self, code: Code, codes: Sequence[Value], offset: int) -> Products:
        """How two times 64 bytes, each ``offset`` too large, are multiplied: int32 [16], sums of eight products.

        What is made of the codes alone is made once. The offset is a power of two up to 128, or 0 and codes below 32.
        Of vectors there are two times 64 bytes and int16 [16], -16 times the sums of the eight that belong together.
        """
        low, high = (code.sub(code.zext(v, like(v, I16)), constant(like(v, I16), offset)) for v in codes)

        def multiply(x: Sequence[Value], sums: Value) -> Value:
            first, last = (code.sext(v, low.type) for v in x)
            pairs = [_neighbours(code, code.mul(a, b)) for a, b in ((low, first), (high, last))]
            first, last = (code.sext(v, like(v, I32)) for v in pairs)
            return _neighbours(code, code.add(first, last))

        return multiply

    def taken_away(self, code: Code, sums: Value, offset: int) -> Value:
        """-offset times the sums of which -16 times is given, int32 [16]; None for no offset."""
        if not offset:
            return None
        sums = code.ashr(sums, constant(sums.type, 1)) if offset == 8 else sums
        return code.left(code.sext(sums, vector(I32, 16)), 3 if offset == 128 else 0)

    def packed_fours(self, code: Code, codes: Sequence[Value], x: Sequence[Value]) -> Value:
        """Two times: codes below 16 and x, 128 bytes -> sums of four products, those of the last 64 bytes added.

        As int16 [32]: of each 16 bytes, the four sums of the first codes, then those of the second.
        """
        sums = []
        for some, other in zip(codes, x, strict=True):
            first, last = ([code.pick(v, range(i, i + 64)) for v in (some, other)] for i in (0, 64))
            sums.append(_neighbours(code, code.add(self.pairs(code, *first), self.pairs(code, *last))))
        lanes = [4 * i + 16 * which + j for i in range(4) for which in (0, 1) for j in range(4)]
        return code.pick(sums[0], lanes, sums[1])

    def moved(self, code: Code, v: Value, by: Sequence[int]) -> Value:
        """int32 with the bits of each lane moved left, or right; of each 8 lanes all the same way. What comes in is not
        to be used."""
        some = [by[i : i + 8] for i in range(0, len(by), 8)]
        parts = zip(code.parts(v, len(some)), some, strict=True)
        return code.join([
            code.lshr(part, constant(part.type, [-n for n in counts])) if min(counts) < 0
            else code.shl(part, constant(part.type, counts)) for part, counts in parts
        ])  # fmt: skip

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

    def look_up_nibbles(self, code: Code, table: tuple[int, ...], packed: Value) -> list[Value]:
        """table[nibble] for the low and the high nibbles of bytes."""
        return [self.look_up(code, table, index) for index in nibbles(code, packed)]


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

    def eights(self, code: Code, codes: Sequence[Value], offset: int) -> Products:
        ones = constant(vector(I16, 32), 1)
        if offset == 128:  # sums of two products would not fit
            return self._eights_by_sign(code, codes, ones)

        def multiply(x: Sequence[Value], sums: Value) -> Value:
            pairs = [self.pairs(code, *both) for both in zip(codes, x, strict=True)]
            return self.scaled(code, self.taken_away(code, sums, offset), code.add(*pairs), ones)

        return multiply

    def _eights_by_sign(self, code: Code, codes: Sequence[Value], ones: Value) -> Products:
        signed = [code.xor(v, constant(v.type, -128)) for v in codes]
        no_poison = ir.Constant(ir.IntType(1), 0)  # -128 stays what it is
        sizes = [code.call_llvm("llvm.abs.v64i8", v.type, v, no_poison) for v in signed]

        def multiply(x: Sequence[Value], sums: Value) -> Value:
            total = None
            for size, some, v in zip(sizes, x, signed, strict=True):
                x_signed = self.split(code, "llvm.x86.avx2.psign.b", BYTES, some, v)
                total = self.scaled(code, total, self.pairs(code, size, x_signed), ones)
            return total

        return multiply

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

    def dots(self, code: Code, total: Value, unsigned: Sequence[Value], signed: Sequence[Value]) -> Value:
        """total int32 [16] (None: zeros) + sums of four products of each two times 64 bytes."""
        total = constant(vector(I32, 16), 0) if total is None else total
        for some, other in zip(unsigned, signed, strict=True):
            total = code.call_llvm("llvm.x86.avx512.vpdpbusd.512", total.type, total, some, other)
        return total

    def eights(self, code: Code, codes: Sequence[Value], offset: int) -> Products:
        return lambda x, sums: self.dots(code, self.taken_away(code, sums, offset), codes, x)

    def moved(self, code: Code, v: Value, by: Sequence[int]) -> Value:
        counts = constant(v.type, [n % 32 for n in by])
        return code.call_llvm(f"llvm.fshl.v{v.type.count}i32", v.type, v, v, counts)

    def packed_fours(self, code: Code, codes: Sequence[Value], x: Sequence[Value]) -> Value:
        sums = [self.dots(code, None, code.parts(a, 2), code.parts(b, 2)) for a, b in zip(codes, x, strict=True)]
        return code.call_llvm("llvm.x86.avx512.packssdw.512", vector(I16, 32), *sums)

    def look_up(self, code: Code, table: tuple[int, ...], index: Value) -> Value:
        if index.type.count == 32:
            return super().look_up(code, table, index)
        return code.call_llvm("llvm.x86.avx512.pshuf.b.512", index.type, constant(index.type, table * 4), index)


@dataclass(frozen=True)
class Avx512Vbmi(Avx512):
    """AVX-512 that finds bytes in tables of 64: of an index it looks at six bits, and need not be rid of the others."""

    name: str = "avx512vbmi"
    features: str = "+avx512vnni,+avx512vbmi"

    def look_up_nibbles(self, code: Code, table: tuple[int, ...], packed: Value) -> list[Value]:
        high = code.bitcast(code.right(code.bitcast(packed, vector(I16, 32)), 4), packed.type)
        tables, name = constant(packed.type, table * 4), "llvm.x86.avx512.permvar.qi.512"
        return [code.call_llvm(name, packed.type, tables, index) for index in (packed, high)]


SETS: dict[str, Portable] = {one.name: one for one in (Portable(), Avx2(), Avx512(), Avx512Vbmi())}
VNNI = ("avx512bw", "avx512vl", "avx512vnni")
NEEDS = {
    "portable": (), "avx2": ("avx2", "fma", "f16c", "bmi2"), "avx512": VNNI, "avx512vbmi": (*VNNI, "avx512vbmi"),
}  # fmt: skip


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
