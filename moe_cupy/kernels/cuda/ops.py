"""The ops of the kernel table as CUDA launches: each takes a workspace and the op's buffers, in device memory.

What an op needs beside its buffers it takes from the workspace: memory that is its own until the launches have
run, small arrays from the host, and the numbers 0, 1, 2 … as positions and rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from moe_cupy.kernels.cuda import launches as to
from moe_cupy.kernels.cuda.launches import CacheRows, Launch, Pointers, Sight, Slots, ceil_div
from moe_cupy.kernels.matrix import Matrix

Launches = Iterator[Launch]
MAX_GRID = 65535  # blocks along y and z
MANY_TOKENS = 8  # from here on a matrix is read once for several of them
PREFILL_QUERIES = 8  # from here on several queries share the rows of the cache
SPLIT_ROWS = 256  # rows of the cache that one block of decode attention takes at least
MAX_SPLITS = 32


class Workspace(Protocol):
    """What ops may use of a device; everything happens in the order of one stream."""

    def scratch(self, name: str, *shape: int, dtype: Any = np.float32) -> Any:
        """Device memory under this name and shape; holds what was last written."""

    def put(self, name: str, values: np.ndarray) -> Any:
        """``values``, which may change at once, in device memory under this name and shape."""

    def numbers(self, first: int, count: int) -> Any:
        """int32 [count] in device memory: first, first + 1, …"""

    def positions(self, first: int, count: int) -> Any:
        """int32 [count] in device memory: the positions first, first + 1, … of the tokens of this pass."""

    def horizon(self, seen: int, capacity: int) -> int:
        """For how many positions attention is launched, which sees ``seen`` of ``capacity``."""

    def constant(self, name: str, values: np.ndarray) -> Any:
        """``values``, always the same under this name and shape, in device memory."""

    def addresses(self, arrays: Sequence[Any]) -> np.ndarray:
        """uint64 [n]: where arrays begin in device memory."""


# Matrices


def embed(work: Workspace, table: Matrix, ids: Any, out: Any) -> Launches:
    yield to.embed(out, table, ids)


def linear(
    work: Workspace, x: Any, w: Matrix, out: Any, scale: float = 1.0, bias: Any = None, add: bool = False
) -> Launches:
    """A tile of rows and tokens at a time where tokens are many, else a row."""
    if len(x) < MANY_TOKENS or scale != 1.0:
        yield to.gemv(out, w, x, bias, scale=scale, add=add)
        return
    launch = to.gemm(out, Pointers([w.data]), w, x, bias=bias, add=add)
    where = work.put("matrix", work.addresses([w.data]))
    yield replace(launch, args=(launch.args[0], where, *launch.args[2:]))


def linear_add(work: Workspace, x: Any, w: Matrix, out: Any, scale: float = 1.0, bias: Any = None) -> Launches:
    yield from linear(work, x, w, out, scale, bias, add=True)


def linear_heads(work: Workspace, x: Any, w: Matrix, out: Any, scale: Any = 1.0, bias: Any = None) -> Launches:
    one_for_all = np.isscalar(scale)
    yield to.gemv(
        out, w, x, bias, heads=x.shape[1], scales=None if one_for_all else scale, scale=scale if one_for_all else 1.0
    )


# Rows and elements


def norm(
    work: Workspace, x: Any, weight: Any, epsilon: float, out: Any, bias: Any = None, centred: bool = False
) -> Launches:
    width = x.shape[-1] if weight is None else weight.size
    yield to.rms_norm(out, x, weight, epsilon, bias=bias, kind="layer" if centred else "rms", width=width)


def columns(work: Workspace, x: Any, first: int, out: Any, at: int, count: int) -> Launches:
    (n, width), flat = x.shape, x.reshape(-1)
    for row in range(0, n, MAX_GRID):
        some = min(MAX_GRID, n - row)
        args = (out, flat[first + row * width :], work.numbers(row, some), count, width, out.shape[1], at, 0)
        yield Launch("kv_store", (ceil_div(count, 128), some, 1), 128, args)


def copied(work: Workspace, out: Any, x: Any) -> Launches:
    """out = x, all of it."""
    yield from columns(work, x.reshape(1, -1), 0, out.reshape(1, -1), 0, x.size)


def scale(work: Workspace, x: Any, factor: float) -> Launches:
    yield to.multiply(x, scale=factor)


def add(work: Workspace, x: Any, factor: float, out: Any) -> Launches:
    yield to.add_scaled(out, x, factor)


def clamp(work: Workspace, x: Any, limit: float) -> Launches:
    yield to.clamp(x, limit)


def softcap(work: Workspace, x: Any, limit: float) -> Launches:
    yield to.softcap(x, limit)


def activate(work: Workspace, gate: Any, up: Any, kind: str) -> Launches:
    yield to.activate(gate, gate, up, kind)


def sigmoid_gate(work: Workspace, x: Any, gate: Any) -> Launches:
    yield to.multiply(x, gate, is_gate=True)


# Attention


def rope(work: Workspace, x: Any, cos: Any, sin: Any, style: str, first: int = 0) -> Launches:
    yield to.rope(x, cos, sin, style, offset=first)


def kv_store(work: Workspace, cache: Any, new: Any, position: int) -> Launches:
    yield to.kv_store(cache, new, work.positions(position, len(new)))


def attention(
    work: Workspace, q: Any, k: Any, v: Any, n_past: int, scale: float, out: Any, *, window: int = 0,
    chunked: bool = False, sinks: Any = None, temperature: Any = None,
) -> Launches:  # fmt: skip
    (t, heads, _), v_width = q.shape, out.shape[-1]
    if temperature is not None:
        cooled = work.scratch("cooled", *q.shape)
        yield from copied(work, cooled, q)
        yield to.multiply(cooled, temperature)
        q = cooled
    rows, positions = CacheRows(k, v, k.shape[1]), work.positions(n_past, t)
    sight = Sight(scale, 0 if chunked else window, window if chunked else 0, sinks=sinks)
    if t >= PREFILL_QUERIES:
        yield to.attention_prefill(out, q, rows, positions, sight)
        return
    partial = work.scratch("partial", t, heads, splits(work.horizon(n_past + t, len(k))), v_width + 2)
    yield to.attention_decode(partial, q, rows, positions, sight)
    yield to.attention_combine(out, partial, sinks)


def splits(seen: int) -> int:
    """Into how many parts decode attention over ``seen`` positions is divided."""
    return min(MAX_SPLITS, ceil_div(seen, SPLIT_ROWS))


# Recurrence


def convolve(work: Workspace, x: Any, before: Any, kernel: Any, after: Any, out: Any) -> Launches:
    yield to.delta_convolve(out, x, (before, after), kernel)


def delta_gates(work: Workspace, alpha: Any, beta: Any, dt: Any, a: Any, fade: Any, share: Any) -> Launches:
    yield from copied(work, fade, alpha)
    yield from copied(work, share, beta)
    yield to.delta_gates(fade, share, dt, a)


def delta_rule(
    work: Workspace, qkv: Any, fade: Any, share: Any, key_heads: int, epsilon: float, out: Any, *, tiled: bool,
    before: Any, after: Any,
) -> Launches:  # fmt: skip
    yield to.delta_recur(out, qkv, (fade, share), (before, after), key_heads, epsilon=epsilon, tiled=tiled)


# Experts


def route(
    work: Workspace, logits: Any, scale: float, renormalise: bool, ids: Any, weights: Any, *, gating: str = "softmax",
    by_logit: bool = False, bias: Any = None, groups: int = 1, groups_used: int = 1,
) -> Launches:  # fmt: skip
    yield to.router(
        ids, weights, logits, bias, gating=gating, select_logits=by_logit, groups=groups, groups_used=groups_used,
        renormalise=renormalise, scale=scale,
    )  # fmt: skip


def experts(
    work: Workspace, x: Any, ids: Any, wanted: np.ndarray, gate: Sequence[Matrix], up: Sequence[Matrix],
    down: Sequence[Matrix], *, parts: Any, on_host: np.ndarray, first: bool = True, activation: str = "silu",
    weights: Any = None, scales: Any = None, biases: Any = None,
) -> Launches:  # fmt: skip
    """All wanted experts at once, by the addresses of their matrices; ``on_host`` are the ids where Python sees them.

    Each pair of token and rank is summed for itself and added to what the ``first`` launch of an event left there,
    which is zero: so it does not matter over how many launches the experts are spread.
    """
    (t, used, width), scales, biases = parts.shape, scales or {}, biases or {}
    tables, slot_of = tables_of(work, (gate, up, down), on_host, wanted)
    h = work.scratch("inner", t, used, gate[0].rows)
    extra = {n: (scales.get(n), biases.get(n)) for n in ("gate", "up", "down")}
    inner = gate_up if gate[0].type == up[0].type else gate_then_up
    yield from inner(work, h, x, (tables, slot_of, ids), (gate[0], up[0]), activation, (extra, weights))
    pairs, rows = t * used, parts.reshape(t * used, width)
    for at in range(0, pairs, MAX_GRID):
        some, which = slice(at, at + MAX_GRID), (a.reshape(pairs, 1)[at : at + MAX_GRID] for a in (slot_of, ids))
        slots, (factor, bias) = Slots((tables[2],), *which), extra["down"]
        inner_rows = h.reshape(pairs, -1)[some]
        yield to.expert_down(rows[some], inner_rows, slots, down[0], bias=bias, scale=factor, add=not first)


@dataclass(frozen=True, slots=True)
class Resident:
    """Experts of one size class under a cache on the device: see resolve.cu and fill.cu."""

    lru: to.Residency
    slot_at: Any  # uint64 [slots]: where slots begin
    source_of: Any  # uint64 [keys]: where experts lie in host memory
    tables: Mapping[str, Any]  # uint64 [slots] of "gate", "up", "down": where the matrices begin
    like: Mapping[str, Matrix]  # their types and shapes
    slab_bytes: int


def resident_experts(
    work: Workspace, x: Any, ids: Any, resident: Resident, first_key: int, *, parts: Any, activation: str = "silu",
    weights: Any = None, scales: Any = None, biases: Any = None,
) -> Launches:  # fmt: skip
    """The experts ids [1, k] of one token into parts [1, k, D], brought into slots where they are not there."""
    (_, used, width), scales, biases = parts.shape, scales or {}, biases or {}
    slots, loads = work.scratch("slots", used, dtype=np.int32), work.scratch("loads", 2, used, dtype=np.int32)
    yield to.resolve(slots, (loads[0], loads[1]), ids, resident.lru, first_key)
    yield to.fill(resident.slot_at, resident.source_of, (loads[0], loads[1]), resident.lru.state, resident.slab_bytes)
    like, extra = resident.like, {n: (scales.get(n), biases.get(n)) for n in ("gate", "up", "down")}
    h, tables = work.scratch("inner", 1, used, like["gate"].rows), resident.tables
    inner = gate_up if like["gate"].type == like["up"].type else gate_then_up
    where = (tables["gate"], tables["up"]), slots.reshape(1, used), ids
    yield from inner(work, h, x, where, (like["gate"], like["up"]), activation, (extra, weights))
    down, (factor, bias) = Slots((tables["down"],), slots.reshape(used, 1), ids.reshape(used, 1)), extra["down"]
    yield to.expert_down(parts.reshape(used, width), h.reshape(used, -1), down, like["down"], bias=bias, scale=factor)


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
    yield to.expert_gate_up(
        h, x, Slots((tables[0], tables[1]), slot_of, ids), like[0], activation, biases=(gate_bias, up_bias),
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
        rows, given = out.reshape(t * used, -1), each.reshape(t * used, -1)
        for at in range(0, t * used, MAX_GRID):
            some = slice(at, at + MAX_GRID)
            slots, (factor, bias) = Slots((tables[i],), *(a[some] for a in which)), of[name]
            yield to.expert_down(rows[some], given[some], slots, like[i], bias=bias, scale=factor)
    yield to.activate(h, h, up, activation)


def combine(work: Workspace, parts: Any, weights: Any, out: Any, add: bool = True) -> Launches:
    if weights is None:
        weights = work.constant("ones", np.ones(parts.shape[:2], np.float32))
    yield to.combine(out, parts, weights, add)
