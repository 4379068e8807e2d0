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


@dataclass(frozen=True, slots=True)
class Residency:
    """A pool's integers on the device: see resolve.cu. ``state`` [6], ``slot_of`` [keys], the others [n_slots]."""

    state: Any
    slot_of: Any
    key_of: Any
    last_use: Any


def resolve(
    slots: Any, loads: tuple[Any, Any], ids: Any, residency: Residency, first_key: int, block: int = 128
) -> Launch:
    """ids [used] of one layer of one token -> slots [used] and the loads (keys [used], slots [used])."""
    r = residency
    args = (slots, *loads, r.state, ids, r.slot_of, r.key_of, r.last_use, first_key, ids.size, r.key_of.size)
    return Launch("resolve", (1, 1, 1), block, args, block // 32 * 8)


def fill(
    slot_at: Pointers, source_of: Pointers, loads: tuple[Any, Any], state: Any, n: int, blocks: int = 16,
    block: int = 256,
) -> Launch:  # fmt: skip
    """Bring the loads of ``resolve``, n bytes each, from host memory into their slots."""
    return Launch("fill", (blocks, loads[0].size, 1), block, (slot_at, source_of, *loads, state, n))
