"""Routed experts on rounded vectors: all that are at hand in two lists of jobs, gates and ups, then downs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numba import njit

from moe_cupy.kernels.host import jobs as j
from moe_cupy.kernels.host.layer import ACTIVATIONS
from moe_cupy.kernels.host.pieces import list_rounding
from moe_cupy.kernels.host.products import Crew, address_of, give, template
from moe_cupy.kernels.host.rounding import new_panel
from moe_cupy.kernels.matrix import Matrix

MATRICES = ("gate", "up", "down")
NO_VECTORS, NO_SCALES = np.empty((0, 0), np.float32), np.empty((3, 0), np.float32)
Routes = tuple[np.ndarray, np.ndarray, Sequence[Sequence[Matrix]]]  # ids [T, k], wanted [n], gate, up, down of each
Adjusted = tuple[str, np.ndarray | None, Mapping[str, np.ndarray], Mapping[str, np.ndarray]]


@njit
def find_pairs(ids, experts, starts, tokens, ranks):
    """The (token, rank) pairs that chose each of ``experts`` [n, .]; starts [n + 1] says which pairs are whose."""
    found = 0
    for i in range(len(experts)):
        starts[i] = found
        for t in range(ids.shape[0]):
            for r in range(ids.shape[1]):
                if ids[t, r] == experts[i, 0]:
                    tokens[found], ranks[found] = t, r
                    found += 1
    starts[len(experts)] = found
    return found


@njit
def adjust(y, scales, biases, e):
    """y = scales[e] * y + biases[e] of expert e, where there are any."""
    if scales.size:
        for i in range(y.size):
            y[i] *= scales[e]
    if len(biases):
        for i in range(y.size):
            y[i] += biases[e, i]


@njit
def weigh(x, weights, tokens, ranks):
    """Rows of x [T, D] by pair, times their weights [T, k]."""
    given = np.empty((tokens.size, x.shape[1]), np.float32)
    for p in range(tokens.size):
        for i in range(x.shape[1]):
            given[p, i] = x[tokens[p], i] * weights[tokens[p], ranks[p]]
    return given


@njit
def inner(state, layer, given, rows, experts, starts, middle):
    """middle[0] = gate x, middle[1] = up x for each pair; ``given``[rows] is x of a pair."""
    count, shared = len(experts), len(given) == 1  # one vector serves all, and is rounded once
    jobs, results = np.empty((2 * count, j.JOB), np.int64), np.empty((2, rows.size), np.int64)
    apart, vectors = (1 if shared else count), (1 if shared else rows.size)
    differ = layer[0, j.ROUNDING] != layer[1, j.ROUNDING]
    first = new_panel(layer[0, j.ROUNDING], vectors, layer[0, j.COLS])
    second = new_panel(layer[1, j.ROUNDING], vectors, layer[1, j.COLS]) if differ else first
    for m in range(2):
        for p in range(rows.size):
            results[m, p] = middle[m, p].ctypes.data
        for i in range(count):
            job = jobs[m * count + i]
            job[:] = layer[m]
            job[j.W] = experts[i, 1 + m]
            panel, at = (second if m else first), (0 if shared else starts[i])
            give(job, panel, at, results[m, starts[i] :].ctypes.data, starts[i + 1] - starts[i])
        if m == 0 or differ:
            rounds = jobs[m * count : m * count + apart].copy()
            list_rounding(state, rounds, given, rows)
            j.run(state, rounds, (given, rows, first, second))
    j.run(state, jobs, (first, second, results))


@njit
def outer(state, layer, activation, middle, experts, starts, results):
    """The product of act(middle[0], middle[1]) [pairs, F] with each pair's down matrix, to addresses ``results``."""
    jobs, order = np.empty((len(experts), j.JOB), np.int64), np.arange(results.size)
    panel = new_panel(layer[2, j.ROUNDING], results.size, layer[2, j.COLS])
    for i in range(len(experts)):
        jobs[i] = layer[2]
        jobs[i, j.W] = experts[i, 3]
        give(jobs[i], panel, starts[i], results[starts[i] :].ctypes.data, starts[i + 1] - starts[i])
    rounds = jobs.copy()
    list_rounding(state, rounds, middle[0], order)
    rounds[:, j.FUNCTION], rounds[:, j.UP] = state[j.ACTIVATE], middle[1].ctypes.data
    rounds[:, j.ACTIVATION] = activation
    j.run(state, rounds, (order, panel))
    j.atomic_store(state, j.MORE, 0)
    j.run(state, jobs, panel)


@njit(
    "void(i8[::1], i8[:, ::1], f4[:, ::1], Tuple((i4[:, ::1], i8[:, ::1])),"
    "Tuple((i8, f4[:, ::1], f4[:, ::1], UniTuple(f4[:, ::1], 3))), f4[:, :, ::1])",
    nogil=True,
    cache=True,
)
def experts_rows(state, layer, x, routes, adjusted, parts):
    """parts[t, r] = expert ids[t, r] of x[t], for those that are listed.

    ``layer`` is the jobs [3, JOB] of gate, up and down but for addresses, ``routes`` is ids [T, k] and experts [n, 4]:
    id and addresses of the three; ``adjusted`` is the activation, weights [T, k] of the input, scales [3, E] and biases
    [E, rows] of the three, any of them empty.
    """
    (ids, experts), (activation, weights, scales, biases) = routes, adjusted
    starts = np.empty(len(experts) + 1, np.int64)
    tokens, ranks = np.empty(ids.size, np.int64), np.empty(ids.size, np.int64)
    pairs = find_pairs(ids, experts, starts, tokens, ranks)
    tokens, ranks, rows = tokens[:pairs], ranks[:pairs], tokens[:pairs]
    if pairs == 0:
        j.atomic_store(state, j.MORE, 0)
        return
    if len(weights):
        x, rows = weigh(x, weights, tokens, ranks), np.arange(pairs)
    middle = np.empty((2, pairs, layer[0, j.ROWS]), np.float32)
    inner(state, layer, x, rows, experts, starts, middle)
    results = np.empty(pairs, np.int64)
    for i in range(len(experts)):
        for p in range(starts[i], starts[i + 1]):
            for m in range(2):
                adjust(middle[m, p], scales[m], biases[m], experts[i, 0])
            results[p] = parts[tokens[p], ranks[p]].ctypes.data
    outer(state, layer, activation, middle, experts, starts, results)
    for i in range(len(experts)):
        for p in range(starts[i], starts[i + 1]):
            adjust(parts[tokens[p], ranks[p]], scales[2], biases[2], experts[i, 0])


def layer_jobs(act: str, three: Sequence[Matrix]) -> np.ndarray:
    """Jobs [3, JOB] of an expert's matrices, but for addresses; kept with the first."""
    kept, key = three[0].prepared, f"layer {act}"
    if key not in kept:
        kept[key] = np.stack([template(w.type, w.rows, w.cols, act) for w in three])
    return kept[key]


def by_matrix(scales: Mapping[str, np.ndarray]) -> np.ndarray:
    """Scales [3, E] of gate, up and down, 1 where one has none; [3, 0] where none has any."""
    if not scales:
        return NO_SCALES
    ones = np.ones_like(next(iter(scales.values())))
    return np.stack([scales.get(name, ones) for name in MATRICES])


def run_experts(crew: Crew, x: np.ndarray, routes: Routes, adjusted: Adjusted, parts: np.ndarray) -> None:
    """The op ``experts`` for matrices that ``products.takes``."""
    (ids, wanted, three), (activation, weights, scales, biases) = routes, adjusted
    layer = layer_jobs(crew.act, [several[0] for several in three])
    each = zip(wanted.tolist(), *three, strict=True)
    experts = np.array([(e, address_of(g), address_of(u), address_of(d)) for e, g, u, d in each])
    vectors = tuple(biases.get(name, NO_VECTORS) for name in MATRICES) if biases else (NO_VECTORS,) * 3
    given = ACTIVATIONS[activation], NO_VECTORS if weights is None else weights, by_matrix(scales), vectors
    crew.wake()
    experts_rows(crew.state, layer, x, (ids, experts), given, parts)
