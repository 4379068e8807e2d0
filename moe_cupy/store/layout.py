"""Where expert bytes lie in a GGUF, and how one expert's segments are gathered into one slab.

One expert is three matrices, so three segments of the file: expert e's slice of ``ffn_gate_exps``,
``ffn_up_exps`` and ``ffn_down_exps`` [E, rows, cols]. Experts whose three matrices have the same
types and shapes form a *size class*: their slabs are equal, so they share a pool of slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_ref.gguf import GGUFFile

MATRICES = ("gate", "up", "down")


@dataclass(frozen=True, slots=True)
class Tensor:
    """The experts' matrices of one kind in one layer: ``experts`` slices of ``nbytes`` from ``offset`` on."""

    name: str
    type: str
    rows: int
    cols: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Segments of every layer and the size class each layer belongs to."""

    expert_count: int
    layers: tuple[tuple[Tensor, ...], ...]  # [L] of (gate, up, down)
    class_of_layer: tuple[int, ...]
    classes: tuple[tuple[Tensor, ...], ...]  # one representative (gate, up, down) a class

    def slab_bytes(self, class_index: int) -> int:
        """Bytes of one expert of this class, as they stand in the file."""
        return sum(t.nbytes for t in self.classes[class_index])

    def expert_bytes(self, layer: int) -> int:
        """Bytes of one expert of this layer, as they stand in the file."""
        return self.slab_bytes(self.class_of_layer[layer])

    def routed_bytes(self) -> int:
        """Bytes of all routed experts of all layers."""
        return self.expert_count * sum(map(self.expert_bytes, range(len(self.layers))))


def _tensor(file: GGUFFile, layer: int, matrix: str) -> Tensor:
    info = file.tensors[f"blk.{layer}.ffn_{matrix}_exps.weight"]
    experts, rows, cols = info.shape
    return Tensor(info.name, info.type, rows, cols, info.offset, info.nbytes // experts)


def _signature(tensors: Sequence[Tensor]) -> tuple[tuple[str, int, int], ...]:
    return tuple((t.type, t.rows, t.cols) for t in tensors)


def expert_layout(file: GGUFFile, block_count: int, expert_count: int) -> Layout:
    """Find every expert's segments in ``file``, whose tensors have been checked."""
    layers = tuple(tuple(_tensor(file, layer, m) for m in MATRICES) for layer in range(block_count))
    representative = {_signature(tensors): tensors for tensors in reversed(layers)}
    order = list(dict.fromkeys(map(_signature, layers)))  # classes in order of first appearance
    return Layout(
        expert_count=expert_count,
        layers=layers,
        class_of_layer=tuple(order.index(_signature(tensors)) for tensors in layers),
        classes=tuple(representative[signature] for signature in order),
    )
