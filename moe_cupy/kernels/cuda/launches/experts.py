"""Routers, experts in slots, and the pool that is kept on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_cupy.kernels.cuda.launches.core import (
    ACTIVATIONS,
    BEST_BYTES,
    GATINGS,
    Launch,
    Pointers,
    is_q8,
    warp_each,
)  # fmt: skip
from moe_cupy.kernels.matrix import Matrix


def router(
    ids: Any, weights: Any, logits: Any, bias: Any = None, *, gating: str = "softmax", select_logits: bool = False,
    groups: int = 1, groups_used: int = 1, renormalise: bool = True, scale: float = 1.0, block: int = 32,
) -> Launch:  # fmt: skip
    """logits [T, E] -> ids, weights [T, used]."""
    experts, used = logits.shape[-1], ids.shape[-1]
    args = (
        ids, weights, logits, bias, experts, used, groups, groups_used, GATINGS[gating], int(select_logits),
        int(renormalise), scale,
    )  # fmt: skip
    shared = 4 * (2 * experts + groups) + block // 32 * BEST_BYTES
    return Launch("router", (len(logits), 1, 1), block, args, shared)


CANDIDATE_BYTES, ECHO_BYTES = 24, 64  # of shared memory: for each warp; of resolve_echo, besides 4 for each


@dataclass(frozen=True, slots=True)
class Slots:
    """Where experts lie: addresses of their matrices by slot, and which slot [T, used] holds which expert [T, used]."""

    matrices: tuple[Pointers, ...]
    slot_of: Any
    ids: Any


def expert_gate_up(
    h: Any, x: Any, slots: Slots, like: Matrix, activation: str = "silu", *, biases: tuple[Any, Any] = (None, None),
    scales: tuple[Any, Any] = (None, None), input_weights: Any = None, block: int = 128,
) -> Launch:  # fmt: skip
    """h [T, used, F] = act(gate x, up x); x [T, D] or Q8 blocks; ``like`` gives type and shape [F, D]."""
    n_tokens, used = slots.slot_of.shape
    args = (
        h, x, *slots.matrices, slots.slot_of, slots.ids, *biases, *scales, input_weights, like.rows, like.cols,
        ACTIVATIONS[activation],
    )  # fmt: skip
    name = f"expert_gate_up{'_q8' if is_q8(x) else ''}_{like.type}"
    return warp_each(name, like.rows, used, n_tokens, block, args)


def expert_down(
    out: Any, h: Any, slots: Slots, like: Matrix, weights: Any = None, *, bias: Any = None, scale: Any = None,
    add: bool = False, block: int = 128,
) -> Launch:  # fmt: skip
    """out [T, D] (+)= weighted sum of down h; h [T, used, F] or Q8 blocks; ``like`` gives type and shape [D, F]."""
    n_tokens, used = slots.slot_of.shape
    args = (
        out, h, *slots.matrices, slots.slot_of, slots.ids, weights, bias, scale, like.rows, like.cols, used, int(add),
    )  # fmt: skip
    name = f"expert_down{'_q8' if is_q8(h) else ''}_{like.type}"
    return warp_each(name, like.rows, n_tokens, 1, block, args)


STATE = ("now", "token", "layer", "event", "hits", "misses", "evictions", "no_room", "prefetched", "wasted")
BY_KEY = ("slot", "uses", "last", "turn", "unused")


@dataclass(frozen=True, slots=True)
class Residency:
    """A pool's integers on the device: see resolve.cu. ``rule`` is the number of one of ``cache.tabled.RULES``.

    ``echo`` is there where that policy decides: the record, rows, "used" and "users" of moe_cupy/compiled/state.py.
    Then ``powers`` and ``rule`` say nothing.
    """

    state: Any  # int64 [STATE]
    by_key: Any  # int64 [keys, BY_KEY]
    key_of: Any  # int32 [n_slots]
    powers: Any  # int64 [HALF_LIFE]
    rule: int
    echo: tuple[Any, ...] | None = None


@dataclass(frozen=True, slots=True)
class Halt:
    """What lets a device stop where an expert is not in memory: see resolve.cu."""

    source_of: Any  # uint64 [keys], 0: not in memory
    halt: Any  # int32 [1 + used]
    log: Any  # int32 [1 + loads of a token]


NO_HALT = Halt(None, None, None)


def resolve(
    slots: Any, loads: Any, ids: Any, residency: Residency, layer: int, experts: int, *, ahead: Any = None,
    halt: Halt = NO_HALT, block: int = 128,
) -> Launch:  # fmt: skip
    """ids [used] of one layer of one token -> slots [used] and loads [1 + 3 used]; ``ahead`` are loads on their way."""
    r, h = residency, halt
    event = (ids, ahead, h.source_of, h.halt, h.log, layer, experts, ids.size, r.key_of.size)
    if r.echo is not None:
        shared = ECHO_BYTES + block // 32 * 4
        known = (slots, loads, *r.echo, r.state, r.by_key, r.key_of)
        return Launch("resolve_echo", (1, 1, 1), block, (*known, *event), shared)
    args = (slots, loads, r.state, r.by_key, r.key_of, r.powers, *event, r.rule)
    return Launch("resolve", (1, 1, 1), block, args, block // 32 * CANDIDATE_BYTES)


def resolve_ahead(
    loads: Any, ids: Any, residency: Residency, first_key: int, most: int, *, apart: bool = False, halt: Halt = NO_HALT,
    block: int = 128,
) -> Launch:  # fmt: skip
    """The first ``most`` of ids [used], which a layer is expected to use -> loads [1 + 3 used]."""
    r, h = residency, halt
    tables = (r.state, r.by_key, r.key_of)
    event = (ids, h.source_of, h.halt, h.log, first_key, ids.size, most, int(apart), r.key_of.size)
    if r.echo is not None:
        shared = ECHO_BYTES + block // 32 * 4
        return Launch("resolve_echo_ahead", (1, 1, 1), block, (loads, *r.echo, *tables, *event), shared)
    return Launch("resolve_ahead", (1, 1, 1), block, (loads, *tables, *event, r.rule), block // 32 * CANDIDATE_BYTES)


def fill(
    slot_at: Pointers, source_of: Pointers, loads: Any, n: int, late: bool = False, blocks: int = 16, block: int = 256
) -> Launch:
    """Bring ``loads`` [1 + 3 used], n bytes each, from host memory into their slots; those that wait, or the others."""
    used = loads.size // 3
    return Launch("fill", (blocks, used, 1), block, (slot_at, source_of, loads, used, int(late), n))
