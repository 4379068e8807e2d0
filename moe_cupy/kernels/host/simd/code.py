"""Vector code, written down: LLVM's instruction builder with the few words that the kernels use.

Addresses are whole numbers; a vector of n values of a type is ``vector(type, n)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
Value = Any  # an LLVM value
Address = Value  # a whole number


def vector(kind: ir.Type, count: int) -> ir.VectorType:
    return ir.VectorType(kind, count)


def like(v: Value, kind: ir.Type) -> ir.Type:
    """``kind``, or a vector of as many as v has lanes."""
    return vector(kind, v.type.count) if isinstance(v.type, ir.VectorType) else kind


def constant(kind: ir.Type, value: Any) -> ir.Constant:
    """A number, or a vector of equal numbers or of those of a sequence."""
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, list(value) if isinstance(value, Sequence) else [value] * kind.count)
    return ir.Constant(kind, value)


class Code(ir.IRBuilder):
    """A builder inside one function."""

    def number(self, value: int) -> ir.Constant:
        """An address or a count."""
        return ir.Constant(I64, value)

    def at(self, address: Address, offset: int | Value) -> Address:
        """address + offset bytes."""
        return self.add(address, self.number(offset) if isinstance(offset, int) else offset)

    def read(self, kind: ir.Type, address: Address, offset: int | Value = 0) -> Value:
        """Load from any address, aligned or not."""
        value = self.load(self.inttoptr(self.at(address, offset), ir.PointerType(kind)))
        value.align = 1
        return value

    def side_by_side(self, parts: Sequence[Value]) -> Value:
        """Single values as one vector."""
        whole = constant(vector(parts[0].type, len(parts)), 0)
        for i, part in enumerate(parts):
            whole = self.insert_element(whole, part, constant(I32, i))
        return whole

    def table(self, name: str, kind: ir.Type, values: Sequence[Any]) -> Address:
        """Where these constants stand."""
        made = self.module.globals.get(name)
        if made is None:
            made = ir.GlobalVariable(self.module, ir.ArrayType(kind, len(values)), name)
            made.initializer, made.global_constant = ir.Constant(made.value_type, list(values)), True
            made.linkage = "internal"
        return self.ptrtoint(made, I64)

    def write(self, value: Value, address: Value, offset: int | Value = 0) -> None:
        """Store to any address, aligned or not."""
        self.store(value, self.inttoptr(self.at(address, offset), ir.PointerType(value.type))).align = 1

    def call_llvm(self, name: str, result: ir.Type, *args: Value) -> Value:
        """Call an LLVM intrinsic or CPU instruction by name."""
        made = self.module.globals.get(name)
        if made is None:
            made = ir.Function(self.module, ir.FunctionType(result, [a.type for a in args]), name)
        return self.call(made, args)

    def pick(self, v: Value, lanes: Sequence[int], other: Value = None) -> Value:
        """The lanes of v (and, counted behind them, of ``other``) in the order of ``lanes``."""
        other = ir.Constant(v.type, ir.Undefined) if other is None else other
        return self.shuffle_vector(v, other, ir.Constant(vector(I32, len(lanes)), list(lanes)))

    def join(self, parts: Sequence[Value]) -> Value:
        """One, two, four, … vectors as one."""
        while len(parts) > 1:
            pairs = zip(parts[::2], parts[1::2], strict=True)
            parts = [self.pick(a, range(2 * a.type.count), b) for a, b in pairs]
        return parts[0]

    def parts(self, v: Value, count: int) -> list[Value]:
        """A vector as ``count`` of equal size."""
        size = v.type.count // count
        return [self.pick(v, range(i * size, (i + 1) * size)) for i in range(count)] if count > 1 else [v]

    def splat(self, value: Value, count: int) -> Value:
        """A vector of equal values."""
        empty = ir.Constant(vector(value.type, count), ir.Undefined)
        return self.pick(self.insert_element(empty, value, ir.Constant(I32, 0)), [0] * count)

    def mask(self, v: Value, bits: int) -> Value:
        """v & bits in each lane."""
        return self.and_(v, constant(v.type, bits))

    def left(self, v: Value, by: int) -> Value:
        return self.shl(v, constant(v.type, by)) if by else v

    def right(self, v: Value, by: int) -> Value:
        """Shift right, zeros come in."""
        return self.lshr(v, constant(v.type, by)) if by else v

    def kept_whole(self, v: Value) -> Value:
        """A whole number that the compiler is not to take apart again, to put its parts into lanes one by one."""
        return self.call(ir.InlineAsm(ir.FunctionType(v.type, [v.type]), "", "=r,0"), [v])

    def smaller(self, a: Value, b: Value) -> Value:
        """Of whole numbers."""
        return self.select(self.icmp_signed("<", a, b), a, b)

    def multiply_add(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c of float vectors, rounded once where the CPU can."""
        return self.call_llvm(f"llvm.fmuladd.v{a.type.count}f32", a.type, a, b, c)

    def float_of(self, v: Value) -> Value:
        """Whole numbers int32 -> float32."""
        return self.sitofp(v, like(v, F32))

    def folded(self, v: Value) -> Value:
        """int32 [8] or [16] -> [8]: the upper half added to the lower."""
        return self.add(self.pick(v, range(8)), self.pick(v, range(8, 16))) if v.type.count > 8 else v

    def halved(self, v: Value) -> Value:
        """The upper half added to the lower one."""
        return self.fadd(*self.parts(v, 2))

    def total(self, sums: Sequence[Value]) -> Value:
        """The sum of the lanes of all ``sums``, the widest first, in a fixed order."""
        v = sums[0]
        for other in sums[1:]:
            while v.type.count > other.type.count:
                v = self.halved(v)
            v = self.fadd(v, other)
        while v.type.count > 1:
            v = self.halved(v)
        return self.extract_element(v, constant(I32, 0))

    def variable(self, start: Value) -> Value:
        """Memory that holds a value which a loop changes; the compiler keeps it in a register."""
        with self.goto_entry_block():
            place = self.alloca(start.type)
        self.store(start, place)
        return place

    @contextmanager
    def loop(self, count: Value) -> Iterator[None]:
        """Run the body ``count`` times (not at all for 0)."""
        head, body, end = (self.append_basic_block(name) for name in ("head", "body", "end"))
        turn = self.variable(self.number(0))
        self.branch(head)
        self.position_at_end(head)
        self.cbranch(self.icmp_signed("<", self.load(turn), count), body, end)
        self.position_at_end(body)
        yield
        self.store(self.add(self.load(turn), self.number(1)), turn)
        self.branch(head)
        self.position_at_end(end)

    def advance(self, place: Value, by: int | Value) -> None:
        """place += by."""
        self.store(self.at(self.load(place), by), place)


def function(name: str, arguments: int, body: Callable[[Code, Sequence[Value]], None]) -> str:
    """LLVM text of a function of whole numbers that returns nothing."""
    module = ir.Module(name)
    made = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * arguments), name)
    code = Code(made.append_basic_block("start"))
    body(code, made.args)
    code.ret_void()
    return str(module)
