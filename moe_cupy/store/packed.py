"""Experts of a store as slabs whose matrices begin at the same places in all slabs of a size class.

A kernel that brings experts into slots itself finds the matrices by slot alone, so they may not lie where the disk's
alignment puts them. Loading costs a copy in host memory.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from functools import partial

import numpy as np

from moe_cupy.store.experts import ExpertStore
from moe_cupy.store.files import align_up
from moe_cupy.store.layout import MATRICES

ALIGNMENT = 64  # of a matrix in its slab


class Packed:
    """What movers and transports need of a store; closes the one it reads from."""

    def __init__(self, store: ExpertStore):
        self._store, self.layout = store, store.layout
        self._own = threading.local()  # memory that a thread reads into

    @property
    def how(self) -> str:
        """How the files are read."""
        return self._store.how

    def close(self) -> None:
        """Close the files."""
        self._store.close()

    def offsets(self, class_index: int) -> list[int]:
        """Where gate, up and down begin in a slab of this class, and where it ends."""
        ends = [0]
        for tensor in self.layout.classes[class_index]:
            ends.append(align_up(ends[-1] + tensor.nbytes, ALIGNMENT))
        return ends

    def slot_bytes(self, class_index: int) -> int:
        """Memory of one slot of this class."""
        return self.offsets(class_index)[-1]

    def parts(self, key: int, slot: np.ndarray) -> list[Callable[[], None]]:
        """The work that fills ``slot`` with expert ``key``."""
        return [partial(self._fill, key, slot)]

    def views(self, key: int, slot: np.ndarray) -> dict[str, np.ndarray]:
        """The bytes of gate, up and down inside a slot, uint8 [nbytes] each."""
        index = self.layout.class_of_layer[key // self.layout.expert_count]
        starts, tensors = self.offsets(index), self.layout.classes[index]
        return {name: slot[at : at + t.nbytes] for name, at, t in zip(MATRICES, starts[:-1], tensors, strict=True)}

    def _fill(self, key: int, slot: np.ndarray) -> None:
        room = self._room()
        self._store.read(key, room)
        targets = self.views(key, slot)
        for name, part in self._store.views(key, room).items():
            targets[name][...] = part

    def _room(self) -> np.ndarray:
        if not hasattr(self._own, "room"):
            most = max(self._store.slot_bytes(index) for index in range(len(self.layout.classes)))
            self._own.room = np.frombuffer(mmap.mmap(-1, most), np.uint8)
        return self._own.room
