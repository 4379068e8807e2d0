"""The op table: every op a device can be asked to launch, with the function that says what is right.

``reference`` computes it in float64 through ``moe_ref``; ``host`` runs it on the host device; ``cuda``
says which kernels are launched for it. ``moe_cupy check`` compares the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from moe_cupy.kernels import reference
from moe_cupy.kernels.cuda import expert_ops as cuda_experts
from moe_cupy.kernels.cuda import ops as cuda
from moe_cupy.kernels.cuda.launches import Launch
from moe_cupy.kernels.host import ops


class Op(NamedTuple):
    """One row. ``reference`` is called with the buffers, ``host`` with a row splitter and the buffers.

    ``cuda`` is called with a workspace and the buffers, and makes launches. ``writes``: buffers that get results.
    """

    reference: Callable[..., None]
    host: Callable[..., None]
    cuda: Callable[..., Iterator[Launch]]
    writes: tuple[str, ...] = ("out",)


OPS: dict[str, Op] = {
    "embed": Op(reference.embed, ops.embed, cuda.embed),
    "linear": Op(reference.linear, ops.linear, cuda.linear),
    "linear_add": Op(reference.linear_add, ops.linear_add, cuda.linear_add),
    "linear_heads": Op(reference.linear_heads, ops.linear_heads, cuda.linear_heads),
    "norm": Op(reference.norm, ops.norm, cuda.norm),
    "columns": Op(reference.columns, ops.columns, cuda.columns),
    "scale": Op(reference.scale, ops.scale, cuda.scale, ("x",)),
    "add": Op(reference.add, ops.add, cuda.add),
    "clamp": Op(reference.clamp, ops.clamp, cuda.clamp, ("x",)),
    "softcap": Op(reference.softcap, ops.softcap, cuda.softcap, ("x",)),
    "activate": Op(reference.activate, ops.activate, cuda.activate, ("gate",)),
    "sigmoid_gate": Op(reference.sigmoid_gate, ops.sigmoid_gate, cuda.sigmoid_gate, ("x",)),
    "rope": Op(reference.rope, ops.rope, cuda.rope, ("x",)),
    "hadamard": Op(reference.hadamard, ops.hadamard, cuda.hadamard, ("x",)),
    "kv_store": Op(reference.kv_store, ops.kv_store, cuda.kv_store, ("cache",)),
    "attention": Op(reference.attention, ops.attention, cuda.attention),
    "convolve": Op(reference.convolve, ops.convolve, cuda.convolve, ("out", "after")),
    "delta_gates": Op(reference.delta_gates, ops.delta_gates, cuda.delta_gates, ("fade", "share")),
    "delta_rule": Op(reference.delta_rule, ops.delta_rule, cuda.delta_rule, ("out", "after")),
    "route": Op(reference.route, ops.route, cuda.route, ("ids", "weights")),
    "experts": Op(reference.experts, ops.experts, cuda_experts.experts, ("parts",)),
    "top_k": Op(reference.top_k, ops.top_k, cuda.top_k, ("values", "ids")),
    "combine": Op(reference.combine, ops.combine, cuda.combine),
}
