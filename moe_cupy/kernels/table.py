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
    "rms_norm": Op(reference.rms_norm, ops.rms_norm),
    "linear": Op(reference.linear, ops.linear),
    "linear_add": Op(reference.linear_add, ops.linear_add),
    "rope": Op(reference.rope, ops.rope),
    "kv_store": Op(reference.kv_store, ops.kv_store),
    "attention": Op(reference.attention, ops.attention),
    "route": Op(reference.route, ops.route),
    "ffn_add": Op(reference.ffn_add, ops.ffn_add),
    "expert": Op(reference.expert, ops.expert),
    "combine": Op(reference.combine, ops.combine),
}
