"""Weights by their GGUF names, decoded when asked for and kept while there is room."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from moe_ref.gguf import GGUFFile
from moe_ref.quants import dequantize

DEFAULT_KEEP_BYTES = 1 << 30


class Weights:
    """Lazy view of a file's tensors as ``dtype`` arrays; at most ``keep_bytes`` of decoded copies are kept."""

    def __init__(self, file: GGUFFile, dtype=np.float32, keep_bytes: int = DEFAULT_KEEP_BYTES):
        self.file, self.dtype, self.keep_bytes = file, dtype, keep_bytes
        self._kept: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()
        self._kept_bytes = 0

    def __contains__(self, name: str) -> bool:
        return name in self.file.tensors

    def __getitem__(self, name: str) -> np.ndarray:
        """The whole tensor, decoded; NumPy order."""
        info = self.file.tensors[name]
        return self._decoded(name, -1, 0, info.nbytes, info.shape)

    def part(self, name: str, index: int) -> np.ndarray:
        """Slice ``index`` of the first axis (one expert, one row) without touching the others."""
        info = self.file.tensors[name]
        nbytes = info.nbytes // info.shape[0]
        return self._decoded(name, index, index * nbytes, nbytes, info.shape[1:])

    def rows(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Rows of a matrix, [n, columns]: an embedding lookup."""
        return np.stack([self.part(name, int(i)) for i in indices])

    def _decoded(self, name: str, index: int, start: int, nbytes: int, shape: tuple[int, ...]) -> np.ndarray:
        key = (name, index)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        raw = self.file.read(name, start, nbytes)
        array = dequantize(raw, self.file.tensors[name].type, shape, name).astype(self.dtype, copy=False)
        self._keep(key, array)
        return array

    def _keep(self, key: tuple[str, int], array: np.ndarray) -> None:
        if array.nbytes > self.keep_bytes:
            return
        self._kept[key] = array
        self._kept_bytes += array.nbytes
        while self._kept_bytes > self.keep_bytes:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
