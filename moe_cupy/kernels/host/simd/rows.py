"""The loop over rows: each is read once and multiplied with ``columns`` rounded vectors, block by block.

A block's codes are unpacked once for all columns, and a column's running sum stays in eight lanes of a register until
the row ends. What a column adds to it, and in what order, does not depend on how many columns there are: a vector gets
the same bits alone and among others.

The vectors come as a *panel*: for each block, what column 0 has there, then column 1, … (``panels.py``)::

    values   int8 [blocks, columns, 256 or 32], float32 [blocks, columns, 32] for unquantized weights
    steps    float32 [blocks, columns]
    sums     Q8_K: int16 [blocks, columns, 16], of 16 values each; Q8_1: float32 [blocks, columns], step * sum of values

Results go to ``columns`` addresses, each plus ``offset`` and four bytes a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from moe_cupy.kernels.host.simd.blocks import BLOCKS, FLOATS
from moe_cupy.kernels.host.simd.code import F32, I8, I32, I64, Code, Value, constant, function, vector
from moe_cupy.kernels.host.simd.isa import BYTES, LONGS, WORDS, Portable
from moe_cupy.kernels.host.simd.superblocks import SUPER_BLOCKS
from moe_ref.quants import BY_NAME

LANES = vector(F32, 8)
AHEAD = 2048  # bytes of weights that are asked for before they are needed
ARGUMENTS = ("w", "row_bytes", "blocks", "values", "steps", "sums", "results", "offset", "rows")
Add = Callable[[Code, Value, Sequence[Value], Sequence[Value]], None]  # block, parts of the panel, places of the sums
FORMATS = (*SUPER_BLOCKS, *BLOCKS, *FLOATS)


def _part_scales(code: Code, scales: Value, parts: range) -> Value:
    """int16 [16] scales of 16 weights -> for each part that of its first 16 weights eight times, then the other."""
    return code.pick(scales, [2 * part + half for part in parts for half in (0, 1) for _ in range(8)])


def super_block(kind: str, isa: Portable) -> Add:
    """Add the products of 256 weights with each column."""

    def add(code: Code, at: Value, panel: Sequence[Value], sums: Sequence[Value]) -> None:
        block, (values, steps, group_sums) = SUPER_BLOCKS[kind](code, isa, at), panel
        ask_ahead(code, at, BY_NAME[kind].block_bytes)
        wide = 1 if block.signed else isa.wide
        totals = [constant(vector(I32, 8 * wide), 0) for _ in sums]
        for part in range(0, 8, wide):
            parts = range(part, part + wide)
            codes, scales = code.join([block.codes(i) for i in parts]), _part_scales(code, block.scales, parts)
            size = isa.sizes(code, codes) if block.signed else codes
            for c in range(len(sums)):
                x = code.read(codes.type, values, 256 * c + 32 * part)
                x = isa.signed_by(code, x, codes) if block.signed else x
                totals[c] = isa.scaled(code, totals[c], isa.pairs(code, size, x), scales)
        for c, place in enumerate(sums):
            totals[c] = code.folded(totals[c])
            step = code.read(F32, steps, 4 * c)
            floors = block.floors if block.floors is not None else block.scales
            low = isa.scaled(code, constant(LONGS, 0), code.read(WORDS, group_sums, 32 * c), floors)
            if block.offset_bits:
                totals[c] = code.sub(totals[c], code.left(low, block.offset_bits))
            factor = code.splat(code.fmul(block.d, step), 8)
            result = code.multiply_add(code.float_of(totals[c]), factor, code.load(place))
            if block.floors is not None:
                factor = code.splat(code.fneg(code.fmul(block.floor_step, step)), 8)
                result = code.multiply_add(code.float_of(low), factor, result)
            code.store(result, place)

    return add


def ask_ahead(code: Code, at: Value, size: int) -> None:
    """Ask for the cache lines of a block ``AHEAD`` bytes on; beyond the end of memory nothing happens."""
    for offset in range(0, size, 64):
        place = code.inttoptr(code.at(at, AHEAD + offset), ir.PointerType(I8))
        code.call_llvm("llvm.prefetch.p0", ir.VoidType(), place, *(constant(I32, number) for number in (0, 3, 1)))


def small_block(kind: str, isa: Portable) -> Add:
    """Add the products of 32 weights with each column."""

    def add(code: Code, at: Value, panel: Sequence[Value], sums: Sequence[Value]) -> None:
        block, (values, steps, block_sums) = BLOCKS[kind](code, isa, at), panel
        signed = block.base is None
        size = isa.sizes(code, block.codes) if signed else block.codes
        for c, place in enumerate(sums):
            x = code.read(BYTES, values, 32 * c)
            x = isa.signed_by(code, x, block.codes) if signed else x
            factor = code.splat(code.fmul(block.d, code.read(F32, steps, 4 * c)), 8)
            result = code.multiply_add(code.float_of(isa.fours(code, size, x)), factor, code.load(place))
            if not signed:  # into the first lane, as all that is left of the block
                base = code.fmul(block.base, code.read(F32, block_sums, 4 * c))
                result = code.fadd(result, code.insert_element(constant(LANES, 0), base, constant(I32, 0)))
            code.store(result, place)

    return add


def float_block(kind: str, isa: Portable) -> Add:
    """Add the products of 32 unquantized weights with each column."""
    size, decode = FLOATS[kind]

    def add(code: Code, at: Value, panel: Sequence[Value], sums: Sequence[Value]) -> None:
        weights = [decode(code, isa, code.at(at, 8 * i * size)) for i in range(4)]
        for c, place in enumerate(sums):
            x = [code.read(LANES, panel[0], 128 * c + 32 * i) for i in range(4)]
            first = code.multiply_add(weights[1], x[1], code.fmul(weights[0], x[0]))
            second = code.multiply_add(weights[3], x[3], code.fmul(weights[2], x[2]))
            code.store(code.fadd(code.load(place), code.fadd(first, second)), place)

    return add


def block_sizes(kind: str) -> tuple[int, tuple[int, int, int]]:
    """Bytes of a block of weights; bytes of a column's values, steps and sums there."""
    if kind in FLOATS:
        return 32 * FLOATS[kind][0], (128, 0, 0)
    return BY_NAME[kind].block_bytes, (256, 4, 32) if kind in SUPER_BLOCKS else (32, 4, 4)


def row_kernel(kind: str, isa: Portable, columns: int) -> str:
    """LLVM text of ``rows`` (``ARGUMENTS``): result[c][r] = W[r] . x[c] for ``rows`` rows from ``w`` on."""
    builder = super_block if kind in SUPER_BLOCKS else small_block if kind in BLOCKS else float_block
    add, (block_bytes, sizes) = builder(kind, isa), block_sizes(kind)

    def body(code: Code, arguments: Sequence[Value]) -> None:
        w, row_bytes, blocks, *panel, results, offset, rows = arguments
        row, out = code.variable(w), code.variable(offset)
        sums = [code.variable(constant(LANES, 0)) for _ in range(columns)]
        moving = [code.variable(w), *(code.variable(part) for part in panel)]
        with code.loop(rows):
            for place in sums:
                code.store(constant(LANES, 0), place)
            for place, start in zip(moving, (code.load(row), *panel), strict=True):
                code.store(start, place)
            with code.loop(blocks):
                at, *here = (code.load(place) for place in moving)
                add(code, at, here, sums)
                for place, size in zip(moving, (block_bytes, *(columns * size for size in sizes)), strict=True):
                    code.advance(place, size)
            for c, place in enumerate(sums):
                code.write(code.total(code.load(place)), code.read(I64, results, 8 * c), code.load(out))
            code.advance(row, row_bytes)
            code.advance(out, 4)

    return function("rows", len(ARGUMENTS), body)
