"""Inputs that exercise each CUDA kernel, what is right in float64, and how far float32 may be from that.

Tolerances are derived as in ``moe_cupy/kernels/cases.py``: with u = 2^-24, a sum that passes each term through at
most ``depth`` additions is off by at most about ``(depth + roundings of a term) u`` times the sum of the magnitudes.
A kernel's depth is known: a lane adds every 32nd group, then five steps join the lanes. Integer products are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_cupy.kernels.cuda import launches
from moe_cupy.kernels.cuda.emulation.library import arrays_of
from moe_cupy.kernels.cuda.launches import Launch, Pointers
from moe_cupy.kernels.cuda.sources import PER_FORMAT
from moe_cupy.kernels.matrix import Matrix
from moe_cupy.kernels.reference import expand
from moe_cupy.kernels.samples import U, normal, random_matrix, unset
from moe_ref.quants import BY_NAME

Q8 = np.dtype([("d", "<f4"), ("sum", "<i2", 2), ("q", "i1", 32)])  # of prelude.cuh

# Where the quants lie in formats that have offsets.
QUANTS_OF_AFFINE = {
    "Q4_1": slice(4, 20), "Q5_1": slice(4, 24), "Q2_K": slice(16, 80), "Q4_K": slice(16, 144), "Q5_K": slice(16, 176),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Output:
    """An array that a kernel writes, what it should hold (NaN: left unset), and the allowed error (0: exact)."""

    got: np.ndarray
    want: np.ndarray
    allowed: np.ndarray | float = 0.0

    def ratio(self) -> float:
        """The worst error as a share of what is allowed; infinite for a NaN where a number should be."""
        fine = (self.got == self.want) | (np.isnan(self.got) & np.isnan(self.want))
        with np.errstate(invalid="ignore", divide="ignore"):
            error = np.abs(self.got.astype(np.float64) - self.want)
            allowed = np.broadcast_to(self.allowed, error.shape)
            share = np.where(fine, 0.0, error / allowed)
        return float(np.max(np.where(np.isnan(share), np.inf, share), initial=0.0))


@dataclass(frozen=True, slots=True)
class Case:
    """Launches in order, and what must have come of them; arrays that are no output must be left alone."""

    label: str
    launches: tuple[Launch, ...]
    outputs: tuple[Output, ...]
    scratch: tuple[Any, ...] = ()  # written, and not compared

    def run(self, launch: Callable[[Launch], None]) -> float:
        """The worst error over tolerance; infinite if the kernel wrote into something that it only reads."""
        written = [id(a) for a in (*self.scratch, *(output.got for output in self.outputs))]
        read = [(a, a.copy()) for one in self.launches for a in arrays_of(one) if id(a) not in written]
        for one in self.launches:
            launch(one)
        return self.worst() if all(same(a, before) for a, before in read) else np.inf

    def worst(self) -> float:
        """The worst error over tolerance of all outputs."""
        return max(output.ratio() for output in self.outputs)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """To the byte."""
    return a.tobytes() == b.tobytes()


def offsets(w: Matrix) -> np.ndarray:
    """The part of each weight that does not depend on its quant, float64 [rows, cols]."""
    if w.type not in QUANTS_OF_AFFINE:
        return np.zeros((w.rows, w.cols))
    blocks = w.data.reshape(-1, BY_NAME[w.type].block_bytes).copy()
    blocks[:, QUANTS_OF_AFFINE[w.type]] = 0
    return expand(Matrix(w.type, w.rows, w.cols, blocks.reshape(-1)))


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x [..., cols] -> Q8 blocks uint8 [..., cols / 32, 40], and the numbers they stand for, float64 [..., cols]."""
    groups = x.reshape(*x.shape[:-1], -1, 32)
    d = np.max(np.abs(groups), axis=-1) / np.float32(127)
    with np.errstate(invalid="ignore", divide="ignore"):
        q = np.where(d[..., None] > 0, np.rint(groups / d[..., None]), 0).astype(np.int8)
    blocks = np.zeros(d.shape, Q8)
    blocks["d"], blocks["q"], blocks["sum"] = d, q, q.reshape(*d.shape, 2, 16).sum(-1, dtype=np.int16)
    values = (d[..., None].astype(np.float64) * q).reshape(x.shape)
    return blocks.view(np.uint8).reshape(*d.shape, 40), values


def sum_error(x: np.ndarray, w: Matrix, q8: bool) -> np.ndarray:
    """Allowed error of x W^T by a warp a row, [T, rows]."""
    groups = -(-w.cols // 32)
    depth = -(-groups // 32) * (1 if q8 else 32) + 5
    magnitude = np.abs(expand(w)) + 2 * np.abs(offsets(w))
    return (depth + (8 if q8 else 4)) * U * (np.abs(x).astype(np.float64) @ magnitude.T)


def as_input(x: np.ndarray, q8: bool) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel is given, and the float64 numbers that it stands for."""
    return quantized(x) if q8 else (x, x.astype(np.float64))


def gemv_case(rng: np.random.Generator, kind: str, shape: tuple[int, int, int], block: int, q8: bool) -> Case:
    """One matrix; shape is (T, rows, cols). With a bias and a scale, added to what was there."""
    n_tokens, rows, cols = shape
    w, bias, old = random_matrix(rng, kind, rows, cols), normal(rng, rows), normal(rng, n_tokens, rows)
    given, x = as_input(normal(rng, n_tokens, cols), q8)
    out = old.copy()
    y = 0.75 * (x @ expand(w).T)
    error = 0.75 * sum_error(x, w, q8) + 4 * U * (np.abs(y) + np.abs(bias) + np.abs(old))
    launch = launches.gemv(out, w, given, bias, scale=0.75, add=True, block=block)
    return Case(f"{launch.kernel} {shape}", (launch,), (Output(out, old + y + bias, error),))


def naive_case(rng: np.random.Generator, kind: str, block: int) -> Case:
    """A thread adds all groups one after another."""
    cols = max(BY_NAME[kind].block_elements, 32)
    w, x = random_matrix(rng, kind, 37, cols), normal(rng, 2, cols)
    out, want = unset(2, 37), x @ expand(w).T
    error = (cols + 4) * U * (np.abs(x) @ (np.abs(expand(w)) + 2 * np.abs(offsets(w))).T)
    return Case(f"gemv_naive {kind}", (launches.gemv_naive(out, w, x, block),), (Output(out, want, error),))


def heads_case(rng: np.random.Generator, kind: str, block: int) -> Case:
    """A matrix for each of 3 heads; the vectors of x and out are longer than what is used."""
    heads, rows, cols = 3, 10, 256
    w, scales = random_matrix(rng, kind, heads * rows, cols), normal(rng, heads)
    x, out = normal(rng, 2, heads, cols + 32), unset(2, heads, rows + 5)
    want, error = np.full(out.shape, np.nan), np.zeros(out.shape)
    for h in range(heads):
        one = Matrix(kind, rows, cols, w.data.reshape(heads, -1)[h])
        want[:, h, :rows] = scales[h] * (x[:, h, :cols] @ expand(one).T)
        error[:, h] = np.abs(scales[h]) * sum_error(x[:, h, :cols], one, False).max()
    launch = launches.gemv(out, w, x, heads=heads, scales=scales, block=block)
    return Case(f"{launch.kernel}, 3 heads", (launch,), (Output(out, want, error * (1 + 2 * U)),))


def gemm_case(
    rng: np.random.Generator, kind: str, shape: tuple[int, int, int], q8: bool = True, add: bool = False
) -> Case:
    """One matrix, no grouping; shape is (T, rows, cols)."""
    n_tokens, rows, cols = shape
    w, bias = random_matrix(rng, kind, rows, cols), normal(rng, rows)
    given, x = as_input(normal(rng, n_tokens, cols), q8)
    out = normal(rng, n_tokens, rows) if add else unset(n_tokens, rows)
    old = out.astype(np.float64) if add else 0.0
    launch = launches.gemm(out, Pointers([w.data]), w, given, bias=bias, add=add)
    want = x @ expand(w).T + bias + old
    return Case(f"{launch.kernel} {shape}", (launch,), (Output(out, want, gemm_error(x, w, q8)),))


def gemm_error(x: np.ndarray, w: Matrix, q8: bool) -> np.ndarray:
    """Allowed error of a gemm tile, where a thread adds all groups, or columns, one after another; [T, rows]."""
    magnitude = np.abs(expand(w)) + 2 * np.abs(offsets(w))
    depth = 2 * w.cols // 32 if q8 else w.cols
    return (depth + 10) * U * (np.abs(x) @ magnitude.T + 4)


def grouped_case(rng: np.random.Generator, kind: str, block: int, q8: bool, variant: str = "") -> Case:
    """Pairs sorted by slot, then each slot's matrix times its own; one slot is empty and one pair has none.

    Pairs have weights; their experts, which are other numbers than slots, scales and biases.
    """
    n_tokens, used, slots, rows, cols = 41, 2, 5, 70, max(BY_NAME[kind].block_elements, 32) * 2
    matrices = [random_matrix(rng, kind, rows, cols) for _ in range(slots)]
    slot_of = rng.choice([0, 0, 1, 4, 2], (n_tokens, used)).astype(np.int32)
    slot_of[3, 1] = -1
    given, x = as_input(normal(rng, n_tokens, cols), q8)
    ids, weight, scale, bias = 4 - slot_of.ravel(), normal(rng, 82), normal(rng, 6), normal(rng, 6, rows)
    order, first, out = unset(82, dtype=np.int32), unset(slots + 1, dtype=np.int32), unset(82, rows)
    by_slot = np.argsort(slot_of.ravel(), kind="stable")[1:]
    begins = np.searchsorted(np.sort(slot_of.ravel()), np.arange(slots + 1)) - 1
    want, error = np.full(out.shape, np.nan), np.zeros(out.shape)
    for pair, slot in enumerate(slot_of.ravel()):
        if slot >= 0:
            vector, e = x[pair // used : pair // used + 1], ids[pair]
            factor = weight[pair].astype(np.float64) * scale[e]
            want[pair] = factor * (vector @ expand(matrices[slot]).T) + bias[e]
            size = np.abs(want[pair]) + np.abs(bias[e])
            error[pair] = np.abs(factor) * gemm_error(vector, matrices[slot], q8) + 4 * U * size
    sort = launches.group_by_expert(order, first, slot_of, block)
    table = Pointers([m.data for m in matrices])
    product = launches.gemm(
        out, table, matrices[0], given, order, first, ids=ids, weight=weight, scale=scale, bias=bias, per_row=used,
        most=82, variant=variant,
    )  # fmt: skip
    outputs = (Output(order, np.append(by_slot, -77)), Output(first, begins), Output(out, want, error))
    return Case(f"{product.kernel}, grouped", (sort, product), outputs)


def embed_cases(rng: np.random.Generator, kind: str, block: int) -> Iterator[Case]:
    """Rows of a table, scaled by a power of two so that it is exact, and a whole matrix."""
    rows, cols = 9, max(BY_NAME[kind].block_elements, 32) * 3
    w, ids, out = random_matrix(rng, kind, rows, cols), np.array([8, 0, 3], np.int32), unset(3, cols)
    yield Case(f"embed {kind}", (launches.embed(out, w, ids, 0.5, block),), (Output(out, 0.5 * expand(w)[ids]),))
    whole = unset(rows, cols)
    yield Case(f"dequantize {kind}", (launches.embed(whole, w, block=block),), (Output(whole, expand(w)),))


def quantize_case(rng: np.random.Generator, block: int) -> Case:
    """Ordinary groups, a group of zeros, and a group with its largest number alone."""
    x = normal(rng, 7, 96)
    x[2, :32], x[3, 32:64] = 0, 0
    x[3, 40] = -3
    blocks, _ = quantized(x)
    out = np.full(blocks.shape, 0xAB, np.uint8)
    return Case("quantize_q8", (launches.quantize_q8(out, x, block),), (Output(out, blocks),))


def matrix_cases(rng: np.random.Generator, kind: str, block: int) -> Iterator[Case]:
    """Kernels that read a matrix of type ``kind``: less than a lane's turn, more, and rows that fill no block."""
    t = BY_NAME[kind]
    step, modes = max(t.block_elements, 32), (False,) if t.block_elements == 1 else (False, True)
    for q8 in modes:
        yield gemv_case(rng, kind, (1, 37, step), block, q8)
        yield gemv_case(rng, kind, (2, 5, -(-1100 // step) * step), block, q8)
    if t.block_elements == 1:
        yield gemv_case(rng, kind, (2, 9, 75), block, False)
        yield gemm_case(rng, kind, (5, 66, 75), False, add=True)
    for q8 in modes:
        yield gemm_case(rng, kind, (33, 65, step), q8)
        yield gemm_case(rng, kind, (3, 7, 2 * step), q8, add=True)
        yield grouped_case(rng, kind, block, q8)
    for variant in ("pipelined", "mma"):
        if kind in PER_FORMAT[f"gemm_{variant}"]:
            yield grouped_case(rng, kind, block, True, variant)
    yield heads_case(rng, kind, block)
    if kind in PER_FORMAT["gemv_naive"]:
        yield naive_case(rng, kind, block)
    yield from embed_cases(rng, kind, block)
