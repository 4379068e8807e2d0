"""Matrices times rounded vectors: each call rounds, lists its jobs and has the crew do them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numba import njit

from moe_cupy.kernels.first_use import first_use
from moe_cupy.kernels.host import jobs as j
from moe_cupy.kernels.host.pieces import list_rounding
from moe_cupy.kernels.host.rounding import KINDS, PLAIN, Q8_K_BY_FOURS, Q8_K_BY_HALVES, new_panel
from moe_cupy.kernels.host.simd.compiler import rows_address
from moe_cupy.kernels.host.simd.isa import chosen
from moe_cupy.kernels.host.simd.nibbles import BY_HALVES
from moe_cupy.kernels.host.simd.rows import FLOATS, FORMATS, sizes
from moe_cupy.kernels.matrix import Matrix
from moe_ref.quants import BY_NAME
from moe_ref.quants.activations import DOT_TYPES


class Crew(Protocol):
    """Who does the jobs: ``moe_cupy.device.crew``."""

    act: str
    state: np.ndarray

    def wake(self) -> None:
        """See that those who help are awake, until MORE is 0 again."""


def takes(w: Matrix, act: str) -> bool:
    """Whether a matrix is multiplied here: rounded vectors meet all formats that have a kernel, exact ones floats."""
    return w.type in (FORMATS if act == "q8" else FLOATS) and w.cols % 32 == 0


def rounding(kind: str) -> int:
    """What vectors are rounded to that meet a format."""
    if kind in BY_HALVES:
        return Q8_K_BY_HALVES
    return Q8_K_BY_FOURS if kind == "IQ4_XS" else KINDS[DOT_TYPES.get(kind, "F32")]


@lru_cache(1024)
def template(kind: str, rows: int, cols: int, act: str) -> np.ndarray:
    """A job int64 [JOB] but for its addresses and vectors. Compiles the kernels at first use."""
    job, (at_once, _, of_panel) = np.zeros(j.JOB, np.int64), sizes(kind)
    with first_use():
        for size in range(chosen().columns.bit_length()):
            job[j.KERNEL + size] = rows_address(kind, 1 << size)
    job[j.ROW_BYTES], job[j.BLOCKS] = BY_NAME[kind].row_bytes(cols), cols // max(32, BY_NAME[kind].block_elements)
    job[j.ROWS], job[j.COLS] = rows, cols
    job[j.ROUNDING] = rounding(kind) if act == "q8" else PLAIN
    job[j.VALUE_BYTES : j.SUM_BYTES + 1] = [size * -(-cols // at_once) for size in of_panel]
    return job


def address(array: Any) -> int:
    return array.__array_interface__["data"][0]


def address_of(w: Matrix) -> int:
    """Where a matrix begins."""
    if "address" not in w.prepared:
        w.prepared["address"] = address(w.data)
    return w.prepared["address"]


def job_of(w: Matrix, act: str) -> np.ndarray:
    """The job of a matrix, but for its vectors."""
    if act not in w.prepared:
        w.prepared[act] = template(w.type, w.rows, w.cols, act).copy()
        w.prepared[act][j.W] = address_of(w)
    return w.prepared[act]


@njit
def give(job, panel, at, results, tokens):
    """Write into a job which vectors it has, from vector ``at`` of a panel on, and where its results go."""
    codes, values, steps, sums, groups = panel
    job[j.VALUES] = (codes.ctypes.data if codes.size else values.ctypes.data) + at * job[j.VALUE_BYTES]
    job[j.STEPS] = steps.ctypes.data + at * job[j.STEP_BYTES]
    job[j.SUMS] = (groups.ctypes.data if groups.size else sums.ctypes.data) + at * job[j.SUM_BYTES]
    job[j.RESULTS], job[j.TOKENS] = results, tokens


@njit
def multiply_jobs(state, jobs, x, order, held):
    """Round the vectors of jobs [n, JOB] of products, rows ``order`` of x in their turn; then do them."""
    rounds = jobs.copy()
    list_rounding(state, rounds, x, order)
    j.run(state, rounds, (x, order, held))
    j.atomic_store(state, j.MORE, 0)
    j.run(state, jobs, held)


@njit("void(i8[::1], i8[::1], f4[:, ::1], f4[:, ::1])", nogil=True, cache=True)
def multiply_rows(state, job, x, out):
    """out = x W^T for the matrix of a job; x [T, cols], out [T, rows]."""
    tokens, jobs = len(x), job.copy().reshape(1, -1)
    panel, results = new_panel(job[j.ROUNDING], tokens, job[j.COLS]), np.empty(tokens, np.int64)
    for t in range(tokens):
        results[t] = out[t].ctypes.data
    give(jobs[0], panel, 0, results.ctypes.data, tokens)
    multiply_jobs(state, jobs, x, np.arange(tokens), (panel, results))


@njit("void(i8[::1], i8[::1], f4[:, :, ::1], f4[:, :, ::1])", nogil=True, cache=True)
def multiply_heads(state, job, x, out):
    """out[t, h, :rows] = W[h] x[t, h, :cols]; the job is of the first of H matrices; x and out [T, H, .]."""
    tokens, heads, width = x.shape
    jobs, results = np.empty((heads, job.size), np.int64), np.empty((heads, tokens), np.int64)
    panel, order = new_panel(job[j.ROUNDING], tokens * heads, job[j.COLS]), np.empty(heads * tokens, np.int64)
    for h in range(heads):
        for t in range(tokens):
            results[h, t], order[h * tokens + t] = out[t, h].ctypes.data, heads * t + h
        jobs[h] = job
        jobs[h, j.W] += h * job[j.ROWS] * job[j.ROW_BYTES]
        give(jobs[h], panel, h * tokens, results[h].ctypes.data, tokens)
    multiply_jobs(state, jobs, x.reshape(-1, width), order, (panel, results))


def multiply(crew: Crew, x: np.ndarray, w: Matrix, out: np.ndarray) -> None:
    """out = x W^T; x [T, cols], out [T, rows]."""
    crew.wake()
    multiply_rows(crew.state, job_of(w, crew.act), x, out)


def multiply_stack(crew: Crew, x: np.ndarray, w: Matrix, out: np.ndarray) -> None:
    """out[t, h, :rows] = W[h] x[t, h, :cols]; w holds the H matrices one below the other, x and out [T, H, .]."""
    crew.wake()
    job = template(w.type, w.rows // x.shape[1], w.cols, crew.act).copy()
    job[j.W] = address_of(w)
    multiply_heads(crew.state, job, x, out)
