"""GGUF files: metadata and the tensor directory, every number checked against the file before it is believed.

The header is read through a small window, tensors and metadata arrays only when asked for, all by positional reads
(no mmap: a file cut short behind our back is an error message, not SIGBUS). Layout of versions 2 and 3, little-endian:

    "GGUF"  version u32  tensor_count u64  metadata_kv_count u64
    per key:     key string, value type u32, value   (string: length u64, UTF-8; array: type u32, count u64, elements)
    per tensor:  name string, n_dims u32, ne u64 x n_dims (fastest axis first), type u32, offset u64
    padding to `general.alignment`, then the tensors; their offsets count from here

Source: docs/gguf.md of ggml; refusals follow ggml's gguf.cpp where that is stricter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from struct import Struct
from typing import Any

import numpy as np

from moe_ref.gguf_bytes import MAX_TEXT_BYTES, U32, U64, Cursor, GGUFError, Source, show
from moe_ref.quants.types import BY_ID

__all__ = ["GGUFArray", "GGUFError", "GGUFFile", "TensorInfo", "open_gguf"]

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
MAX_KEYS = 16_384  # of one header, as MAX_TENSORS: published models stay below 100 keys and 3,000 tensors
MAX_TENSORS = 32_768  # both keep the worst header under a second; further caps in gguf_bytes.py
MAX_DIMS = 4

_TYPE_NAMES = "UINT8 INT8 UINT16 INT16 UINT32 INT32 FLOAT32 BOOL STRING ARRAY UINT64 INT64 FLOAT64".split()
_FORMATS = dict(zip([n for n in _TYPE_NAMES if n not in ("STRING", "ARRAY")], "BbHhIifBQqd", strict=True))
_SCALARS = {name: Struct("<" + code) for name, code in _FORMATS.items()}
_ARRAY_HEAD = Struct("<IQ")  # element type, count
_TENSOR_TAILS = {n: Struct(f"<{n}QIQ") for n in range(1, MAX_DIMS + 1)}  # ne, type, offset
_MIN_KEY_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies; ``shape`` is in NumPy order, ``offset`` in bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


class GGUFArray(Sequence[Any]):
    """An array of metadata, read from the file at the first access to an element and kept.

    Elements come as Python numbers, bools or strings, a slice as a list. An access raises GGUFError naming the key when
    the file cannot be read, a string is not UTF-8 or a bool is neither 0 nor 1; IndexError as for a list.
    """

    def __init__(self, source: Source, key: str, element_type: str, span: tuple[int, int], marks: Sequence[int]):
        self.element_type = element_type
        self._source, self._key, self._span = source, key, span  # span: offset, nbytes
        self._marks = marks  # where each string's length lies in the span, and the end; of numbers, a plain range
        self._items: np.ndarray | memoryview | None = None

    def __len__(self) -> int:
        return len(self._marks) - 1

    def __getitem__(self, index: Any) -> Any:
        items = self._load()
        if isinstance(items, np.ndarray):
            return items[index].tolist()
        which = range(len(self))[index]
        return [self._string(items, i) for i in which] if isinstance(which, range) else self._string(items, which)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tolist())

    def __repr__(self) -> str:
        return f"GGUFArray({self._key!r}, {self.element_type}, {len(self)} elements)"

    def tolist(self) -> list[Any]:
        return list(self[:])

    def _load(self) -> np.ndarray | memoryview:
        if self._items is None:
            raw = self._source.read(*self._span, show(self._key))
            self._items = raw.data if self.element_type == "STRING" else self._numbers(raw)
        return self._items

    def _numbers(self, raw: np.ndarray) -> np.ndarray:
        if self.element_type != "BOOL":
            return raw.view(np.dtype("<" + _FORMATS[self.element_type]))
        if (raw > 1).any():
            at = int(np.argmax(raw > 1))
            raise self._source.fault(f"{show(self._key)}[{at}]", f"the bool {raw[at]}", "0 or 1")
        return raw.view(np.bool_)

    def _string(self, raw: memoryview, i: int) -> str:
        try:
            return str(raw[self._marks[i] + 8 : self._marks[i + 1]], "utf-8")
        except UnicodeDecodeError as error:
            raise self._source.fault(f"{show(self._key)}[{i}]", f"a string with {error}", "UTF-8") from error


class GGUFFile:
    """An open GGUF file; close it, or use it as a context manager. Reads are safe from several threads."""

    is_whole = False  # whether a file that says it is one part of several stands for all of them

    def __init__(self, source: Source, version: int, metadata: dict[str, Any]):
        self.path, self.version, self.metadata = source.path, version, metadata
        self.alignment: int = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
        self.data_offset = 0
        self.tensors: dict[str, TensorInfo] = {}
        self._source = source
        self._spans: dict[str, tuple[int, int]] = {}

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(key, default)

    def value_bytes(self, key: str) -> bytes:
        """A metadata value as it lies in the file: type id, then value. Raises KeyError for an unknown key."""
        return self._source.read(*self._spans[key], show(key)).tobytes()

    def read(self, name: str, start: int = 0, nbytes: int | None = None) -> np.ndarray:
        """Raw bytes ``start : start + nbytes`` of a tensor (default: to its end) as a new uint8 array.

        Raises GGUFError naming the tensor if it is unknown, the range outside it, or the file closed, unreadable or
        shorter than when it was opened.
        """
        field, info = f"tensor {show(name)}", self.tensors.get(name)
        if info is None:
            raise self._source.fault(field, "no such tensor", f"the {len(self.tensors)} names in .tensors", "check it")
        wanted = info.nbytes - start if nbytes is None else nbytes
        if start < 0 or wanted < 0 or start + wanted > info.nbytes:
            found = f"a read of {wanted} bytes from byte {start}"
            raise self._source.fault(field, found, f"ranges in its {info.nbytes} bytes", "correct the range")
        return self._source.read(info.offset + start, wanted, field)

    def close(self) -> None:
        self._source.file.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file and parse its header; raises GGUFError, and nothing else, for one that is missing or wrong."""
    source = Source(path)
    try:
        return _read_header(Cursor(source))
    except BaseException:
        source.file.close()
        raise


def _read_header(cursor: Cursor) -> GGUFFile:
    version = _read_version(cursor)
    n_tensors = _read_count(cursor, "tensor_count", MAX_TENSORS, _MIN_TENSOR_BYTES)
    n_keys = _read_count(cursor, "metadata_kv_count", MAX_KEYS, _MIN_KEY_BYTES)
    metadata, spans = _read_metadata(cursor, n_keys)
    gguf = GGUFFile(cursor.source, version, metadata)
    gguf._spans = spans
    if gguf.alignment.bit_count() != 1:
        raise cursor.source.fault(ALIGNMENT_KEY, gguf.alignment, "a power of two")
    entries = [_read_tensor(cursor, f"tensor {i + 1} of {n_tensors}") for i in range(n_tensors)]
    gguf.data_offset = -(-cursor.pos // gguf.alignment) * gguf.alignment
    _place_tensors(gguf, cursor.source, entries)
    return gguf


def _read_version(cursor: Cursor) -> int:
    cursor.field = "magic"
    magic = bytes(cursor.take(4))
    if magic != b"GGUF":
        lfs = magic == b"vers"  # "version https://git-lfs..."
        remedy = "this is a Git LFS pointer: fetch the file itself" if lfs else "convert the model to GGUF"
        raise cursor.fault(magic, b"GGUF", remedy)
    cursor.field = "version"
    version: int = cursor.unpack(U32)[0]
    if version in VERSIONS:
        return version
    if int.from_bytes(version.to_bytes(4, "big"), "little") <= 0xFFFF and version:
        raise cursor.fault(f"{version:#010x}, a big-endian file", "little-endian", "run gguf_convert_endian little")
    raise cursor.fault(version, "2 or 3", "convert the model again with a current llama.cpp")


def _read_count(cursor: Cursor, field: str, cap: int, min_bytes: int) -> int:
    """A count of entries of at least ``min_bytes`` each, which must leave room for them in the file."""
    cursor.field = field
    count: int = cursor.unpack(U64)[0]
    room = (cursor.limit - cursor.pos) // min_bytes
    if count > min(cap, room):
        raise cursor.fault(count, f"at most {min(cap, room)} in a file of {cursor.source.size} bytes")
    return count


def _read_metadata(cursor: Cursor, count: int) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """Values, and where they lie: offset and byte count."""
    metadata: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for i in range(count):
        cursor.field = f"metadata key {i + 1} of {count}"
        key = cursor.name()
        cursor.field = show(key)
        if key in metadata:
            raise cursor.fault("this key a second time", "each key once")
        start = cursor.pos
        metadata[key] = _read_value(cursor, key)
        spans[key] = start, cursor.pos - start
    return metadata, spans


def _read_value(cursor: Cursor, key: str) -> Any:
    kind = _type_name(cursor.unpack(U32)[0])
    if key == ALIGNMENT_KEY and kind != "UINT32":
        raise cursor.fault(f"a value of type {kind}", "UINT32")
    if kind == "STRING":
        return cursor.text(MAX_TEXT_BYTES)
    if kind == "ARRAY":
        return _read_array(cursor, key)
    if kind not in _SCALARS:
        raise cursor.fault(f"a value of type {kind}", f"types 0 to {len(_TYPE_NAMES) - 1}")
    value = cursor.unpack(_SCALARS[kind])[0]
    if kind != "BOOL":
        return value
    if value > 1:
        raise cursor.fault(f"the bool {value}", "0 or 1")
    return bool(value)


def _read_array(cursor: Cursor, key: str) -> GGUFArray:
    type_id, count = cursor.unpack(_ARRAY_HEAD)
    kind, start = _type_name(type_id), cursor.pos
    if kind != "STRING" and kind not in _SCALARS:
        raise cursor.fault(f"an array of {kind}", "arrays of scalars or strings, not nested (as in ggml)")
    cursor.count_items(count, strings=kind == "STRING")
    if kind == "STRING":
        marks: Sequence[int] = cursor.skip_strings(count)
    else:
        cursor.skip(count * _SCALARS[kind].size)
        marks = range(count + 1)
    return GGUFArray(cursor.source, key, kind, (start, cursor.pos - start), marks)


def _read_tensor(cursor: Cursor, which: str) -> TensorInfo:
    """One entry of the directory, its offset still counted from the data section."""
    cursor.field = which
    name = cursor.name()
    cursor.field = f"tensor {show(name)}"
    n_dims = cursor.unpack(U32)[0]
    if n_dims not in _TENSOR_TAILS:
        raise cursor.fault(f"{n_dims} dimensions", f"1 to {MAX_DIMS}")
    *ne, type_id, offset = cursor.unpack(_TENSOR_TAILS[n_dims])
    if type_id not in BY_ID:
        known = ", ".join(f"{t.name} ({i})" for i, t in BY_ID.items())
        raise cursor.fault(f"type id {type_id}", known, "requantise it, or update moe-offload")
    kind, shape = BY_ID[type_id], tuple(reversed(ne))
    if not all(shape):
        raise cursor.fault(f"shape {shape}", "dimensions of at least 1")
    if ne[0] % kind.block_elements:
        raise cursor.fault(f"{kind.name} rows of {ne[0]} elements", f"multiples of {kind.block_elements}")
    return TensorInfo(name, shape, kind.name, offset, kind.row_bytes(ne[0]) * prod(ne[1:]))


def _place_tensors(gguf: GGUFFile, source: Source, entries: list[TensorInfo]) -> None:
    """Fill ``gguf.tensors``: names once each, inside the file, aligned, no two sharing a byte."""
    room = max(source.size - gguf.data_offset, 0)
    for e in entries:
        field = f"tensor {show(e.name)}"
        if e.name in gguf.tensors:
            raise source.fault(field, "this name a second time", "each name once")
        if e.offset % gguf.alignment:
            raise source.fault(field, f"offset {e.offset}", f"multiples of {ALIGNMENT_KEY} = {gguf.alignment}")
        if e.offset + e.nbytes > room:
            raise source.fault(field, f"{e.nbytes} bytes at offset {e.offset}", f"ranges in {room} bytes of data")
        gguf.tensors[e.name] = TensorInfo(e.name, e.shape, e.type, gguf.data_offset + e.offset, e.nbytes)
    for low, high in pairwise(sorted(gguf.tensors.values(), key=lambda t: t.offset)):
        if low.offset + low.nbytes > high.offset:
            found = f"offset {high.offset} inside tensor {show(low.name)}, which ends at {low.offset + low.nbytes}"
            raise source.fault(f"tensor {show(high.name)}", found, "tensors that do not overlap")


def _type_name(type_id: int) -> str:
    return _TYPE_NAMES[type_id] if type_id < len(_TYPE_NAMES) else f"unknown type {type_id}"
