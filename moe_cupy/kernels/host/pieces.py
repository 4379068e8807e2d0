"""What threads share beside products: pieces of rounding and of activations, as functions that a job names.

A job whose FUNCTION is not 0 has rows first..last-1 done by that function, which knows the job by its address alone.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from moe_cupy.kernels.host import jobs as j
from moe_cupy.kernels.host.layer import activate_rows
from moe_cupy.kernels.host.rounding import round_rows

ROWS_AT_ONCE = 8  # vectors in a piece: whole tiles, and about 10 us of work
ANY = 1 << 40  # rows of an array whose length is not asked for


def _pointer(kind: types.Type, made: ir.Type):
    @intrinsic
    def pointer(typingctx, address):
        """An address as a pointer."""
        signature = types.CPointer(kind)(types.int64)
        return signature, lambda context, builder, signature, args: builder.inttoptr(args[0], made.as_pointer())

    return pointer


floats_at, whole_at = _pointer(types.float32, ir.FloatType()), _pointer(types.int64, ir.IntType(64))
bytes_at, shorts_at = _pointer(types.int8, ir.IntType(8)), _pointer(types.int16, ir.IntType(16))
integers_at = _pointer(types.int32, ir.IntType(32))


@intrinsic
def ask_for(typingctx, address):
    """Ask for the cache line at an address; past the end of memory nothing happens."""

    def codegen(context, builder, signature, args):
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        made = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        name = "llvm.prefetch.p0"
        function = builder.module.globals.get(name) or ir.Function(builder.module, made, name)
        builder.call(function, [builder.inttoptr(args[0], byte), number(0), number(2), number(1)])  # to read, soon
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@njit
def round_part(job, first, last):
    """Vectors first..last-1 of a job: rows W + ROW_BYTES * RESULTS[i] are rounded into its panel."""
    kind, cols = number_of(job, j.ROUNDING), number_of(job, j.COLS)
    values, sums = number_of(job, j.VALUES), number_of(job, j.SUMS)
    panel = (
        carray(bytes_at(values), ANY), carray(floats_at(values), ANY), carray(floats_at(number_of(job, j.STEPS)), ANY),
        carray(floats_at(sums), ANY), carray(shorts_at(sums), ANY),
    )  # fmt: skip
    x = carray(floats_at(number_of(job, j.W)), (ANY, number_of(job, j.ROW_BYTES) // 4))
    order = carray(whole_at(number_of(job, j.RESULTS)), last)
    round_rows(kind, x, cols, order[first:], number_of(job, j.TILE), panel, first)


@njit
def number_of(job, field):
    return j.number_at(job + 8 * field)


@cfunc("void(i8, i8, i8)", cache=True)
def round_piece(job, first, last):
    """A piece of ``list_rounding``."""
    round_part(job, first, last)


@cfunc("void(i8, i8, i8)", cache=True)
def activate_piece(job, first, last):
    """W[i] = act(W[i], UP[i]), then rounded: a piece of ``list_rounding`` of what comes between two products."""
    width = number_of(job, j.ROW_BYTES) // 4
    gate = carray(floats_at(number_of(job, j.W)), (ANY, width))
    up = carray(floats_at(number_of(job, j.UP)), (ANY, width))
    order = carray(whole_at(number_of(job, j.RESULTS)), last)
    for i in range(first, last):
        activate_rows(number_of(job, j.ACTIVATION), gate[order[i]], up[order[i]])
    round_part(job, first, last)


@njit
def list_rounding(state, jobs, x, order):
    """Turn jobs [n, JOB] of products into those that round their vectors: rows ``order`` of x, in their turn."""
    at = 0
    for i in range(len(jobs)):
        job = jobs[i]
        job[j.FUNCTION], job[j.W], job[j.ROW_BYTES] = state[j.ROUND], x.ctypes.data, 4 * x.shape[1]
        job[j.RESULTS], job[j.ROWS], job[j.PIECE_ROWS] = order[at:].ctypes.data, job[j.TOKENS], ROWS_AT_ONCE
        job[j.TILE] = state[j.MOST]
        at += job[j.TOKENS]


def new_state(helpers: int, most: int) -> np.ndarray:
    """``jobs.new_state`` with the functions that jobs may name."""
    state = j.new_state(helpers, most)
    state[j.ROUND], state[j.ACTIVATE] = round_piece.address, activate_piece.address
    return state
