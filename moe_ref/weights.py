"""Weights by their GGUF names, decoded when asked for and kept while there is room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

import numpy as np

from moe_ref.gguf import GGUFFile
from moe_ref.quants import dequantize
from moe_ref.tensors import View

DEFAULT_KEEP_BYTES = 1 << 30
Rounding = Callable[[np.ndarray, str], np.ndarray]  # activations [T, in], type of the matrix -> the same, rounded


def as_they_are(x: np.ndarray, matrix_type: str) -> np.ndarray:
    """No rounding of activations."""
    del matrix_type
    return x


class Weights:
    """Lazy view of a file's tensors as ``dtype`` arrays; at most ``keep_bytes`` of decoded copies are kept.

    ``views`` says where each name lies; ``round_activations`` is applied to what a matrix is multiplied with.
    """

    def __init__(
        self,
        file: GGUFFile,
        dtype=np.float32,
        keep_bytes: int = DEFAULT_KEEP_BYTES,
        views: Mapping[str, View] | None = None,
        round_activations: Rounding = as_they_are,
    ):
        self.file, self.dtype, self.keep_bytes, self.round_activations = file, dtype, keep_bytes, round_activations
        self.views = views if views is not None else {n: View(i, i.shape) for n, i in file.tensors.items()}
        self._kept: OrderedDict[tuple[str, int | None], np.ndarray] = OrderedDict()
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

    def linear(self, x: np.ndarray, name: str, index: int | None = None) -> np.ndarray:
        """``x W^T``, times the scale and plus the bias that the file may have under the same name.

        x [T, in] -> [T, out]; ``index`` picks one of several matrices (experts, heads).
        """
        matrix = self[name + ".weight"] if index is None else self.part(name + ".weight", index)
        y = self.round_activations(x, self.views[name + ".weight"].stored.type) @ matrix.T
        if name + ".scale" in self:
            y = y * self[name + ".scale"][index or 0]
        if name + ".bias" in self:
            y = y + (self[name + ".bias"] if index is None else self[name + ".bias"][index])
        return y

    def _decoded(self, name: str, index: int | None) -> np.ndarray:
        key = (name, index)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        view = self.views[name]
        shape = view.shape if index is None else view.shape[1:]
        raw = self.file.read(view.stored.name, *view.segment(index))
        array = dequantize(raw, view.stored.type, shape, name).astype(self.dtype, copy=False)
        self._keep(key, array)
        return array

    def _keep(self, key: tuple[str, int | None], array: np.ndarray) -> None:
        if array.nbytes > self.keep_bytes:
            return
        self._kept[key] = array
        self._kept_bytes += array.nbytes
        while self._kept_bytes > self.keep_bytes:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes

