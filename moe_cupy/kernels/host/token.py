"""Layers of one token in one call, as long as every expert that a router chooses is at hand.

A layer is steps up to its routes, the experts, and steps behind them. Where an expert is missing, or a layer is not
all steps, the call ends: who has the cache goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit

from moe_cupy.kernels.host import jobs as j
from moe_cupy.kernels.host import pieces as p
from moe_cupy.kernels.host.bound import Bound
from moe_cupy.kernels.host.bound_experts import CALL, CHOSEN, IDS, BoundExperts, run_call
from moe_cupy.kernels.host.products import Crew
from moe_cupy.kernels.host.steps import STEP, do_steps

BEGIN, ROUTED, END, EXPERTS, FIRST_KEY = range(5)  # of a layer: its steps; where its experts' call is, -1: none
LAYER = 5
TOKEN = "Tuple((i8[:, ::1], i8[:, ::1], i8[:, ::1], i8[:, :, ::1], i8[:, ::1], i4[:, ::1]))"
MISSING = 1  # added to twice the layer at which a call ends: its routes are known, but not all experts at hand


@njit
def at_hand(ids, first_key, places, experts):
    """Whether all of ids [1, k] have places [keys, 3]; then experts [k, 4] are ids and places."""
    for r in range(ids.shape[1]):
        e = ids[0, r]
        if places[first_key + e, 0] == 0:
            return False
        experts[r, 0] = e
        experts[r, 1:] = places[first_key + e]
    return True


@njit(f"i8(i8[::1], {TOKEN}, i8, i8, i8)", nogil=True, cache=True)
def run_layers(state, token, first, last, position):
    """Layers first..last-1, as far as it goes: twice the layer that is next, plus MISSING.

    ``token`` is layers [L, LAYER], steps [n, STEP], calls [L, CALL], jobs [L, 3, JOB], places [keys, 3] of gate, up and
    down (0: not at hand), and chosen [L, k], where the experts of each layer are noted.
    """
    layers, steps, calls, jobs, places, chosen = token
    experts, ended = np.empty((chosen.shape[1], 4), np.int64), 2 * last
    for index in range(first, last):
        at = layers[index]
        if at[END] == 0:
            ended = 2 * index
            break
        do_steps(state, steps[at[BEGIN] : at[ROUTED]], position)
        if at[EXPERTS] >= 0:
            call = calls[at[EXPERTS]]
            ids = carray(p.integers_at(call[IDS]), (1, call[CHOSEN]))
            if not at_hand(ids, at[FIRST_KEY], places, experts):
                ended = 2 * index + MISSING
                break
            chosen[index] = ids[0]
            run_call(state, jobs[at[EXPERTS]], call, experts, len(experts))
        do_steps(state, steps[at[ROUTED] : at[END]], position)
    j.atomic_store(state, j.MORE, 0)
    return ended


class LayerParts(NamedTuple):
    """A layer made ready: up to its routes, its experts (None: it has none), behind them."""

    before: Sequence[Bound]
    experts: BoundExperts | None
    after: Sequence[Bound]


def as_steps(part: tuple[Sequence[Any], Any, Sequence[Any]] | None) -> LayerParts | None:
    """A layer's parts; None where one of them is more than steps."""
    if part is None:
        return None
    before, experts, after = part
    native = all(isinstance(bound, Bound) and bound.rows is not None for bound in (*before, *after))
    return LayerParts(*part) if native and (experts is None or isinstance(experts, BoundExperts)) else None


class BoundToken:
    """``run_layers`` over the layers given (None: not all of it is steps). ``chosen`` is int32 [L, k]."""

    def __init__(self, crew: Crew, parts: Sequence[LayerParts | None], places: np.ndarray):
        calls = [part.experts for part in parts if part is not None and part.experts is not None]
        used = int(calls[0].call[CHOSEN]) if calls else 0
        layers, steps, self._held = _laid_out(parts, len(places) // max(1, len(parts))), _all_steps(parts), parts
        self.crew, self.chosen = crew, np.zeros((len(parts), used), np.int32)
        call_rows = np.array([one.call for one in calls], np.int64).reshape(-1, CALL)
        jobs = np.array([one.layer for one in calls], np.int64).reshape(-1, 3, j.JOB)
        self._token: Any = (layers, steps, call_rows, jobs, places, self.chosen)

    def __call__(self, first: int, last: int, position: int) -> tuple[int, bool]:
        """The first layer that is left to be done, and whether that is for want of an expert."""
        self.crew.wake()
        ended = run_layers(self.crew.state, self._token, first, last, position)
        return ended // 2, bool(ended % 2)


def _all_steps(parts: Sequence[LayerParts | None]) -> np.ndarray:
    """Of all layers one below the other."""
    return _steps_of([bound for part in parts if part is not None for bound in (*part.before, *part.after)])


def _steps_of(several: Sequence[Bound]) -> np.ndarray:
    rows = [bound.rows for bound in several if bound.rows is not None]
    return np.concatenate([np.empty((0, STEP), np.int64), *rows])


def _laid_out(parts: Sequence[LayerParts | None], experts: int) -> np.ndarray:
    """Layers [L, LAYER]: where the steps of each are, and its experts."""
    layers, at, calls = np.zeros((len(parts), LAYER), np.int64), 0, 0
    for index, (row, part) in enumerate(zip(layers, parts, strict=True)):
        if part is None:
            continue
        before, after = (len(_steps_of(several)) for several in (part.before, part.after))
        row[:] = at, at + before, at + before + after, calls if part.experts else -1, index * experts
        at, calls = at + before + after, calls + (part.experts is not None)
    return layers
