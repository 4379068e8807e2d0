"""The ops of routed experts as CUDA launches, by the addresses of the slots that hold them (see ops.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_cupy.kernels.cuda import launches as to
from moe_cupy.kernels.cuda.choice import pays_tiles, product_variant
from moe_cupy.kernels.cuda.launches import Slots
from moe_cupy.kernels.cuda.ops import (
    MANY_TOKENS,
    Launches,
    LaunchesAnd,
    Workspace,
    columns,
    is_rounded,
    seen_by,
    taken,
)
from moe_cupy.kernels.matrix import Matrix

MATRICES = ("gate", "up", "down")
Extra = tuple[Mapping[str, tuple[Any, Any]], Any]  # scale [E] and bias [E, rows] by matrix; weights of inputs [T, k]


def experts(
    work: Workspace, x: Any, ids: Any, wanted: np.ndarray, gate: Sequence[Matrix], up: Sequence[Matrix],
    down: Sequence[Matrix], *, parts: Any, on_host: np.ndarray, first: bool = True, activation: str = "silu",
    weights: Any = None, scales: Any = None, biases: Any = None,
) -> Launches:  # fmt: skip
    """All wanted experts at once, by the addresses of their matrices; ``on_host`` are the ids where Python sees them.

    Where an expert has few tokens, each pair of token and rank is summed for itself and added to what the ``first``
    launch of an event left there, which is zero; where it has many, a matrix is read once for 32 of its pairs, and only
    they are written (``by_expert``). Either way it does not matter over how many launches the experts are spread.
    """
    (t, used, width), like = parts.shape, (gate[0], up[0], down[0])
    tables, slot_of = tables_of(work, (gate, up, down), on_host, wanted)
    h, extra = work.scratch("inner", t, used, gate[0].rows), extra_of(scales, biases, weights)
    if t >= MANY_TOKENS:
        tokens_of = np.bincount(on_host.ravel(), minlength=wanted.max() + 1)
        crowd = int(tokens_of[wanted].max()), on_host.size / np.count_nonzero(tokens_of)
        if pays_tiles(all(is_rounded(work, w.type) for w in like), crowd[1]):
            how = {"activation": activation, "extra": extra, "parts": parts}
            yield from by_expert(work, h, x, (tables, slot_of, ids), crowd, like, **how)
            return
    inner = gate_up if gate[0].type == up[0].type else gate_then_up
    yield from inner(work, h, x, (tables, slot_of, ids), like[:2], activation, extra)
    pairs, (factor, bias) = t * used, extra[0]["down"]
    given = yield from taken_anew(work, "rounded inner", h.reshape(pairs, -1), down[0].type)
    slots = Slots((tables[2],), slot_of.reshape(pairs, 1), ids.reshape(pairs, 1))
    rows = parts.reshape(pairs, width)
    yield to.expert_down(rows, given, slots, down[0], bias=bias, scale=factor, add=not first)


def extra_of(scales: Any, biases: Any, weights: Any) -> Extra:
    """What is done to the three products of an expert beside multiplying."""
    scales, biases = scales or {}, biases or {}
    return {name: (scales.get(name), biases.get(name)) for name in MATRICES}, weights


def by_expert(
    work: Workspace, h: Any, x: Any, where: tuple[Any, Any, Any], crowd: tuple[int, float],
    like: tuple[Matrix, Matrix, Matrix], *, activation: str, extra: Extra, parts: Any,
) -> Launches:  # fmt: skip
    """The wanted pairs of parts [T, used, D], sorted by expert, by tiles of 32; the others are left alone.

    ``crowd``: how many pairs the most wanted expert has, and how many an expert has on average, wanted now or not.
    """
    (t, used, _), (tables, slot_of, ids), (of, weights), (most, vectors) = parts.shape, where, extra, crowd
    pairs, slots = t * used, tables.shape[1]
    order, first = (work.scratch(name, n, dtype=np.int32) for name, n in (("order", pairs), ("first", slots + 1)))

    def product(name: str, out: Any, given: Any, **others: Any) -> to.Launch:
        i, (scale, bias) = MATRICES.index(name), of[name]
        variant = product_variant(*seen_by(work, given), vectors)
        return to.gemm(
            out.reshape(pairs, -1), tables[i], like[i], given, order, first, ids=ids.reshape(pairs), scale=scale,
            bias=bias, most=most, variant=variant, **others,
        )  # fmt: skip

    yield to.group_by_expert(order, first, slot_of)
    up, weight = work.scratch("inner up", *h.shape), None if weights is None else weights.reshape(pairs)
    for name, out, w in (("gate", h, like[0]), ("up", up, like[1])):
        yield product(name, out, (yield from taken(work, x, w.type)), per_row=used, weight=weight)
    yield to.activate(h, h, up, activation)
    yield product("down", parts, (yield from taken_anew(work, "rounded inner", h.reshape(pairs, -1), like[2].type)))


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
    _, used, width = parts.shape
    like, extra = resident.like, extra_of(scales, biases, weights)
    h, tables = work.scratch("inner", 1, used, like["gate"].rows), resident.tables
    inner = gate_up if like["gate"].type == like["up"].type else gate_then_up
    where = (tables["gate"], tables["up"]), slots.reshape(1, used), ids
    yield from inner(work, h, x, where, (like["gate"], like["up"]), activation, extra)
    down, (factor, bias) = Slots((tables["down"],), slots.reshape(used, 1), ids.reshape(used, 1)), extra[0]["down"]
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
    extra: Extra,
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
    extra: Extra,
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
        slots, (factor, bias) = Slots((tables[i],), *which), of[name]
        yield to.expert_down(rows, given, slots, like[i], bias=bias, scale=factor)
    yield to.activate(h, h, up, activation)
