"""Weights by their GGUF names, decoded when asked for and kept while there is room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moe_ref.finite import FILE_IS_DAMAGED, check_finite
from moe_ref.gguf import GGUFFile
from moe_ref.quants import dequantize
from moe_ref.quants.dots import Matrix, decode, multiply
from moe_ref.tensors import View

DEFAULT_KEEP_BYTES = 1 << 30
Key = tuple[str, int | None, bool]  # name, slice, whether in parts
Decoder = Callable[[np.ndarray, str, tuple[int, ...], str], Any]  # bytes, type, shape, name -> what knows its nbytes


class Weights:
    """Lazy view of a file's tensors as ``dtype`` arrays; at most ``keep_bytes`` of decoded copies are kept.

    ``views`` says where each name lies.
    """

    def __init__(
        self,
        file: GGUFFile,
        dtype=np.float32,
        keep_bytes: int = DEFAULT_KEEP_BYTES,
        views: Mapping[str, View] | None = None,
    ):
        self.file, self.dtype, self.keep_bytes = file, dtype, keep_bytes
        self.views = views if views is not None else {n: View(i, i.shape) for n, i in file.tensors.items()}
        self._kept: OrderedDict[Key, Any] = OrderedDict()
        self._kept_bytes = 0

    def __contains__(self, name: object) -> bool:
        return name in self.views

    def __getitem__(self, name: str) -> np.ndarray:
        """The whole tensor, decoded; NumPy order."""
        view = self.views[name]
        if len(view.shape) > 2 and view.shape != view.stored.shape:  # its rows lie apart, expert by expert
            return np.stack([self.part(name, i) for i in range(view.shape[0])])
        return self._decoded(name, None)

    def part(self, name: str, index: int) -> np.ndarray:
        """Slice ``index`` of the first axis (one expert, one row) without touching the others."""
        return self._decoded(name, index)

    def rows(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Rows of a matrix, [n, columns]: an embedding lookup."""
        return np.stack([self.part(name, int(i)) for i in indices])

    def product(self, x: np.ndarray, name: str, index: int | None = None) -> np.ndarray:
        """``x W^T`` for a matrix, or one of several."""
        return x @ np.atleast_2d(self[name] if index is None else self.part(name, index)).T

    def linear(self, x: np.ndarray, name: str, index: int | None = None) -> np.ndarray:
        """``x W^T``, times the scale and plus the bias that the file may have under the same name.

        x [T, in] -> [T, out]; ``index`` picks one of several matrices (experts, heads). Raises NonFiniteError.
        """
        y = self.product(x, name + ".weight", index)
        if name + ".scale" in self:
            y = y * self[name + ".scale"][index or 0]
        if name + ".bias" in self:
            y = y + (self[name + ".bias"] if index is None else self[name + ".bias"][index])
        return check_finite(y, f"the product with {name}" + ("" if index is None else f"[{index}]"))

    def _decoded(self, name: str, index: int | None) -> np.ndarray:
        return self._once(name, index, self._plain)

    def _plain(self, raw: np.ndarray, kind: str, shape: tuple[int, ...], name: str) -> np.ndarray:
        return dequantize(raw, kind, shape, name).astype(self.dtype, copy=False)

    def _once(self, name: str, index: int | None, decoder: Decoder, in_parts: bool = False) -> Any:
        """What ``decoder`` makes of a tensor or a slice of it, unless that is still there."""
        key, view = (name, index, in_parts), self.views[name]
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        shape = view.shape if index is None else view.shape[1:]
        raw = self.file.read(view.stored.name, *view.segment(index))
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is an error, not a warning
            made = decoder(raw, view.stored.type, shape, name)
        for part in made if isinstance(made, Matrix) else [made]:
            if isinstance(part, np.ndarray):
                check_finite(part, name if index is None else f"{name}[{index}]", FILE_IS_DAMAGED)
        self._keep(key, made)
        return made

    def _keep(self, key: Key, array: Any) -> None:
        if array.nbytes > self.keep_bytes:
            return
        self._kept[key] = array
        self._kept_bytes += array.nbytes
        while self._kept_bytes > self.keep_bytes:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes


class RoundedWeights(Weights):
    """The same, but products are those of llama.cpp's CPU kernels, with activations rounded (quants/dots.py)."""

    def product(self, x: np.ndarray, name: str, index: int | None = None) -> np.ndarray:
        matrix: Matrix = self._once(name, index, decode, in_parts=True)
        return multiply(x.astype(np.float32, copy=False), matrix, index is not None).astype(x.dtype, copy=False)
