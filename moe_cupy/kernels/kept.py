"""What a cache of keys and values holds, by the type of its items; whole blocks of quantized types lie side by side."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_ref.quants import dequantize, quantize

# Name on the command line -> (type of the items, format, numbers of a block, items of a block).
CACHES: dict[str, tuple[Any, str, int, int]] = {
    "f32": (np.float32, "F32", 1, 1),
    "f16": (np.float16, "F16", 1, 1),
    "bf16": (np.uint16, "BF16", 1, 1),
    "q8_0": (np.uint8, "Q8_0", 32, 34),
    "q4_0": (np.int8, "Q4_0", 32, 18),
}
_BY_ITEMS = {np.dtype(items).name: (kind, numbers, size) for items, kind, numbers, size in CACHES.values()}


def format_of(cache: Any) -> str:
    """Its format as tensors' formats are called, such as "Q8_0"."""
    return _BY_ITEMS[str(cache.dtype)][0]


def numbers_in(items: int, cache: Any) -> int:
    """How many numbers so many items of the cache are."""
    _, numbers, size = _BY_ITEMS[str(cache.dtype)]
    return items // size * numbers


def stored(new: np.ndarray, cache: np.ndarray) -> np.ndarray:
    """float32 [..., n] as items of the cache; the bytes are ggml's."""
    if cache.dtype.kind == "f":
        return new
    return quantize(new, format_of(cache)).view(cache.dtype)


def store(rows: np.ndarray, new: np.ndarray) -> None:
    """rows = new, rounded to the cache's type; rows [T, G, items of K], new float32 [T, G, K].

    What is not finite, or too large for the type, is NaN there: a score of minus infinity would hide it.
    """
    rows[...] = stored(new, rows)
    if rows.dtype.kind == "f":
        rows += rows - rows
    elif rows.dtype == np.uint16:
        rows[rows & 0x7F80 == 0x7F80] = 0x7FC0
    else:
        size = next(size for items, _, _, size in CACHES.values() if np.dtype(items) == rows.dtype)
        scales = rows.view(np.uint8).reshape(-1, size)[:, :2]
        wrong = scales[:, 1] & 0x7C == 0x7C
        if wrong.any():
            scales[wrong] = 0, 0x7E


def numbers_of(cache: np.ndarray) -> np.ndarray:
    """A cache [..., items] as float32 [..., n]; one of numbers of another width as it is."""
    if cache.dtype.kind == "f":
        return cache
    shape = (*cache.shape[:-1], numbers_in(cache.shape[-1], cache))
    return dequantize(np.ascontiguousarray(cache).view(np.uint8), format_of(cache), shape)
