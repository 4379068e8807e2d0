"""The codebooks of the i-quants: the few points of a grid that a group of 4 or 8 weights may lie on.

Two bits a weight cannot buy a free choice of level for each weight, but they buy a choice among 256 whole
groups of eight. Which groups is a choice of the formats' author that follows from no stated rule,
so they are data: ``codebooks.npz``, written by ``scripts/codebooks.py`` from the tables of the Python package
gguf (MIT licence), which has them from ggml's ``ggml-common.h`` (``iq2xxs_grid`` and so on).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from moe_ref.quants.blocks import fields

FILE = Path(__file__).with_name("codebooks.npz")
# Points, weights a point, and the levels a weight may take. In the 2- and 3-bit books signs are kept apart.
BOOKS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "iq1s": (2048, 8, (-1, 0, 1)),
    "iq2xxs": (256, 8, (8, 25, 43)),
    "iq2xs": (512, 8, (8, 25, 43)),
    "iq2s": (1024, 8, (8, 25, 43)),
    "iq3xxs": (256, 4, (4, 12, 20, 28, 36, 44, 52, 62)),
    "iq3s": (512, 4, (1, 3, 5, 7, 9, 11, 13, 15)),
}


@cache
def codebook(name: str) -> np.ndarray:
    """int8 [points, 4 or 8], read-only; read from the file at first use."""
    with np.load(FILE, allow_pickle=False) as file:
        points = file[name]
    points.setflags(write=False)
    return points


# int8 [256, 8]: bit j of a code says whether weight j is negative.
SIGNS = 1 - 2 * fields(np.arange(256, dtype=np.uint8), 1).astype(np.int8)
# int8 [128, 8]: seven bits give eight signs, the last such that an even number of weights is negative.
EVEN_SIGNS = np.concatenate([SIGNS[:128, :7], SIGNS[:128].prod(axis=1, keepdims=True, dtype=np.int8)], axis=1)
