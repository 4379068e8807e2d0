"""The loop over rows: each is read once and multiplied with ``columns`` rounded vectors, block by block.

A block's codes are unpacked once for all columns, and a column's running sums stay in lanes of registers until the row
ends. What a column adds to them, and in what order, does not depend on how many columns there are: a vector gets the
same bits alone and among others. Of unquantized weights several vectors meet two rows at a time: with AVX-512, half of
a register serves each.

The vectors come as a *panel*: for each block, what column 0 has there, then column 1, … (``panels.py``)::

    values   int8 [blocks, columns, 256 or 32], float32 [blocks, columns, 32] for unquantized weights
    steps    float32 [blocks, columns]
    sums     Q8_K: int16 [blocks, columns, 16], of 16 values each; Q8_1: float32 [blocks, columns], step * sum of values

Results go to ``columns`` addresses, each plus ``offset`` and four bytes a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

from llvmlite import ir

from moe_cupy.kernels.host.simd.blocks import BLOCKS, FLOATS
from moe_cupy.kernels.host.simd.code import F32, I8, I32, I64, Address, Code, Value, constant, function, vector
from moe_cupy.kernels.host.simd.isa import BYTES, WORDS, Portable
from moe_cupy.kernels.host.simd.nibbles import BY_HALVES, LANES, add_q4_k
from moe_cupy.kernels.host.simd.superblocks import SUPER_BLOCKS, SuperBlock
from moe_ref.quants import BY_NAME

SIXTEEN = vector(F32, 16)
AHEAD = 4096  # bytes of weights that are asked for before they are needed
ARGUMENTS = ("w", "row_bytes", "blocks", "values", "steps", "sums", "results", "offset", "rows")
Sums = Sequence[Sequence[Value]]  # for each column, the places of its running sums
Add = Callable[[Code, Address, Sequence[Value], Sums], None]  # block, parts of the panel
FORMATS = (*SUPER_BLOCKS, *BLOCKS, *FLOATS)


def _part_scales(code: Code, scales: Value, parts: range) -> Value:
    """Scales as in ``SuperBlock`` -> for each part that of its first 16 weights eight times, then the other."""
    return code.each(scales, [part + 8 * half for part in parts for half in (0, 1) for _ in range(8)])


def super_block(kind: str, isa: Portable) -> Add:
    """Add the products of 256 weights with each column."""

    def add(code: Code, at: Address, panel: Sequence[Value], sums: Sums) -> None:
        block, (values, steps, group_sums) = SUPER_BLOCKS[kind](code, isa, at), panel
        wide = 1 if block.signed or code.rows > 1 else isa.wide
        totals = [constant(vector(I32, 8 * wide * code.rows), 0) for _ in sums]
        for part in range(0, 8, wide):
            parts = range(part, part + wide)
            codes, scales = code.join([block.codes(i) for i in parts]), _part_scales(code, block.scales, parts)
            size = isa.sizes(code, codes) if block.signed else codes
            for c in range(len(sums)):
                x = code.for_all(code.read(vector(I8, 32 * wide), values, 256 * c + 32 * part))
                x = isa.signed_by(code, x, codes) if block.signed else x
                totals[c] = isa.scaled(code, totals[c], isa.pairs(code, size, x), scales)
        for c, (place,) in enumerate(sums):
            given = code.read(F32, steps, 4 * c), code.read(WORDS, group_sums, 32 * c)
            _finish(code, isa, block, code.folded(totals[c]), given, place)

    return add


def _finish(
    code: Code, isa: Portable, block: SuperBlock, total: Value, given: tuple[Value, Value], place: Value
) -> None:
    """Add a super-block's total int32 [8], and what its floors make of a column's (step, sums), to the running sum."""
    step = code.splat(given[0], code.rows)
    low = isa.scaled(code, None, code.for_all(given[1]), block.floors)
    if block.offset_bits:
        total = code.sub(total, code.left(low, block.offset_bits))
    factor = code.each(code.fmul(block.d, step), [0] * 8)
    result = code.multiply_add(code.float_of(total), factor, code.load(place))
    if block.floor_step is not None:
        factor = code.each(code.fneg(code.fmul(block.floor_step, step)), [0] * 8)
        result = code.multiply_add(code.float_of(low), factor, result)
    code.store(result, place)


def _factors(code: Code, d: Value, steps: Value, columns: int) -> list[Value]:
    """d * step of each column, eight times for each row: a single row's are multiplied at once."""
    if code.rows > 1:
        given = [code.splat(code.read(F32, steps, 4 * c), code.rows) for c in range(columns)]
        return [code.each(code.fmul(d, step), [0] * 8) for step in given]
    products = code.fmul(code.pick(d, [0] * columns), code.read(vector(F32, columns), steps))
    return [code.pick(products, [c] * 8) for c in range(columns)]


def small_block(kind: str, isa: Portable) -> Add:
    """Add the products of 32 weights with each column."""

    def add(code: Code, at: Address, panel: Sequence[Value], sums: Sums) -> None:
        block, (values, steps, block_sums) = BLOCKS[kind](code, isa, at), panel
        signed = block.base is None
        size = isa.sizes(code, block.codes) if signed else block.codes
        factors = _factors(code, block.d, steps, len(sums))
        for c, (place,) in enumerate(sums):
            x = code.for_all(code.read(BYTES, values, 32 * c))
            x = isa.signed_by(code, x, block.codes) if signed else x
            result = code.multiply_add(code.float_of(isa.fours(code, size, x)), factors[c], code.load(place))
            if not signed:  # into the first lane, as all that is left of the block
                base = code.fmul(block.base, code.splat(code.read(F32, block_sums, 4 * c), code.rows))
                result = code.fadd(result, code.each(base, [0, *[1] * 7], constant(base.type, 0)))
            code.store(result, place)

    return add


def float_block(kind: str, isa: Portable) -> Add:
    """Add the products of 32 unquantized weights with each column."""
    size, decode = FLOATS[kind]

    def add(code: Code, at: Address, panel: Sequence[Value], sums: Sums) -> None:
        weights = [decode(code, isa, code.at(at, 16 * i * size)) for i in range(2)]
        for c, (place,) in enumerate(sums):
            x = [code.for_all(code.read(SIXTEEN, panel[0], 128 * c + 64 * i)) for i in range(2)]
            first = code.multiply_add(weights[0], x[0], code.load(place))
            code.store(code.multiply_add(weights[1], x[1], first), place)

    return add


def ask_ahead(code: Code, at: Address, ahead: Value, size: int) -> None:
    """Ask for the cache lines of a block that comes ``ahead`` bytes later; past the end of memory nothing happens."""
    for one in at:
        for offset in range(0, size, 64):
            place = code.inttoptr(code.at(code.at(one, ahead), offset), ir.PointerType(I8))
            code.call_llvm("llvm.prefetch.p0", ir.VoidType(), place, *(constant(I32, number) for number in (0, 3, 1)))


def block_sizes(kind: str) -> tuple[int, tuple[int, int, int]]:
    """Bytes of a block of weights; bytes of a column's values, steps and sums there."""
    if kind in FLOATS:
        return 32 * FLOATS[kind][0], (128, 0, 0)
    return BY_NAME[kind].block_bytes, (256, 4, 32) if kind in SUPER_BLOCKS else (32, 4, 4)


def _adder(kind: str, isa: Portable) -> tuple[Add, tuple[int, ...], int]:
    """What adds a block of a format, how many lanes its running sums have, and rows that can be met at a time."""
    if kind in BY_HALVES:
        return partial(add_q4_k, isa), LANES, 1
    builder = super_block if kind in SUPER_BLOCKS else small_block if kind in BLOCKS else float_block
    return builder(kind, isa), (16 if kind in FLOATS else 8,), isa.rows


def row_kernel(kind: str, isa: Portable, columns: int) -> str:
    """LLVM text of ``rows`` (``ARGUMENTS``): result[c][r] = W[r] . x[c] for ``rows`` rows from ``w`` on."""
    add, lanes, at_once = _adder(kind, isa)
    # Rows side by side share the loads of vectors. From memory a second row costs more than that saves: its stream and
    # the first's hide each other from the prefetcher (Q8_0: 12 GB/s for two, 27 for one).
    at_once, (block_bytes, sizes) = at_once if columns > 1 and kind in FLOATS else 1, block_sizes(kind)
    steps = [block_bytes, *(columns * size for size in sizes)]

    def body(code: Code, arguments: Sequence[Value]) -> None:
        w, row_bytes, blocks, *panel, results, offset, rows = arguments
        row, out, left = code.variable(w), code.variable(offset), code.variable(rows)
        sums = [[code.variable(constant(vector(F32, n * at_once), 0)) for n in lanes] for _ in range(columns)]
        moving = [code.variable(w), *(code.variable(part) for part in panel)]
        turn = code.mul(row_bytes, code.number(at_once))
        ahead = code.mul(turn, code.add(code.udiv(code.number(AHEAD), turn), code.number(1)))  # whole turns
        with code.loop(code.udiv(code.add(rows, code.number(at_once - 1)), code.number(at_once))):
            for place in itertools.chain(*sums):
                code.store(constant(place.type.pointee, 0), place)
            for place, start in zip(moving, (code.load(row), *panel), strict=True):
                code.store(start, place)
            here = [code.number(0)] * at_once  # from the first row to each; the last may be alone and is done twice
            if at_once > 1:
                here[1] = code.select(code.icmp_signed(">", code.load(left), code.number(1)), code.number(1), here[0])
            with code.loop(blocks):
                start, *parts = (code.load(place) for place in moving)
                at = tuple(code.at(start, code.mul(which, row_bytes)) for which in here)
                ask_ahead(code, at, ahead, block_bytes)
                add(code, at, parts, sums)
                for place, step in zip(moving, steps, strict=True):
                    code.advance(place, step)
            for c, places in enumerate(sums):
                y = code.at(code.read(I64, results, 8 * c), code.load(out))
                for which, total in zip(here, code.totals([code.load(place) for place in places]), strict=True):
                    code.write(total, y, code.mul(which, code.number(4)))
            code.advance(row, turn)
            code.advance(out, 4 * at_once)
            code.advance(left, -at_once)

    return function("rows", len(ARGUMENTS), body, at_once)
