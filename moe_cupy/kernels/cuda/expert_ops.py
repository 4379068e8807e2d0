"""The ops of routed experts as CUDA launches, by the addresses of the slots that hold them (see ops.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_cupy.kernels.cuda import launches as to
from moe_cupy.kernels.cuda.launches import Slots
from moe_cupy.kernels.cuda.ops import (
    MANY_TOKENS,
    MAX_GRID,
    Launches,
    LaunchesAnd,
    Workspace,
    columns,
    is_rounded,
    taken,
)
from moe_cupy.kernels.matrix import Matrix


def experts(
    work: Workspace, x: Any, ids: Any, wanted: np.ndarray, gate: Sequence[Matrix], up: Sequence[Matrix],
    down: Sequence[Matrix], *, parts: Any, on_host: np.ndarray, first: bool = True, activation: str = "silu",
    weights: Any = None, scales: Any = None, biases: Any = None,
) -> Launches:  # fmt: skip
    """All wanted experts at once, by the addresses of their matrices; ``on_host`` are the ids where Python sees them.

    Each pair of token and rank is summed for itself and added to what the ``first`` launch of an event left there,
    which is zero: so it does not matter over how many launches the experts are spread. Where many tokens are rounded
    and nothing is scaled or biased, a matrix is read once for 32 of them instead (``by_expert``).
    """
    (t, used, width), scales, biases = parts.shape, scales or {}, biases or {}
    tables, slot_of = tables_of(work, (gate, up, down), on_host, wanted)
    h = work.scratch("inner", t, used, gate[0].rows)
    extra = {n: (scales.get(n), biases.get(n)) for n in ("gate", "up", "down")}
    like, is_plain = (gate[0], up[0], down[0]), not scales and not biases and weights is None
    if t >= MANY_TOKENS and is_plain and all(is_rounded(work, w.type) for w in like):
        most = int(np.bincount(on_host.ravel(), minlength=wanted.max() + 1)[wanted].max())
        yield from by_expert(work, h, x, (tables, slot_of, most), like, activation, parts)
        return
    inner = gate_up if gate[0].type == up[0].type else gate_then_up
    yield from inner(work, h, x, (tables, slot_of, ids), like[:2], activation, (extra, weights))
    pairs, rows, (factor, bias) = t * used, parts.reshape(t * used, width), extra["down"]
    given = yield from taken_anew(work, "rounded inner", h.reshape(pairs, -1), down[0].type)
    for at in range(0, pairs, MAX_GRID):
        some, which = slice(at, at + MAX_GRID), (a.reshape(pairs, 1)[at : at + MAX_GRID] for a in (slot_of, ids))
        slots = Slots((tables[2],), *which)
        yield to.expert_down(rows[some], given[some], slots, down[0], bias=bias, scale=factor, add=not first)


def by_expert(
    work: Workspace, h: Any, x: Any, where: tuple[Any, Any, int], like: tuple[Matrix, Matrix, Matrix], activation: str,
    parts: Any,
) -> Launches:  # fmt: skip
    """The wanted pairs of parts [T, used, D], sorted by expert, by tiles of 32; the others are left alone."""
    (t, used, width), (tables, slot_of, most) = parts.shape, where
    pairs, slots = t * used, tables.shape[1]
    order, first = (work.scratch(name, n, dtype=np.int32) for name, n in (("order", pairs), ("first", slots + 1)))
    yield to.group_by_expert(order, first, slot_of)
    up = work.scratch("inner up", *h.shape)
    for out, table, w in ((h, tables[0], like[0]), (up, tables[1], like[1])):
        given = yield from taken(work, x, w.type)
        yield to.gemm(out.reshape(pairs, -1), table, w, given, order, first, per_row=used, most=most)
    yield to.activate(h, h, up, activation)
    inner = yield from taken_anew(work, "rounded inner", h.reshape(pairs, -1), like[2].type)
    yield to.gemm(parts.reshape(pairs, width), tables[2], like[2], inner, order, first, most=most)


@dataclass(frozen=True, slots=True)
class Resident:
    """Experts of one size class in slots that the device knows by number."""

    tables: Mapping[str, Any]  # uint64 [slots] of "gate", "up", "down": where the matrices begin
    like: Mapping[str, Matrix]  # their types and shapes


def resident_experts(
    work: Workspace, x: Any, ids: Any, slots: Any, resident: Resident, *, parts: Any, activation: str = "silu",
    weights: Any = None, scales: Any = None, biases: Any = None,
) -> Launches:  # fmt: skip
    """The experts ids [1, k] of one token, which are in ``slots`` [k], into parts [1, k, D]; zero where that is -1."""
    (_, used, width), scales, biases = parts.shape, scales or {}, biases or {}
    like, extra = resident.like, {n: (scales.get(n), biases.get(n)) for n in ("gate", "up", "down")}
    h, tables = work.scratch("inner", 1, used, like["gate"].rows), resident.tables
    inner = gate_up if like["gate"].type == like["up"].type else gate_then_up
    where = (tables["gate"], tables["up"]), slots.reshape(1, used), ids
    yield from inner(work, h, x, where, (like["gate"], like["up"]), activation, (extra, weights))
    down, (factor, bias) = Slots((tables["down"],), slots.reshape(used, 1), ids.reshape(used, 1)), extra["down"]
    given = yield from taken_anew(work, "rounded inner", h.reshape(used, -1), like["down"].type)
    yield to.expert_down(parts.reshape(used, width), given, down, like["down"], bias=bias, scale=factor)


def taken_anew(work: Workspace, name: str, x: Any, kind: str) -> LaunchesAnd:
    """x [n, cols], which was written inside this op, as a matrix of type ``kind`` takes it."""
    if not is_rounded(work, kind):
        return x
    blocks = work.scratch(name, len(x), x.shape[1] // 32, 40, dtype=np.uint8)
    yield to.quantize_q8(blocks, x)
    return blocks


def tables_of(
    work: Workspace, three: Sequence[Sequence[Matrix]], ids: np.ndarray, wanted: np.ndarray
) -> tuple[Any, Any]:
    """Addresses uint64 [3, n] of gate, up and down, and slot_of int32 [T, used]: an index into them, or -1."""
    slot_of = np.full(ids.shape, -1, np.int32)
    for slot, expert in enumerate(wanted):
        slot_of[ids == expert] = slot
    addresses = np.stack([work.addresses([w.data for w in matrices]) for matrices in three])
    return work.put("addresses", addresses), work.put("slot_of", slot_of)


def gate_up(
    work: Workspace, h: Any, x: Any, where: tuple[Any, Any, Any], like: tuple[Matrix, Matrix], activation: str,
    extra: Any,
) -> Launches:  # fmt: skip
    """h [T, used, F] = act(gate x, up x) in one launch."""
    (tables, slot_of, ids), (of, weights) = where, extra
    (gate_scale, gate_bias), (up_scale, up_bias) = of["gate"], of["up"]
    given = yield from taken(work, x, like[0].type)
    yield to.expert_gate_up(
        h, given, Slots((tables[0], tables[1]), slot_of, ids), like[0], activation, biases=(gate_bias, up_bias),
        scales=(gate_scale, up_scale), input_weights=weights,
    )  # fmt: skip


def gate_then_up(
    work: Workspace, h: Any, x: Any, where: tuple[Any, Any, Any], like: tuple[Matrix, Matrix], activation: str,
    extra: Any,
) -> Launches:  # fmt: skip
    """The same where gate and up are of different types: one after the other, with x repeated for each rank."""
    (tables, slot_of, ids), (of, weights) = where, extra
    (t, used), width = slot_of.shape, x.shape[1]
    each, up = work.scratch("each", t, used, width), work.scratch("inner up", *h.shape)
    for rank in range(used):
        yield from columns(work, x, 0, each.reshape(t, -1), rank * width, width)
    if weights is not None:
        yield to.multiply(each, weights)
    which = slot_of.reshape(-1, 1), ids.reshape(-1, 1)
    for i, (out, name) in enumerate(((h, "gate"), (up, "up"))):
        rows = out.reshape(t * used, -1)
        given = yield from taken_anew(work, "rounded each", each.reshape(t * used, -1), like[i].type)
        for at in range(0, t * used, MAX_GRID):
            some = slice(at, at + MAX_GRID)
            slots, (factor, bias) = Slots((tables[i],), *(a[some] for a in which)), of[name]
            yield to.expert_down(rows[some], given[some], slots, like[i], bias=bias, scale=factor)
    yield to.activate(h, h, up, activation)
