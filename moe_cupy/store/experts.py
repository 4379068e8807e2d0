"""The expert store: brings one expert's three segments from the file into one slot of memory."""

from __future__ import annotations

import numpy as np

from moe_cupy.store.files import RangeFile, StoreError, align_down
from moe_cupy.store.layout import MATRICES, Layout, Tensor


class ExpertStore:
    """Reads experts of one GGUF. A slot is three regions, each with room for its segment as the disk aligns it.

    Nothing is copied twice: a direct read lands in the slot, and ``views`` finds the segment inside its
    region from the file offset alone.
    """

    def __init__(self, file: RangeFile, layout: Layout):
        self.file, self.layout = file, layout

    def slot_bytes(self, class_index: int) -> int:
        """Memory of one slot of this class: the slab, plus what alignment to the disk costs."""
        return sum(self.file.room(t.nbytes) for t in self.layout.classes[class_index])

    def read(self, key: int, slot: np.ndarray) -> None:
        """Fill ``slot`` (uint8 [slot_bytes], aligned) with expert ``key``; raises StoreError naming the expert."""
        layer, expert = divmod(key, self.layout.expert_count)
        start = 0
        for tensor in self.layout.layers[layer]:
            room = self.file.room(tensor.nbytes)
            try:
                self.file.read_into(slot[start : start + room], self._offset(tensor, expert), tensor.nbytes)
            except StoreError as error:
                raise StoreError(f"expert {expert} of layer {layer} ({tensor.name}): {error}") from error
            start += room

    def views(self, key: int, slot: np.ndarray) -> dict[str, np.ndarray]:
        """The bytes of gate, up and down of expert ``key`` inside its slot, uint8 [nbytes] each."""
        layer, expert = divmod(key, self.layout.expert_count)
        views, start = {}, 0
        for matrix, tensor in zip(MATRICES, self.layout.layers[layer], strict=True):
            offset = self._offset(tensor, expert)
            begin = start + offset - align_down(offset, self.file.alignment)
            views[matrix] = slot[begin : begin + tensor.nbytes]
            start += self.file.room(tensor.nbytes)
        return views

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    @staticmethod
    def _offset(tensor: Tensor, expert: int) -> int:
        return tensor.offset + expert * tensor.nbytes
