"""The repacked store: one file with the bytes of each expert side by side, as ``repack`` writes it.

    0      magic, version, lengths, CRC-32 of the next two
    40     description: JSON, which says what the store was made from and where its slabs lie
           checksums: uint32 [copies, L, E], the CRC-32 of each slab's matrices
    4 KiB multiples
           slabs: layer by layer, expert by expert: gate, up, down, each at a multiple of 64 in its slab;
           then, if asked for, the same once more in a smaller type

The description follows from the model's file and the smaller type alone. So a store is not believed but compared: with
what ``repack`` would write for the model at hand.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from moe_cupy.store.files import PAGE, StoreError, align_up
from moe_cupy.store.layout import Layout, Tensor, make_layout
from moe_ref.gguf import GGUFFile
from moe_ref.quants import BY_NAME

MAGIC, VERSION = b"MOESLABS", 1
PREFIX = struct.Struct("<8sIIQQQ")  # magic, version, CRC-32, bytes of description, checksums, whole file
MATRIX_ALIGNMENT = 64
LONGEST_DESCRIPTION = 64 << 20
SAMPLE = 4096  # bytes of each tensor that tell one model's weights from another's


class StoreMismatch(StoreError):
    """A file that is no store, or not one of this model."""

    is_request = True  # for the command line: the request was wrong, not the work


@dataclass(frozen=True, slots=True)
class Repacked:
    """A repacked store: where the experts lie, as they were and in a smaller type (None: not in it)."""

    description: dict[str, Any]
    full: Layout
    low: Layout | None
    data_begin: int
    nbytes: int

    @property
    def copies(self) -> list[Layout]:
        """The layouts that are in the file, in its order."""
        return [self.full] if self.low is None else [self.full, self.low]

    def checksum_count(self) -> int:
        """Entries of the table of checksums."""
        return len(self.copies) * self.full.expert_count * len(self.full.layers)


def arrange(file: GGUFFile, layout: Layout, low: str | None, path: Path) -> Repacked:
    """Where ``repack`` puts the experts of ``file``, which lie in it as ``layout`` says."""
    description = describe(file, layout, low)
    text = len(json.dumps(description))
    copies = 1 if low is None else 2
    begin = align_up(PREFIX.size + text + 4 * copies * layout.expert_count * len(layout.layers), PAGE)
    full, end = _arranged(layout, begin, path, lambda t: t.type)
    smaller = None
    if low is not None:
        smaller, end = _arranged(layout, end, path, lambda t: low_type(t, low))
    return Repacked(description, full, smaller, begin, end)


def low_type(tensor: Tensor, low: str) -> str:
    """The type of a matrix's smaller copy: its own where ``low`` does not fit its rows or saves nothing."""
    wanted = BY_NAME[low]
    if tensor.cols % wanted.block_elements or wanted.row_bytes(tensor.cols) >= tensor.nbytes // tensor.rows:
        return tensor.type
    return low


def describe(file: GGUFFile, layout: Layout, low: str | None) -> dict[str, Any]:
    """What a store says of itself; the same for the same model, wherever it lies and whatever it is called."""
    return {
        "source": {"bytes": [os.path.getsize(path) for path in layout.paths], "sha256": identity(file, layout)},
        "expert_count": layout.expert_count,
        "layers": [[[t.type, t.rows, t.cols] for t in tensors] for tensors in layout.layers],
        "alignment": PAGE,
        "low": low,
    }


def identity(file: GGUFFile, layout: Layout) -> str:
    """A hash of the tensor table and of the first bytes of each tensor of experts."""
    digest = hashlib.sha256()
    for info in file.tensors.values():
        digest.update(repr((info.name, info.type, info.shape, info.offset)).encode())
    for tensor in (t for tensors in layout.layers for t in tensors):
        stem = tensor.name if tensor.name in file.tensors else tensor.name.replace("_gate_", "_gate_up_")
        if stem in file.tensors:
            digest.update(file.read(stem, 0, min(SAMPLE, file.tensors[stem].nbytes)).tobytes())
    return digest.hexdigest()


def header_bytes(store: Repacked, checksums: np.ndarray) -> bytes:
    """All that precedes the slabs; checksums uint32 [checksum_count]."""
    text, table = json.dumps(store.description).encode(), checksums.astype("<u4").tobytes()
    prefix = PREFIX.pack(MAGIC, VERSION, zlib.crc32(text + table), len(text), len(checksums), store.nbytes)
    return (prefix + text + table).ljust(store.data_begin, b"\0")


def open_repacked(path: str | os.PathLike, file: GGUFFile, layout: Layout) -> tuple[Repacked, np.ndarray]:
    """The store at ``path`` and its checksums uint32 [copies, L * E]; ``file`` and ``layout`` are the model's.

    Raises StoreMismatch if it is no store, a damaged one, or one of another model.
    """
    try:
        with open(path, "rb") as source:
            description, raw, size = _read_header(source, path)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreMismatch(f"{path}: cannot be read as a repacked store: {error.strerror or error}") from error
    low = description.get("low")
    if low is not None and (not isinstance(low, str) or low not in BY_NAME):
        raise StoreMismatch(f"{path}: its smaller copies are of type {str(low)[:40]!r}, which is not known here")
    store = arrange(file, layout, low, Path(path))
    for key, wanted in store.description.items():
        if description.get(key) != wanted:
            raise StoreMismatch(
                f"{path}: was not made from {file.path}: {key!r} differs; make it again: "
                f"python -m moe_cupy repack {file.path} -o {path}"
            )
    if len(raw) != 4 * store.checksum_count() or size != store.nbytes:
        raise StoreMismatch(
            f"{path}: has {size} bytes and {len(raw) // 4} checksums, but {store.nbytes} bytes and "
            f"{store.checksum_count()} were written; was it truncated?"
        )
    return store, np.frombuffer(raw, "<u4").reshape(len(store.copies), -1)


def _read_header(source: IO[bytes], path: str | os.PathLike) -> tuple[dict[str, Any], bytes, int]:
    """Description, bytes of the checksums, and the size that the file has."""
    size = os.fstat(source.fileno()).st_size
    prefix = source.read(PREFIX.size)
    if len(prefix) < PREFIX.size or prefix[:8] != MAGIC:
        raise StoreMismatch(f"{path}: is no repacked store (begins with {prefix[:8]!r}, expected {MAGIC!r})")
    _, version, crc, text_bytes, entries, _ = PREFIX.unpack(prefix)
    if version != VERSION:
        raise StoreMismatch(f"{path}: is a store of version {version}, this program reads {VERSION}: repack again")
    if text_bytes > LONGEST_DESCRIPTION or PREFIX.size + text_bytes + 4 * entries > size:
        raise StoreMismatch(f"{path}: its header claims {text_bytes} + 4 x {entries} bytes of a file of {size}")
    text, table = source.read(text_bytes), source.read(4 * entries)
    if zlib.crc32(text + table) != crc:
        raise StoreMismatch(f"{path}: its header is damaged (the checksum differs); make it again with repack")
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreMismatch(f"{path}: its description is no JSON: {str(error)[:80]}") from error
    if not isinstance(description, dict):
        raise StoreMismatch(f"{path}: its description is a {type(description).__name__}, expected an object")
    return description, table, size


def _arranged(layout: Layout, begin: int, path: Path, type_of: Callable[[Tensor], str]) -> tuple[Layout, int]:
    """``layout``'s experts as slabs from ``begin`` on, and where the last one ends."""
    layers = []
    for tensors in layout.layers:
        offset, placed = begin, []
        for t in tensors:
            nbytes = BY_NAME[type_of(t)].row_bytes(t.cols) * t.rows
            placed.append((t, type_of(t), offset, nbytes))
            offset += align_up(nbytes, MATRIX_ALIGNMENT)
        stride = align_up(offset - begin, PAGE)
        layers.append(tuple(Tensor(t.name, kind, t.rows, t.cols, at, n, stride) for t, kind, at, n in placed))
        begin += stride * layout.expert_count
    return make_layout(layout.expert_count, tuple(layers), (path,)), begin
