"""Every case of every CUDA kernel, for one block size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moe_cupy.kernels.cuda.cases import Case, matrix_cases, quantize_case
from moe_cupy.kernels.cuda.cases_layer import expert_cases, layer_cases
from moe_cupy.kernels.cuda.sources import BLOCK_FORMATS, FORMATS
from moe_ref.quants import BY_NAME


def all_cases(block: int = 64, formats: tuple[str, ...] = FORMATS, seed: int = 0) -> Iterator[Case]:
    """Cases of all kernels but resolve and fill, whose expectation is the cache's (see the tests)."""
    rng = np.random.default_rng(seed)
    yield quantize_case(rng, block)
    yield from layer_cases(rng, block)
    for kind in formats:
        yield from matrix_cases(rng, kind, block)
        step = max(BY_NAME[kind].block_elements, 32)
        yield from expert_cases(rng, kind, step, kind in BLOCK_FORMATS, block)
