"""Products as a list of jobs that threads share, without a lock and without the interpreter.

A job is a matrix times a panel of rounded vectors (``simd/rows.py``), as ``JOB`` whole numbers. Its rows are cut into
pieces. The pieces of all jobs of a list are counted through, and whoever is free takes the next number:

    NEXT = generation << 40 | pieces << 20 | next piece        taken by adding 1: one number has one taker
    DONE = pieces finished                                     the list is done when all are

The caller works too, so a helper that sleeps or comes late costs time, never a result. A number that has run past the
pieces says that there is nothing to do: a helper needs nothing else to see it, so the list may change behind its back.
Which thread computes a row changes nothing about it.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# A job. KERNEL..KERNEL+3 take 1, 2, 4 and 8 vectors at a time (0: there is none); RESULTS: where y[t] begins, int64 [T]
KERNEL, W, ROW_BYTES, BLOCKS, VALUES, STEPS, SUMS, RESULTS, TOKENS, ROWS, COLS = 0, *range(4, 14)
VALUE_BYTES, STEP_BYTES, SUM_BYTES, PIECE_ROWS, FIRST_PIECE = range(14, 19)  # ..._BYTES: of one vector
ROUNDING = 19  # what its vectors are rounded to (``rounding.KINDS``)
FUNCTION, UP, ACTIVATION, TILE = range(20, 24)  # of jobs that are no products: ``pieces.py``
JOB = 24
NEXT, DONE, JOBS, COUNT, ASLEEP, CANCELLED, HELPERS, MOST = range(0, 64, 8)  # each in a cache line of its own
MORE = 59  # 1: the next list is being made, so nobody goes to sleep
ROUND, ACTIVATE, ATTEND = 57, 58, 60  # addresses of functions: they differ from process to process
STATE = 64  # of HELPERS threads that help; at MOST so many vectors are multiplied at a time
LEAST_WORK, MOST_WORK = 1 << 16, 1 << 20  # multiply-adds in a piece: 3 to 40 us; where one begins, memory is waited for
PIECES = 8  # of a list for each thread, if that is between these: so many that nobody waits long for the last one
FEWEST_ROWS = 32  # in a piece, so that its weights and one tile of vectors are used from the nearest cache
IDLE_TURNS = 1 << 14  # looks at NEXT, about 20 ns apart, before a helper goes to sleep


@intrinsic
def call_rows(typingctx, kernel, arguments):
    """Call the function at an address with nine whole numbers."""

    def codegen(context, builder, signature, args):
        numbers = [builder.extract_value(args[1], i) for i in range(9)]
        made = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 9)
        builder.call(builder.inttoptr(args[0], ir.PointerType(made)), numbers)
        return context.get_dummy_value()

    return types.void(types.int64, types.UniTuple(types.int64, 9)), codegen


@intrinsic
def call_piece(typingctx, function, job, first, last):
    """Call the function at an address with a job's address, its first row and the one after its last."""

    def codegen(context, builder, signature, args):
        made = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 3)
        builder.call(builder.inttoptr(args[0], ir.PointerType(made)), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


def _place(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


@intrinsic
def atomic_add(typingctx, array, index, value):
    """array[index] += value as one step; returns what was there."""

    def codegen(context, builder, signature, args):
        place = _place(context, builder, signature.args[0], args[0], args[1])
        return builder.atomic_rmw("add", place, args[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), codegen


@intrinsic
def atomic_load(typingctx, array, index):
    """array[index], as others have written it by now."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(_place(context, builder, signature.args[0], args[0], args[1]), "seq_cst", 8)

    return types.int64(array, types.int64), codegen


@intrinsic
def atomic_store(typingctx, array, index, value):
    """array[index] = value, seen by others after all that was written before."""

    def codegen(context, builder, signature, args):
        place = _place(context, builder, signature.args[0], args[0], args[1])
        builder.store_atomic(args[2], place, "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), codegen


@intrinsic
def number_at(typingctx, address):
    """The int64 at an address."""

    def codegen(context, builder, signature, args):
        return builder.load(builder.inttoptr(args[0], ir.IntType(64).as_pointer()))

    return types.int64(types.int64), codegen


@intrinsic
def pause(typingctx):
    """Tell the CPU that this is a loop that waits."""

    def codegen(context, builder, signature, args):
        if "x86" in builder.module.triple or "x86" in context.codegen().magic_tuple()[0]:
            wait = ir.FunctionType(ir.VoidType(), [])
            name = "llvm.x86.sse2.pause"
            builder.call(builder.module.globals.get(name) or ir.Function(builder.module, wait, name), [])
        return context.get_dummy_value()

    return types.void(), codegen


@njit("void(i8, i8, i8)", nogil=True, cache=True)
def product(job, first, last):
    """Rows first..last-1 of the job at an address, with all its vectors: as many at a time as there is a kernel for."""
    tokens, blocks, row_bytes = number_at(job + 8 * TOKENS), number_at(job + 8 * BLOCKS), number_at(job + 8 * ROW_BYTES)
    w, results = number_at(job + 8 * W) + first * row_bytes, number_at(job + 8 * RESULTS)
    values, steps, sums = number_at(job + 8 * VALUES), number_at(job + 8 * STEPS), number_at(job + 8 * SUMS)
    t, size = 0, 3
    while t < tokens:
        while number_at(job + 8 * (KERNEL + size)) == 0 or 1 << size > tokens - t:
            size -= 1
        here = values + t * number_at(job + 8 * VALUE_BYTES)
        step, total = steps + t * number_at(job + 8 * STEP_BYTES), sums + t * number_at(job + 8 * SUM_BYTES)
        numbers = (w, row_bytes, blocks, here, step, total, results + 8 * t, 4 * first, last - first)
        call_rows(number_at(job + 8 * (KERNEL + size)), numbers)
        t += 1 << size


@njit
def do_piece(jobs, count, piece):
    """Piece number ``piece`` of the ``count`` jobs at address ``jobs``."""
    job = jobs + 8 * JOB * (count - 1)
    while number_at(job + 8 * FIRST_PIECE) > piece:
        job -= 8 * JOB
    rows = number_at(job + 8 * PIECE_ROWS)
    first = (piece - number_at(job + 8 * FIRST_PIECE)) * rows
    last, function = min(first + rows, number_at(job + 8 * ROWS)), number_at(job + 8 * FUNCTION)
    if function:
        call_piece(function, job, first, last)
    else:
        product(job, first, last)


@njit
def take(state, number):
    """Do the piece of a number that was taken from NEXT; False if it was past the last."""
    if number & 0xFFFFF >= (number >> 20) & 0xFFFFF:
        return False
    if not atomic_load(state, CANCELLED):
        do_piece(atomic_load(state, JOBS), atomic_load(state, COUNT), number & 0xFFFFF)
    atomic_add(state, DONE, 1)
    return True


@njit
def cut(jobs, threads):
    """Give each job of jobs [n, JOB] its pieces; returns how many there are."""
    pieces = work = 0
    for j in range(len(jobs)):
        work += jobs[j, ROWS] * jobs[j, COLS] * jobs[j, TOKENS]
    work = max(LEAST_WORK, min(MOST_WORK, work // (PIECES * threads)))
    for j in range(len(jobs)):
        job = jobs[j]
        if not job[FUNCTION]:
            job[PIECE_ROWS] = max(FEWEST_ROWS, work // max(1, job[COLS] * job[TOKENS]))
        job[FIRST_PIECE] = pieces
        pieces += (job[ROWS] + job[PIECE_ROWS] - 1) // job[PIECE_ROWS]
    return pieces


@njit
def run(state, jobs, held):
    """Do all jobs [n, JOB], with whoever serves ``state`` if there are helpers. Returns when they are done.

    ``held`` are the arrays whose addresses the jobs have: an array is freed after its last use, which this is.
    """
    pieces = cut(jobs, state[HELPERS] + 1)
    if state[HELPERS] == 0 or pieces < 2:
        for piece in range(pieces):
            if not atomic_load(state, CANCELLED):
                do_piece(jobs.ctypes.data, len(jobs), piece)
        return
    generation = (atomic_load(state, NEXT) >> 40) + 1
    atomic_store(state, JOBS, jobs.ctypes.data)
    atomic_store(state, COUNT, len(jobs))
    atomic_store(state, DONE, 0)
    atomic_store(state, NEXT, generation << 40 | pieces << 20)
    while take(state, atomic_add(state, NEXT, 1)):
        pass
    while atomic_load(state, DONE) < pieces:
        pause()


@njit("void(i8[::1], i8)", nogil=True, cache=True)
def serve(state, idle_turns):
    """Help with every list of jobs until there has been none for so many turns; then counted among ASLEEP."""
    idle = 0
    while idle < idle_turns:
        number = atomic_load(state, NEXT)
        if number & 0xFFFFF < (number >> 20) & 0xFFFFF and take(state, atomic_add(state, NEXT, 1)):
            idle = 0
        else:
            idle += 1 - atomic_load(state, MORE)
            pause()
    atomic_add(state, ASLEEP, 1)


@njit("i8(i8[::1], i8)", nogil=True, cache=True)
def take_all(state, index):
    """What state[index] holds, which becomes 0."""
    held = atomic_load(state, index)
    atomic_add(state, index, -held)
    return held


def new_state(helpers: int, most: int) -> np.ndarray:
    """What the threads of one device share; all helpers are asleep."""
    state = np.zeros(STATE, np.int64)
    state[HELPERS], state[ASLEEP], state[MOST] = helpers, helpers, most
    return state
