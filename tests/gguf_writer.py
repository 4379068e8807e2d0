"""A GGUF writer for tests: little-endian, no padding tricks, nothing checked, so that it can also write wrong files."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_ref.quants.types import BY_NAME

_NUMBERS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
TYPE_IDS = {np.dtype(code): i for i, code in _NUMBERS.items()}
STRING, ARRAY = 8, 9
Tensors = Mapping[str, tuple[str, tuple[int, ...], bytes]]  # name: type name, shape in NumPy order, its bytes


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def number(value: Any) -> np.ndarray:
    """Python int: u32, i32, u64 or i64, the first that holds it; float: f32; NumPy values keep their dtype."""
    if isinstance(value, np.generic | np.ndarray):
        return np.asarray(value)
    items = value if isinstance(value, list) else [value]
    if not items or isinstance(items[0], float):
        return np.asarray(value, "f4")
    if isinstance(items[0], bool):
        return np.asarray(value, "?")
    bounds = {code: np.iinfo(code) for code in ("u4", "i4", "u8", "i8")}
    return np.asarray(value, next(c for c, b in bounds.items() if b.min <= min(items) and max(items) <= b.max))


def value_bytes(value: Any) -> bytes:
    """Type id and value; a list or array becomes an ARRAY of the type of its elements."""
    if isinstance(value, str | bytes):
        return struct.pack("<I", STRING) + string(value)
    if isinstance(value, list) and value and isinstance(value[0], str | bytes):
        return array_head(STRING, len(value)) + b"".join(map(string, value))
    array = number(value)
    head = array_head(TYPE_IDS[array.dtype], array.size) if array.ndim else b""
    return (head or struct.pack("<I", TYPE_IDS[array.dtype])) + array.astype(array.dtype.newbyteorder("<")).tobytes()


def tensor_entry(name: str | bytes, type_id: int, shape: tuple[int, ...], offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), type_id, offset)


def padded(raw: bytes, alignment: int) -> bytes:
    return raw + bytes(-len(raw) % alignment)


def gguf_bytes(
    metadata: Mapping[str, Any],
    tensors: Tensors,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    if alignment != 32:
        metadata = {"general.alignment": alignment, **metadata}
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    header += b"".join(string(key) + value_bytes(value) for key, value in metadata.items())
    data = b""
    for name, (type_name, shape, raw) in tensors.items():
        header += tensor_entry(name, BY_NAME[type_name].id, shape, len(data))
        data += padded(raw, alignment)
    return padded(header, alignment) + data


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Tensors,
    version: int = 3,
    alignment: int = 32,
) -> Path:
    """Write a file and return its path; shapes in NumPy order, bytes already in the tensor's block format."""
    path = Path(path)
    path.write_bytes(gguf_bytes(metadata, tensors, version, alignment))
    return path


def header(*, version: int = 3, tensors: int = 0, keys: int = 0, body: bytes = b"", data: int = 0) -> bytes:
    """A header with counts that need not fit its body, and ``data`` zero bytes after it."""
    return padded(b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body, 32) + bytes(data)


def array_head(element_type: int, count: int) -> bytes:
    return struct.pack("<IIQ", ARRAY, element_type, count)


def with_key(value: bytes, key: str | bytes = "some.key") -> bytes:
    return header(keys=1, body=string(key) + value, data=64)


def with_tensors(*entries: tuple[str | bytes, int, tuple[int, ...], int], data: int = 256) -> bytes:
    """Entries are name, type id, shape in NumPy order, offset in the data section."""
    return header(tensors=len(entries), body=b"".join(tensor_entry(*e) for e in entries), data=data)


def published_size(n_tensors: int = 500, n_tokens: int = 150_000, n_merges: int = 150_000) -> bytes:
    """A header as large as those of published models, its tensors 1 KiB each; to be padded to a file of any size."""
    metadata: dict[str, Any] = {"tokenizer.ggml.tokens": [f"token{i}" for i in range(n_tokens)]}
    metadata["tokenizer.ggml.merges"] = [f"tok en{i}" for i in range(n_merges)]
    metadata["tokenizer.ggml.token_type"] = np.ones(n_tokens, np.int32)
    entries = (tensor_entry(f"blk.{i}.ffn_up_exps.weight", 0, (256,), 1024 * i) for i in range(n_tensors))
    body = b"".join(string(key) + value_bytes(value) for key, value in metadata.items()) + b"".join(entries)
    return header(tensors=n_tensors, keys=len(metadata), body=body)


SAMPLE_METADATA: dict[str, Any] = {
    "general.architecture": "tiny",
    "general.alignment": 64,
    **{f"number.{np.dtype(c).name}": np.dtype(c).type(3) for c in "bBhHiIqQfd"},
    "flag": True,
    "tokens": ["<s>", "", "é", "日本語", "x" * 300],
    "merges": ["a b", "b c"],
    "scores": [0.5, -1.25, 3.0],
    "types": np.array([1, -2, 3], np.int16),
    "flags": [True, False, True],
    "none": [],
}
SAMPLE_TENSORS = {
    "token_embd.weight": ("F32", (4, 8), bytes(range(128))),
    "blk.0.ffn_up_exps.weight": ("Q4_K", (2, 2, 256), bytes(i % 251 for i in range(576))),
    "blk.0.ffn_norm.weight": ("F16", (32,), bytes(64)),
}
SAMPLE = gguf_bytes(SAMPLE_METADATA, SAMPLE_TENSORS, alignment=64)
