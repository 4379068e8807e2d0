"""``repack``: writes a model's experts side by side, checks what was written."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from moe_cupy.store import MATRICES, ExpertStore, Layout, arrange, expert_layout, header_bytes, open_repacked
from moe_ref.command import RequestError, check_writable, naming_full_disk, whole_file
from moe_ref.config import load_config
from moe_ref.gguf import GGUFFile
from moe_ref.interrupts import undoing
from moe_ref.quants import dequantize, quantize
from moe_ref.tensors import check_tensors, vocab_rows

PAGE = 4096


def layout_of(file: GGUFFile) -> Layout:
    """Where the experts of a model lie; raises RequestError for one without."""
    config = load_config(file.metadata, vocab_rows(file))
    if not config.is_moe:
        raise RequestError(f"{file.path}: has no routed experts, so there is nothing to repack")
    return expert_layout(file, check_tensors(config, file), config.block_count, config.expert_count)


def repack(file: GGUFFile, output: str, low: str | None) -> Iterator[tuple[int, int]]:
    """Write the store of ``file``; yields (slabs done, slabs in all). Holds one expert at a time."""
    layout = layout_of(file)
    store = arrange(file, layout, low, Path(output))
    _refuse_full_disk(output, store.nbytes)
    experts = layout.expert_count * len(layout.layers)
    checksums = np.zeros((len(store.copies), experts), np.uint32)
    source = ExpertStore(layout)
    try:
        with appears_whole(output) as out:
            out.write(bytes(store.data_begin))
            done, total = 0, len(store.copies) * layout.expert_total()
            for table, copy in zip(checksums, store.copies, strict=True):
                for key, slab in slabs(source, copy):
                    table[key] = zlib.crc32(slab.data)
                    out.write(slab.data)
                    out.write(bytes(-len(slab) % PAGE))
                    done += 1
                    yield done, total
            out.seek(0)
            out.write(header_bytes(store, checksums.ravel()))
    finally:
        source.close()


def slabs(source: ExpertStore, copy: Layout) -> Iterator[tuple[int, np.ndarray]]:
    """(key, uint8 [bytes]) of every expert in the order of the file, its matrices in the types of ``copy``."""
    slot = _page_aligned(max(map(source.slot_bytes, range(len(source.layout.classes)))))
    for layer, tensors in enumerate(copy.layers):
        if not tensors:
            continue
        slab = np.zeros(tensors[-1].offset + tensors[-1].nbytes - tensors[0].offset, np.uint8)
        for key in range(layer * copy.expert_count, (layer + 1) * copy.expert_count):
            source.read(key, slot)
            views = source.views(key, slot)
            for name, old, new in zip(MATRICES, source.layout.layers[layer], tensors, strict=True):
                raw = views[name]
                if new.type != old.type:
                    raw = quantize(dequantize(raw, old.type, (old.rows, old.cols), old.name), new.type, old.name)
                at = new.offset - tensors[0].offset
                slab[at : at + new.nbytes] = raw.ravel()
            yield key, slab


def verify(file: GGUFFile, path: str) -> Iterator[tuple[int, int]]:
    """Read every slab of the store and compare its checksum; yields (slabs done, slabs in all).

    Raises StoreMismatch if the store is not of ``file``, StoreError naming the first expert whose bytes differ.
    """
    store, checksums = open_repacked(path, file, layout_of(file))
    done, total = 0, len(store.copies) * store.full.expert_total()
    for table, copy in zip(checksums, store.copies, strict=True):
        reader = ExpertStore(copy, checksums=table)
        slot = _page_aligned(max(map(reader.slot_bytes, range(len(copy.classes)))))
        with contextlib.closing(reader):
            for layer in (i for i, tensors in enumerate(copy.layers) if tensors):
                for key in range(layer * copy.expert_count, (layer + 1) * copy.expert_count):
                    reader.read(key, slot)
                    done += 1
                    yield done, total


@contextlib.contextmanager
def appears_whole(path: str) -> Iterator[IO[bytes]]:
    """As ``whole_file``, and where the system can keep a file without a name, a killed process leaves nothing."""
    target = Path(os.path.realpath(path))
    check_writable(target)
    _refuse_no_file(target)
    try:
        handle = os.open(target.parent, os.O_TMPFILE | os.O_RDWR, 0o666)
    except (OSError, AttributeError):
        with whole_file(path) as out:
            yield out
        return
    with naming_full_disk(path), os.fdopen(handle, "w+b") as out:
        yield out
        out.flush()
        os.fsync(handle)
        folder = tempfile.TemporaryDirectory(dir=target.parent, prefix=".repack-")
        with folder, undoing(folder.cleanup):
            named = os.path.join(folder.name, "store")
            os.link(f"/proc/self/fd/{handle}", named, src_dir_fd=handle, follow_symlinks=True)
            os.replace(named, target)


def _refuse_no_file(target: Path) -> None:
    """A device or a pipe would be replaced by the store; it cannot be read at any place either."""
    if target.exists() and not target.is_file():
        raise RequestError(f"{target}: is no regular file; a store is read at any place, so name a file")


def _refuse_full_disk(output: str, nbytes: int) -> None:
    check_writable(output)
    _refuse_no_file(Path(os.path.realpath(output)))
    free = shutil.disk_usage(Path(os.path.realpath(output)).parent).free
    if free < nbytes:
        raise RequestError(f"{output}: needs {nbytes / 2**20:.0f} MiB, but its disk has {free / 2**20:.0f} MiB left")


def _page_aligned(nbytes: int) -> np.ndarray:
    """uint8 [nbytes] that begins with a page."""
    memory = np.empty(nbytes + PAGE, np.uint8)
    start = -memory.ctypes.data % PAGE
    return memory[start : start + nbytes]
