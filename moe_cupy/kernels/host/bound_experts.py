"""The op ``experts`` of one token made ready: all is known but which experts, and where their matrices lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import carray, njit

from moe_cupy.kernels.host import pieces as p
from moe_cupy.kernels.host.experts import MATRICES, address_of, by_matrix, experts_rows, layer_jobs
from moe_cupy.kernels.host.layer import ACTIVATIONS
from moe_cupy.kernels.host.products import Crew, address
from moe_cupy.kernels.host.steps import table
from moe_cupy.kernels.matrix import Matrix

X, WIDTH, IDS, CHOSEN, PARTS, MADE, ACTIVATION, SHARES, SCALES, EXPERTS = range(10)
BIASES = 10  # of gate, up, down: where and how many numbers each expert has
CALL = 16


@njit
def biases_at(call, m):
    count = call[BIASES + 2 * m + 1]
    return table(call[BIASES + 2 * m], call[EXPERTS] if count else 0, count)


@njit("void(i8[::1], i8[:, ::1], i8[::1], i8[:, ::1], i8)", nogil=True, cache=True)
def run_call(state, layer, call, experts, count):
    """``experts_rows`` with its arrays by address: the first ``count`` of experts [k, 4]."""
    x, k = table(call[X], 1, call[WIDTH]), call[CHOSEN]
    ids, scales = carray(p.integers_at(call[IDS]), (1, k)), table(call[SCALES], 3, call[EXPERTS] if call[SCALES] else 0)
    weights = table(call[SHARES], 1 if call[SHARES] else 0, k)
    biases = biases_at(call, 0), biases_at(call, 1), biases_at(call, 2)
    parts = carray(p.floats_at(call[PARTS]), (1, k, call[MADE]))
    adjusted = call[ACTIVATION], weights, scales, biases
    experts_rows(state, layer, x, (ids, experts[:count]), adjusted, parts)


class BoundExperts:
    """The op as a function of experts and their matrices.

    ``buffers`` are the op's but for the experts; all of them have matrices like ``three``.
    """

    def __init__(self, crew: Crew, three: dict[str, Matrix], **buffers: Any):
        self.crew, self.layer = crew, layer_jobs(crew.act, [three[name] for name in MATRICES])
        self.call, self._held = _call(**buffers)
        self._experts = np.empty((int(self.call[CHOSEN]), 4), np.int64)

    def __call__(self, wanted: Sequence[int], matrices: Sequence[dict[str, Matrix]]) -> None:
        rows = [(e, *places(m)) for e, m in zip(wanted, matrices, strict=True)]
        self._experts[: len(rows)] = rows
        self.crew.wake()
        run_call(self.crew.state, self.layer, self.call, self._experts, len(rows))


def places(matrices: dict[str, Matrix]) -> tuple[int, ...]:
    """Where gate, up and down begin."""
    kept = matrices["gate"].prepared
    if "three" not in kept:
        kept["three"] = tuple(address_of(matrices[name]) for name in MATRICES)
    return kept["three"]


def _call(
    x: np.ndarray, ids: np.ndarray, parts: np.ndarray, activation: str, weights: Any = None, scales: Any = None,
    biases: Any = None,
) -> tuple[np.ndarray, tuple[Any, ...]]:  # fmt: skip
    """A row int64 [CALL], and the arrays whose addresses it has."""
    call, factors = np.zeros(CALL, np.int64), by_matrix(scales or {})
    vectors = [(biases or {}).get(name) for name in MATRICES]
    for field, array in ((X, x), (IDS, ids), (PARTS, parts), (SHARES, weights), (SCALES, factors)):
        call[field] = address(array) if array is not None and array.size else 0
    call[WIDTH], call[CHOSEN], call[MADE] = x.shape[1], ids.shape[1], parts.shape[2]
    call[ACTIVATION], call[EXPERTS] = ACTIVATIONS[activation], factors.shape[1]
    for m, vector in enumerate(vectors):
        if vector is not None:
            call[EXPERTS] = len(vector)
            call[BIASES + 2 * m : BIASES + 2 * m + 2] = address(vector), vector.shape[1]
    return call, (x, ids, parts, weights, factors, vectors)
