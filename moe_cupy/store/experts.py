"""The expert store: brings one expert's matrices from the file into one slot of memory."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from moe_cupy.store.files import PAGE, RangeFile, StoreError, align_down, align_up
from moe_cupy.store.layout import MATRICES, Layout, Tensor

PIECE = 1 << 20  # bytes of one read at most: larger ranges are several reads, which may be in flight together
PADDING = 64  # bytes between matrices that are still read as one range


@dataclass(frozen=True, slots=True)
class Run:
    """Matrices of an expert that lie beside each other, so that one range of the file holds them."""

    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """From the first byte of the first matrix to the last of the last."""
        return self.tensors[-1].offset + self.tensors[-1].nbytes - self.tensors[0].offset

    @property
    def name(self) -> str:
        """What the range holds, for errors."""
        return " … ".join(dict.fromkeys((self.tensors[0].name, self.tensors[-1].name)))

    def offset(self, expert: int) -> int:
        """Where the range of this expert begins in the file."""
        return self.tensors[0].offset + expert * self.tensors[0].stride


class ExpertStore:
    """Reads experts of one model. A slot is a region a run, each with room for the range as the disk aligns it.

    Nothing is copied twice: a direct read lands in the slot, and ``views`` finds the matrices inside it from the file
    offsets alone. ``checksums`` are the CRC-32 of each expert's bytes by key, for a file of one run a layer; they are
    compared when an expert is read for the first time.
    """

    def __init__(self, layout: Layout, direct_io: bool = True, checksums: Sequence[int] | None = None):
        self.layout, self.checksums = layout, checksums
        self.files: list[RangeFile] = []
        try:
            for path in layout.paths:
                self.files.append(RangeFile(path, direct_io))
        except BaseException:
            self.close()
            raise
        self._runs = [runs_of(tensors) for tensors in layout.layers]
        self._rooms = [[self._room(run) for run in runs] for runs in self._runs]
        self._slot_bytes = [0] * len(layout.classes)
        for index, rooms in zip(layout.class_of_layer, self._rooms, strict=True):
            if rooms:
                self._slot_bytes[index] = max(self._slot_bytes[index], sum(rooms))
        self._seen = bytearray(layout.expert_count * len(layout.layers))  # 1: the checksum was right

    @property
    def how(self) -> str:
        """How the files are read."""
        return ("repacked, " if self.checksums is not None else "") + self.files[0].how

    def slot_bytes(self, class_index: int) -> int:
        """Memory of one slot of this class: the slab, plus what alignment to the disk costs."""
        return self._slot_bytes[class_index]

    def read(self, key: int, slot: np.ndarray) -> None:
        """Fill ``slot`` (uint8 [slot_bytes], aligned) with expert ``key``; raises StoreError naming the expert."""
        for part in self.parts(key, slot):
            part()

    def parts(self, key: int, slot: np.ndarray) -> list[Callable[[], None]]:
        """The reads that fill ``slot`` with expert ``key``, in any order, on any threads."""
        layer, expert = divmod(key, self.layout.expert_count)
        parts: list[Callable[[], None]] = []
        start = 0
        for run, room in zip(self._runs[layer], self._rooms[layer], strict=True):
            offset = run.offset(expert)
            end = offset + run.nbytes
            begin = align_down(offset, self.files[run.tensors[0].file].alignment)
            step = piece_bytes(end - begin)
            for at in range(begin, end, step):
                memory = slot[start + at - begin : start + min(room, at + step - begin)]
                parts.append(partial(self._read_part, key, run, memory, at, min(step, end - at)))
            start += room
        return self._and_check(key, slot, parts) if self.checksums is not None and not self._seen[key] else parts

    def views(self, key: int, slot: np.ndarray) -> dict[str, np.ndarray]:
        """The bytes of gate, up and down of expert ``key`` inside its slot, uint8 [nbytes] each."""
        layer, expert = divmod(key, self.layout.expert_count)
        found, start = [], 0
        for run, room in zip(self._runs[layer], self._rooms[layer], strict=True):
            offset = run.offset(expert)
            begin = start + offset - align_down(offset, self.files[run.tensors[0].file].alignment)
            for tensor in run.tensors:
                at = begin + tensor.offset - run.tensors[0].offset
                found.append(slot[at : at + tensor.nbytes])
            start += room
        return dict(zip(MATRICES, found, strict=True))

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            file.close()

    def _room(self, run: Run) -> int:
        """Memory for this run of any expert, wherever it begins between the places where a read may."""
        file = self.files[run.tensors[0].file]
        skips = {run.offset(expert) % file.alignment for expert in range(self.layout.expert_count)}
        return align_up(max(skips) + run.nbytes, max(64, file.alignment))

    def _read_part(self, key: int, run: Run, memory: np.ndarray, offset: int, nbytes: int) -> None:
        try:
            self.files[run.tensors[0].file].read_into(memory, offset, nbytes)
        except StoreError as error:
            raise StoreError(f"{self._called(key, run)}: {error}") from error

    def _and_check(self, key: int, slot: np.ndarray, parts: list[Callable[[], None]]) -> list[Callable[[], None]]:
        """The same parts; the last to end, whichever it is, compares the checksum."""
        left = itertools.count(len(parts) - 1, -1)

        def checked(part: Callable[[], None]) -> None:
            part()
            if next(left) == 0:
                self._check(key, slot)

        return [partial(checked, part) for part in parts]

    def _check(self, key: int, slot: np.ndarray) -> None:
        assert self.checksums is not None
        run = self._runs[key // self.layout.expert_count][0]
        found, wanted = zlib.crc32(slot[: run.nbytes].data), int(self.checksums[key])
        if found != wanted:
            raise StoreError(
                f"{self._called(key, run)}: {self.files[0].path}: the bytes have CRC-32 {found:08x}, but {wanted:08x} "
                f"was written; the file is damaged: make it again with repack"
            )
        self._seen[key] = 1

    def _called(self, key: int, run: Run) -> str:
        layer, expert = divmod(key, self.layout.expert_count)
        return f"expert {expert} of layer {layer} ({run.name})"


def runs_of(tensors: Sequence[Tensor]) -> list[Run]:
    """Group a layer's matrices, in their order, where no more than padding lies between one and the next."""
    runs: list[list[Tensor]] = []
    for tensor in tensors:
        last = runs[-1][-1] if runs else None
        if last is not None and _beside(last, tensor):
            runs[-1].append(tensor)
        else:
            runs.append([tensor])
    return [Run(tuple(run)) for run in runs]


def _beside(a: Tensor, b: Tensor) -> bool:
    gap = b.offset - a.offset - a.nbytes
    return a.file == b.file and a.stride == b.stride and 0 <= gap < PADDING


def piece_bytes(nbytes: int) -> int:
    """Length of each read, but the last, when ``nbytes`` are read in as few equal pieces as PIECE allows."""
    pieces = -(-nbytes // PIECE)
    return align_up(-(-nbytes // max(1, pieces)), PAGE)
