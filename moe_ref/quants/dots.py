"""A stored matrix times rounded activations, addition by addition as llama.cpp's CPU kernels do it.

Why the order of additions matters: the result is rounded to 8 bits before the next matrix, and where it lies next to a
half, the last bit of a sum decides over a whole step, which everything behind it sees. With the same order, the same
bits come out nearly always. What is here: the kernels for several tokens at once on x86-64 with AVX-512 and VNNI (those
for one token, and for an expert with fewer than 8, differ in the last bit). Multiply-add rounds once, hence float64.

Source: ``sgemm.cpp`` (tinyBLAS), ``arch/x86/repack.cpp``, ``tiled-kernel.cpp``, ``arch/x86/quants.c`` of ggml 0.25.3.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moe_ref.quants import dequantize
from moe_ref.quants.activations import DOT_TYPES, quantize_q8_0, quantize_q8_k, round_for, round_half
from moe_ref.quants.k import BLOCK_Q2_K, BLOCK_Q4_K, BLOCK_Q5_K
from moe_ref.quants.legacy import BLOCK_Q4_1, BLOCK_Q5_1

AFFINE = {"Q4_1": BLOCK_Q4_1, "Q5_1": BLOCK_Q5_1, "Q2_K": BLOCK_Q2_K, "Q4_K": BLOCK_Q4_K, "Q5_K": BLOCK_Q5_K}
INTERLEAVED = ("Q4_0", "IQ4_NL", "MXFP4")  # eight rows side by side in memory, so a vector holds rows, not parts of one
LANES = {"F32": (16, 16), "F16": (16, 16), "BF16": (32, 16)}  # numbers taken at once, and sums they are added to
RUNS = {"Q2_K": 128, "Q4_K": 64}  # whole numbers that are added before the scale is applied, where rows are interleaved
MOST_SUMS = 1 << 22
NONE = np.empty((0, 0), np.float32)


class Matrix(NamedTuple):
    """A decoded matrix [out, in]; of an affine type (x = step * code - floor * low), its four parts."""

    kind: str
    weights: np.ndarray  # float32 [out, in]; or the codes
    steps: np.ndarray = NONE  # [out, blocks]
    floors: np.ndarray = NONE  # [out, blocks]
    lows: np.ndarray = NONE  # [out, in]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.weights, self.steps, self.floors, self.lows))


def decode(raw: np.ndarray, kind: str, shape: tuple[int, ...], name: str = "tensor") -> Matrix:
    """uint8 [nbytes] -> the matrix of ``shape``; parts of an affine type come of decoding it with other scales."""
    shape = shape if len(shape) > 1 else (1, *shape)
    if kind not in AFFINE:
        return Matrix(kind, dequantize(raw, kind, shape, name))
    block = raw.copy().view(AFFINE[kind])
    floor, sign = ("m", 1) if kind in ("Q4_1", "Q5_1") else ("dmin", -1)
    steps, floors = (block[name].astype(np.float32).reshape(shape[0], -1) for name in ("d", floor))
    block["d"], block[floor] = 1, 0
    codes = dequantize(block.view(np.uint8), kind, shape, name)
    block["d"], block[floor] = 0, sign
    return Matrix(kind, codes, steps, floors, dequantize(block.view(np.uint8), kind, shape, name))


def multiply(x: np.ndarray, matrix: Matrix, is_expert: bool) -> np.ndarray:
    """float32 [T, in] -> float32 [T, out]. Experts with interleaved rows take one token at a time."""
    dot, rows = DOT_TYPES.get(matrix.kind, "F32"), len(matrix.weights)
    if dot == "Q8_K":
        runs = 256 if is_expert or rows % 8 else RUNS.get(matrix.kind, 256)
        return _interleaved_k(x, matrix, runs) if matrix.kind in RUNS else _tiled_k(x, matrix)
    if dot == "Q8_1":
        return _with_minimums(x, matrix)
    block, lanes = LANES.get(dot) or (32, 1 if matrix.kind in INTERLEAVED and rows % 8 == 0 else 8)
    return _in_lanes(round_for(x, matrix.kind), matrix.weights, block, lanes)


def _plus(total: np.ndarray, product: np.ndarray) -> np.ndarray:
    """float32 plus an exact float64 product, rounded once."""
    return (total + product).astype(np.float32)


def _in_lanes(x: np.ndarray, weights: np.ndarray, block: int, lanes: int) -> np.ndarray:
    """``lanes`` sums, each of its part of every block; their upper half is added to the lower until one is left."""
    if len(x) > 1 and lanes * len(x) * len(weights) > MOST_SUMS:  # less memory, the same numbers
        half = len(x) // 2
        return np.concatenate([_in_lanes(part, weights, block, lanes) for part in (x[:half], x[half:])])
    x, weights = (
        np.pad(a, ((0, 0), (0, -a.shape[1] % block))).reshape(len(a), -1, lanes, block // lanes).astype(np.float64)
        for a in (x, weights)
    )
    sums = np.zeros((lanes, len(x), len(weights)), np.float32)
    for b in range(x.shape[1]):
        sums = _plus(sums, x[:, b].transpose(1, 0, 2) @ weights[:, b].transpose(1, 2, 0))
    while len(sums) > 1:
        sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
    return sums[0]


def _with_minimums(x: np.ndarray, m: Matrix) -> np.ndarray:
    """Q4_1, Q5_1: the minimums meet the sums of the activations' blocks, which Q8_1 keeps in half precision."""
    scaled = (m.weights.reshape(*m.steps.shape, 32) * m.steps[..., None]).reshape(m.weights.shape)
    step, q = quantize_q8_0(x)
    sums = round_half(step * q.sum(axis=1, keepdims=True)).reshape(len(x), -1).astype(np.float64)  # [T, blocks]
    total = np.zeros((len(x), len(m.weights)), np.float32)
    for b in range(sums.shape[1]):
        total = _plus(total, sums[:, b, None] * m.floors[:, b])
    return _in_lanes(round_for(x, m.kind), scaled, 32, 8) + total


def _whole_numbers(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q8_K: steps [T, blocks, 1] and whole numbers [T, blocks, 256]."""
    step, q = quantize_q8_k(x)
    return step.reshape(len(x), -1, 1), q.reshape(len(x), -1, 256).astype(np.float64)


def _tiled_k(x: np.ndarray, m: Matrix) -> np.ndarray:
    """A block's exact sum times the matrix's step, less the minimums' part, times the activations' step."""
    step, q = _whole_numbers(x)
    total = np.zeros((len(x), len(m.weights)), np.float32)
    for b in range(q.shape[1]):
        part = slice(256 * b, 256 * (b + 1))
        scaled = q[:, b] @ m.weights[:, part].T.astype(np.float64)
        result = (scaled * m.steps[:, b] if m.steps.size else scaled).astype(np.float32)
        if m.lows.size:
            result = _plus(result, -(q[:, b] @ m.lows[:, part].T.astype(np.float64)) * m.floors[:, b])
        total = _plus(total, result.astype(np.float64) * step[:, b])
    return total


def _interleaved_k(x: np.ndarray, m: Matrix, run: int) -> np.ndarray:
    """The exact sum of each run times the product of both steps; minimums are added up apart."""
    step, q = _whole_numbers(x)
    total = low = np.zeros((len(x), len(m.weights)), np.float32)
    for b in range(q.shape[1]):
        by_step, by_floor = ((step[:, b] * a[:, b]).astype(np.float64) for a in (m.steps, m.floors))
        for i in range(0, 256, run):
            here, there = slice(i, i + run), slice(256 * b + i, 256 * b + i + run)
            total = _plus(total, q[:, b, here] @ m.weights[:, there].T * by_step)
            low = _plus(low, q[:, b, here] @ m.lows[:, there].T * by_floor)
    return total - low
