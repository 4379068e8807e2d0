"""Where expert bytes lie in a GGUF, and how one expert's segments are gathered into one slab.

One expert is three matrices, so three segments of the file: expert e's slice of ``ffn_gate_exps``,
``ffn_up_exps`` and ``ffn_down_exps`` [E, rows, cols], or of ``ffn_gate_up_exps``, where the slice begins
with the rows of gate. Experts whose three matrices have the same types and shapes form a *size class*:
their slabs are equal, so they share a pool of slots.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_ref.gguf import GGUFFile
from moe_ref.tensors import View

MATRICES = ("gate", "up", "down")


@dataclass(frozen=True, slots=True)
class Tensor:
    """The experts' matrices of one kind in one layer: ``nbytes`` from ``offset`` on, and again every ``stride``."""

    name: str
    type: str
    rows: int
    cols: int
    offset: int
    nbytes: int
    stride: int
    file: int = 0  # of Layout.paths


@dataclass(frozen=True, slots=True)
class Layout:
    """Segments of every layer and the size class each layer belongs to."""

    expert_count: int
    layers: tuple[tuple[Tensor, ...], ...]  # [L] of (gate, up, down); () in a layer without routed experts
    class_of_layer: tuple[int, ...]  # -1 in a layer without
    classes: tuple[tuple[Tensor, ...], ...]  # one representative (gate, up, down) a class
    paths: tuple[Path, ...]  # the files, more than one if the model is split

    def slab_bytes(self, class_index: int) -> int:
        """Bytes of one expert of this class, as they stand in the file."""
        return sum(t.nbytes for t in self.classes[class_index])

    def expert_bytes(self, layer: int) -> int:
        """Bytes of one expert of this layer, as they stand in the file; 0 in a layer without."""
        return sum(t.nbytes for t in self.layers[layer])

    def expert_total(self) -> int:
        """Routed experts of all layers."""
        return self.expert_count * sum(map(bool, self.layers))

    def routed_bytes(self) -> int:
        """Bytes of all routed experts of all layers."""
        return self.expert_count * sum(map(self.expert_bytes, range(len(self.layers))))

    def only(self, layers: Collection[int]) -> Layout:
        """The layout with the experts of these layers alone; the others have none."""
        return make_layout(
            self.expert_count, tuple(t if i in layers else () for i, t in enumerate(self.layers)), self.paths
        )


def _tensor(file: GGUFFile, paths: list[Path], name: str, view: View) -> Tensor:
    experts, rows, cols = view.shape
    start, nbytes = view.segment(0)
    path = file.home(view.stored.name).path
    if path not in paths:
        paths.append(path)
    return Tensor(
        name, view.stored.type, rows, cols, view.stored.offset + start, nbytes,
        view.stored.nbytes // experts, paths.index(path),
    )  # fmt: skip


def _signature(tensors: Sequence[Tensor]) -> tuple[tuple[str, int, int], ...]:
    return tuple((t.type, t.rows, t.cols) for t in tensors)


def expert_layout(file: GGUFFile, views: Mapping[str, View], block_count: int, expert_count: int) -> Layout:
    """Find every expert's segments in ``file``, whose tensors have been checked and lie as ``views`` says."""
    paths: list[Path] = []
    names = [[f"blk.{layer}.ffn_{matrix}_exps.weight" for matrix in MATRICES] for layer in range(block_count)]
    layers = tuple(tuple(_tensor(file, paths, n, views[n]) for n in three if n in views) for three in names)
    return make_layout(expert_count, layers, tuple(paths))


def make_layout(expert_count: int, layers: tuple[tuple[Tensor, ...], ...], paths: tuple[Path, ...]) -> Layout:
    """The layout of these segments [L], with layers of the same types and shapes in one size class."""
    representative = {_signature(tensors): tensors for tensors in reversed(layers) if tensors}
    order = list(dict.fromkeys(_signature(tensors) for tensors in layers if tensors))  # by first appearance
    return Layout(
        expert_count=expert_count,
        layers=layers,
        class_of_layer=tuple(order.index(_signature(tensors)) if tensors else -1 for tensors in layers),
        classes=tuple(representative[signature] for signature in order),
        paths=paths,
    )
