"""The loop over rows: each is read once and multiplied with ``columns`` rounded vectors, block by block.

A block's codes are unpacked once for all columns, and a column's running sums stay in lanes of registers until the row
ends. What a column adds to them, and in what order, does not depend on how many columns there are: a vector gets the
same bits alone and among others. Of 32 weights with a scale, four blocks are met at a time (``blocks.py``); those that
are left at the end of a row are met with a block that is there instead of one that is not, times zeros.

Several vectors meet two rows of unquantized weights at a time. From memory a second row costs more than the shared
loads save: its stream and the first's hide each other from the prefetcher (Q8_0: 12 GB/s for two, 27 for one).

The vectors come as a *panel*: for each super-block, four blocks or 32 unquantized weights, what column 0 has there,
then column 1, … (``rounding.py``)::

    values   int8 [columns, 256 or 128], float32 [columns, 32] for unquantized weights
    steps    float32 [columns], of four blocks [columns, 4]
    sums     Q8_K, Q8_0: int16 [columns, 16], of what belongs together; Q8_1: float32 [columns, 4], step * sum of values

Results go to ``columns`` addresses, each plus ``offset`` and four bytes a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from llvmlite import ir

from moe_cupy.kernels.host.simd.blocks import BLOCKS, FLOATS, WITH_BASE, add_blocks
from moe_cupy.kernels.host.simd.code import F32, I8, I32, I64, Address, Code, Value, constant, function, vector
from moe_cupy.kernels.host.simd.iq4_xs import add_iq4_xs
from moe_cupy.kernels.host.simd.isa import WORDS, Portable
from moe_cupy.kernels.host.simd.nibbles import BY_HALVES, LANES, add_by_halves
from moe_cupy.kernels.host.simd.superblocks import SUPER_BLOCKS, SuperBlock
from moe_ref.quants import BY_NAME

SIXTEEN = vector(F32, 16)
AHEAD = 4096  # bytes of weights that are asked for before they are needed
ARGUMENTS = ("w", "row_bytes", "blocks", "values", "steps", "sums", "results", "offset", "rows")
Sums = Sequence[Sequence[Value]]  # for each column (and row), the places of its running sums
Add = Callable[[Code, Sequence[Address], Sequence[Value], Sums], None]  # blocks, parts of the panel
FORMATS = (*SUPER_BLOCKS, *BY_HALVES, "IQ4_XS", *BLOCKS, *FLOATS)


def _part_scales(code: Code, scales: Value, parts: range) -> Value:
    """Scales as in ``SuperBlock`` -> for each part that of its first 16 weights eight times, then the other."""
    return code.pick(scales, [part + 8 * half for part in parts for half in (0, 1) for _ in range(8)])


def super_block(kind: str, isa: Portable) -> Add:
    """Add the products of 256 weights with each column."""

    def add(code: Code, at: Sequence[Address], panel: Sequence[Value], sums: Sums) -> None:
        block, (values, steps, group_sums) = SUPER_BLOCKS[kind](code, isa, at[0]), panel
        totals = [constant(vector(I32, 8 * isa.wide), 0) for _ in sums]
        for part in range(0, 8, isa.wide):
            parts = range(part, part + isa.wide)
            codes, scales = code.join([block.codes(i) for i in parts]), _part_scales(code, block.scales, parts)
            for c in range(len(sums)):
                x = code.read(vector(I8, 32 * isa.wide), values, 256 * c + 32 * part)
                totals[c] = isa.scaled(code, totals[c], isa.pairs(code, codes, x), scales)
        for c, (place,) in enumerate(sums):
            given = code.read(vector(F32, 1), steps, 4 * c), code.read(WORDS, group_sums, 32 * c)
            _finish(code, isa, block, code.folded(totals[c]), given, place)

    return add


def _finish(
    code: Code, isa: Portable, block: SuperBlock, total: Value, given: tuple[Value, Value], place: Value
) -> None:
    """Add a super-block's total int32 [8], and what its floors make of a column's (step, sums), to the running sum."""
    step, low = given[0], isa.scaled(code, None, given[1], block.floors)
    if block.offset_bits:
        total = code.sub(total, code.left(low, block.offset_bits))
    factor = code.pick(code.fmul(block.d, step), [0] * 8)
    result = code.multiply_add(code.float_of(total), factor, code.load(place))
    if block.floor_step is not None:
        factor = code.pick(code.fneg(code.fmul(block.floor_step, step)), [0] * 8)
        result = code.multiply_add(code.float_of(low), factor, result)
    code.store(result, place)


def float_block(kind: str, isa: Portable) -> Add:
    """Add the products of 32 unquantized weights of each row with each column."""
    size, decode = FLOATS[kind]

    def add(code: Code, at: Sequence[Address], panel: Sequence[Value], sums: Sums) -> None:
        rows = [[decode(code, isa, code.at(one, 16 * i * size)) for i in range(2)] for one in at]
        for c, places in enumerate(sums):
            x = [code.read(SIXTEEN, panel[0], 128 * c + 64 * i) for i in range(2)]
            for weights, place in zip(rows, places, strict=True):
                first = code.multiply_add(weights[0], x[0], code.load(place))
                code.store(code.multiply_add(weights[1], x[1], first), place)

    return add


@dataclass(frozen=True)
class Plan:
    """How a format's rows are met."""

    add: Add
    lanes: tuple[int, ...]  # of a column's running sums, for one row
    rows: int = 1  # at a time
    blocks: int = 1  # at a time


def plan(kind: str, isa: Portable, columns: int) -> Plan:
    if kind in FLOATS:
        return Plan(float_block(kind, isa), (16,), rows=isa.rows if columns > 1 else 1)
    if kind in BLOCKS:
        return Plan(partial(add_blocks, kind, isa), (16, 4) if kind in WITH_BASE else (16,), blocks=4)
    if kind == "IQ4_XS":
        return Plan(partial(add_iq4_xs, isa), (16,))
    if kind in BY_HALVES:
        return Plan(partial(add_by_halves, kind, isa), LANES)
    return Plan(super_block(kind, isa), (8,))


def sizes(kind: str) -> tuple[int, int, tuple[int, int, int]]:
    """Weights and bytes of what is met at a time; bytes of a column's values, steps and sums there."""
    if kind in FLOATS:
        return 32, 32 * FLOATS[kind][0], (128, 0, 0)
    size = BY_NAME[kind].block_bytes
    if kind in BLOCKS:
        return 128, 4 * size, (128, 16, 16 if kind in WITH_BASE else 32)
    return 256, size, (256, 4, 64 if kind == "IQ4_XS" else 32)


def ask_ahead(code: Code, at: Address, ahead: Value, size: int) -> None:
    """Ask for the cache lines of blocks that come ``ahead`` bytes later; past the end of memory nothing happens."""
    for offset in range(0, size, 64):
        place = code.inttoptr(code.at(code.at(at, ahead), offset), ir.PointerType(I8))
        code.call_llvm("llvm.prefetch.p0", ir.VoidType(), place, *(constant(I32, number) for number in (0, 3, 1)))


@dataclass(frozen=True)
class Walk:
    """Through the blocks of a row, or of a few rows at a time."""

    code: Code
    how: Plan
    steps: Sequence[int]  # bytes of what is met at a time, of weights and of each part of the panel
    moving: Sequence[Value]  # places of the addresses that go with them
    sums: Sums
    ahead: Value  # bytes

    def begin(self, starts: Sequence[Value]) -> None:
        for place in itertools.chain(*self.sums):
            self.code.store(constant(place.type.pointee, 0), place)
        for place, start in zip(self.moving, starts, strict=True):
            self.code.store(start, place)

    def meet(self, others: Sequence[Value]) -> None:
        """The next block of each row, or blocks; all but the first are ``others`` bytes from it."""
        start, *parts = (self.code.load(place) for place in self.moving)
        at = [start, *(self.code.at(start, distance) for distance in others)]
        for one in at[: self.how.rows]:
            ask_ahead(self.code, one, self.ahead, self.steps[0])
        self.how.add(self.code, at, parts, self.sums)
        for place, step in zip(self.moving, self.steps, strict=True):
            self.code.advance(place, step)

    def meet_all(self, blocks: Value, second_row: Value) -> None:
        code, several = self.code, self.how.blocks
        if several == 1:
            with code.loop(blocks):
                self.meet([second_row] * (self.how.rows - 1))
            return
        size, left = self.steps[0] // several, code.urem(blocks, code.number(several))
        with code.loop(code.udiv(blocks, code.number(several))):
            self.meet([code.number(size * i) for i in range(1, several)])
        with code.loop(code.zext(code.icmp_unsigned("!=", left, code.number(0)), I64)):
            last = code.sub(left, code.number(1))
            self.meet([code.mul(code.smaller(last, code.number(i)), code.number(size)) for i in range(1, several)])

    def results(self, column: int) -> list[Value]:
        """A column's product with each row."""
        lanes, totals = len(self.how.lanes), [self.code.load(place) for place in self.sums[column]]
        return [self.code.total(totals[r * lanes : (r + 1) * lanes]) for r in range(self.how.rows)]


def row_kernel(kind: str, isa: Portable, columns: int) -> str:
    """LLVM text of ``rows`` (``ARGUMENTS``): result[c][r] = W[r] . x[c] for ``rows`` rows from ``w`` on."""
    how, (_, size, of_panel) = plan(kind, isa, columns), sizes(kind)
    steps = [size, *(columns * one for one in of_panel)]

    def body(code: Code, arguments: Sequence[Value]) -> None:
        w, row_bytes, blocks, *panel, results, offset, rows = arguments
        row, out, left, at_once = code.variable(w), code.variable(offset), code.variable(rows), code.number(how.rows)
        sums = [[code.variable(constant(vector(F32, n), 0)) for n in how.lanes * how.rows] for _ in range(columns)]
        moving, turn = [code.variable(start) for start in (w, *panel)], code.mul(row_bytes, at_once)
        ahead = code.mul(turn, code.add(code.udiv(code.number(AHEAD), turn), code.number(1)))  # whole turns
        walk = Walk(code, how, steps, moving, sums, ahead)
        with code.loop(code.udiv(code.add(rows, code.number(how.rows - 1)), at_once)):
            walk.begin((code.load(row), *panel))
            # The last row may be alone: it is its own second, and done twice.
            second = code.smaller(code.sub(code.load(left), code.number(1)), code.number(how.rows - 1))
            walk.meet_all(blocks, code.mul(second, row_bytes))
            for c in range(columns):
                y = code.at(code.read(I64, results, 8 * c), code.load(out))
                for which, total in enumerate(walk.results(c)):
                    code.write(total, y, code.mul(second, code.number(4 * which)))
            code.advance(row, turn)
            code.advance(out, 4 * how.rows)
            code.advance(left, -how.rows)

    return function("rows", len(ARGUMENTS), body)
