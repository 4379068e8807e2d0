"""Writing GGUF: the header from metadata values as they lie in a file, and what pads a tensor. Layout: ``gguf.py``."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from math import prod

from moe_ref.quants.types import BY_NAME

VERSION = 3
UINT32 = 4  # type id of a metadata value


def uint32(value: int) -> bytes:
    """A metadata value of that type, as ``GGUFFile.value_bytes`` gives those of a file."""
    return struct.pack("<II", UINT32, value)


def padding(nbytes: int, alignment: int) -> bytes:
    """The zeros that follow ``nbytes``."""
    return bytes(-nbytes % alignment)


def tensor_bytes(type_name: str, shape: tuple[int, ...]) -> int:
    """Size of a tensor, shape in NumPy order; raises ValueError unless its rows are whole blocks."""
    return BY_NAME[type_name].row_bytes(shape[-1]) * prod(shape[:-1])


def header(metadata: Mapping[str, bytes], tensors: Iterable[tuple[str, str, tuple[int, ...]]], alignment: int) -> bytes:
    """All that precedes the tensors' bytes, which must follow in this order, each padded to ``alignment``.

    ``metadata`` maps keys to type id and value; a tensor is its name, type name and shape in NumPy order.
    """
    entries, offset = [], 0
    for name, type_name, shape in tensors:
        layout = struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), BY_NAME[type_name].id, offset)
        entries.append(_string(name) + layout)
        nbytes = tensor_bytes(type_name, shape)
        offset += nbytes + -nbytes % alignment
    counts = struct.pack("<IQQ", VERSION, len(entries), len(metadata))
    pairs = [_string(key) + value for key, value in metadata.items()]
    whole = b"".join([b"GGUF", counts, *pairs, *entries])
    return whole + padding(len(whole), alignment)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
