"""The codebooks of moe_ref as CUDA source: what gridformats.cuh looks points up in."""

from __future__ import annotations

from functools import cache

import numpy as np

from moe_ref.quants.codebooks import BOOKS, codebook


def packed(name: str) -> np.ndarray:
    """uint16 [points]: each point's weights as codes, the first lowest; of 2 bits where there are 8 weights, else 4."""
    _, weights, levels = BOOKS[name]
    codes = np.searchsorted(levels, codebook(name)).astype(np.uint16)  # [points, weights]
    shifts = np.arange(weights, dtype=np.uint16) * np.uint16(16 // weights)
    return np.bitwise_or.reduce(codes << shifts, axis=1)


@cache
def tables() -> str:
    """A constant array for each book, e.g. BOOK_IQ2XXS."""
    lines = []
    for name in BOOKS:
        points = [f"{point:#x}," for point in packed(name).tolist()]
        rows = ["".join(points[i : i + 16]) for i in range(0, len(points), 16)]
        lines += [f"static __device__ const uint16_t BOOK_{name.upper()}[{len(points)}] = {{", *rows, "};"]
    return "\n".join(lines) + "\n"
