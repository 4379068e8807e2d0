"""Random inputs that exercise kernels: numbers of unit variance, and matrices of every tensor format."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_cupy.kernels.matrix import Matrix
from moe_ref.quants import BY_NAME

U = 2.0**-24  # half a unit in the last place of float32, relative

SCALES_AT = {  # bytes of a block where its half-precision scales and minimums stand
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "MXFP4": (),
    "IQ1_S": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,),
    "TQ1_0": (52,), "TQ2_0": (64,), "NVFP4": (),
}  # fmt: skip
FINER = {"IQ4_NL": 8, "IQ4_XS": 8}  # their codes stand for values up to 127


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Float32 of unit variance."""
    return rng.normal(0, 1, shape).astype(np.float32)


def unset(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    """An output that nothing has been written to yet: NaN, or a number that nobody expects."""
    return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else -77, dtype)


def random_matrix(rng: np.random.Generator, kind: str, rows: int, cols: int) -> Matrix:
    """Random blocks of a format, with scales that make weights of ordinary size (about 0.05)."""
    t = BY_NAME[kind]
    if t.block_elements == 1:
        values = rng.normal(0, 0.05, (rows, cols)).astype(np.float32)
        bits = (values.view(np.uint32) >> 16).astype("<u2")
        data = {"F32": values, "F16": values.astype("<f2"), "BF16": bits}[kind].view(np.uint8)
        return Matrix(kind, rows, cols, np.ascontiguousarray(data).reshape(-1))
    blocks = rng.integers(0, 256, (rows * cols // t.block_elements, t.block_bytes), dtype=np.uint8)
    size = 2.0 ** -(3 + t.row_bytes(t.block_elements) * 8 // t.block_elements) / FINER.get(kind, 1)
    for at in SCALES_AT.get(kind, ()):
        scales = rng.uniform(-size, size, len(blocks)) / (32 if t.block_elements == 256 else 1)
        blocks[:, at : at + 2] = scales.astype("<f2").view(np.uint8).reshape(-1, 2)
    _other_scales(rng, kind, blocks)
    return Matrix(kind, rows, cols, blocks.reshape(-1))


def _other_scales(rng: np.random.Generator, kind: str, blocks: np.ndarray) -> None:
    """Ordinary values for scales that are no half-precision numbers of their own; blocks uint8 [n, block_bytes]."""
    if kind == "MXFP4":
        blocks[:, 0] = rng.integers(119, 122, len(blocks))  # the exponent of a power of two, 127 for one
    if kind == "NVFP4":
        blocks[:, :4] = rng.integers(0, 48, (len(blocks), 4))  # subnormal scales included
    if kind == "IQ1_M":  # four bits in the top of each of four words
        bits = (rng.uniform(-0.02, 0.02, len(blocks))).astype("<f2").view(np.uint16)
        for i in range(4):
            high = blocks[:, 49 + 2 * i]
            blocks[:, 49 + 2 * i] = (high & 15) | (bits >> 4 * i & 15) << 4
