"""The expert store: brings one expert's three segments from the file into one slot of memory."""

from __future__ import annotations

import numpy as np

from moe_cupy.store.files import RangeFile, StoreError, align_down
from moe_cupy.store.layout import MATRICES, Layout, Tensor


class ExpertStore:
    """Reads experts of one model. A slot is three regions, each with room for its segment as the disk aligns it.

    Nothing is copied twice: a direct read lands in the slot, and ``views`` finds the segment inside its
    region from the file offset alone.
    """

    def __init__(self, layout: Layout, direct_io: bool = True):
        self.layout = layout
        self.files: list[RangeFile] = []
        try:
            for path in layout.paths:
                self.files.append(RangeFile(path, direct_io))
        except BaseException:
            self.close()
            raise

    @property
    def how(self) -> str:
        """How the files are read."""
        return self.files[0].how

    def slot_bytes(self, class_index: int) -> int:
        """Memory of one slot of this class: the slab, plus what alignment to the disk costs."""
        return sum(map(self._room, self.layout.classes[class_index]))

    def read(self, key: int, slot: np.ndarray) -> None:
        """Fill ``slot`` (uint8 [slot_bytes], aligned) with expert ``key``; raises StoreError naming the expert."""
        layer, expert = divmod(key, self.layout.expert_count)
        start = 0
        for tensor in self.layout.layers[layer]:
            room, file = self._room(tensor), self.files[tensor.file]
            try:
                file.read_into(slot[start : start + room], self._offset(tensor, expert), tensor.nbytes)
            except StoreError as error:
                raise StoreError(f"expert {expert} of layer {layer} ({tensor.name}): {error}") from error
            start += room

    def views(self, key: int, slot: np.ndarray) -> dict[str, np.ndarray]:
        """The bytes of gate, up and down of expert ``key`` inside its slot, uint8 [nbytes] each."""
        layer, expert = divmod(key, self.layout.expert_count)
        views, start = {}, 0
        for matrix, tensor in zip(MATRICES, self.layout.layers[layer], strict=True):
            offset = self._offset(tensor, expert)
            begin = start + offset - align_down(offset, self.files[tensor.file].alignment)
            views[matrix] = slot[begin : begin + tensor.nbytes]
            start += self._room(tensor)
        return views

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            file.close()

    def _room(self, tensor: Tensor) -> int:
        """What a slot of this size class sets aside, whichever file its expert comes from."""
        return max(file.room(tensor.nbytes) for file in self.files)

    @staticmethod
    def _offset(tensor: Tensor, expert: int) -> int:
        return tensor.offset + expert * tensor.stride
