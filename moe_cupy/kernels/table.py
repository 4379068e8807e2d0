"""The op table: every op a device can be asked to launch, with the function that says what is right.

``reference`` computes it in float64 through ``moe_ref``; ``host`` runs it on the host device; ``cuda``
names the kernel source, where there is one yet. ``moe_cupy check`` compares the columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from moe_cupy.kernels import reference
from moe_cupy.kernels.host import ops


class Op(NamedTuple):
    """One row. ``host`` is called with a row splitter and the buffers, ``reference`` with the buffers."""

    reference: Callable[..., None]
    host: Callable[..., None]
    cuda: str | None = None


OPS: dict[str, Op] = {
    "embed": Op(reference.embed, ops.embed),
    "linear": Op(reference.linear, ops.linear),
    "linear_add": Op(reference.linear_add, ops.linear_add),
    "linear_heads": Op(reference.linear_heads, ops.linear_heads),
    "norm": Op(reference.norm, ops.norm),
    "columns": Op(reference.columns, ops.columns),
    "scale": Op(reference.scale, ops.scale),
    "add": Op(reference.add, ops.add),
    "clamp": Op(reference.clamp, ops.clamp),
    "softcap": Op(reference.softcap, ops.softcap),
    "activate": Op(reference.activate, ops.activate),
    "sigmoid_gate": Op(reference.sigmoid_gate, ops.sigmoid_gate),
    "rope": Op(reference.rope, ops.rope),
    "kv_store": Op(reference.kv_store, ops.kv_store),
    "attention": Op(reference.attention, ops.attention),
    "convolve": Op(reference.convolve, ops.convolve),
    "delta_gates": Op(reference.delta_gates, ops.delta_gates),
    "delta_rule": Op(reference.delta_rule, ops.delta_rule),
    "route": Op(reference.route, ops.route),
    "experts": Op(reference.experts, ops.experts),
    "combine": Op(reference.combine, ops.combine),
}
