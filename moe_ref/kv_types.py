"""In what types keys and values are kept, and what follows from it, as on llama.cpp's CPU backend.

A key of type f16, q8_0 ... is multiplied with a query rounded as for a matrix of that type. Values are another matter:
half-precision ones meet softmax weights of the same half precision; quantized ones need flash attention, which expands
them and multiplies in float32, and keeps no float32 keys: these become f16 beside them.

Quantized keys and values are rotated first, which spreads an outlier over its neighbours. The matrix (Hadamard's) is
symmetric and orthogonal: turning the queries likewise leaves q.k as it was, and turning the result undoes the values'.

Source: ``llama-kv-cache.cpp``, ``llama-graph.cpp`` and ``ops.cpp`` of llama.cpp 0.5.0-dev, flash attention off where
it can be. (With it, f16 values of short prompts are also summed in half precision: not done here.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_ref.layers import Layer
from moe_ref.quants.activations import round_for, round_to

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
QUANTIZED = ("Q8_0", "Q4_0")
BLOCK, LEAST_ROTATION = 32, 64


@dataclass(frozen=True, slots=True)
class Kept:
    """How a layer keeps keys and values: the type of each, and how many neighbours are rotated together (0: none)."""

    key: str = "F32"
    value: str = "F32"
    key_rotation: int = 0
    value_rotation: int = 0

    def as_key(self, k: np.ndarray) -> np.ndarray:
        """What keys [T, G, K] are in the cache."""
        return round_to(rotated(k, self.key_rotation), self.key)

    def as_value(self, v: np.ndarray) -> np.ndarray:
        """What values [T, G, V] are in the cache."""
        return round_to(rotated(v, self.value_rotation), self.value)

    def as_query(self, q: np.ndarray) -> np.ndarray:
        """What queries [T, H, K] are when they meet these keys."""
        return round_for(rotated(q, self.key_rotation), self.key)

    def as_share(self, share: np.ndarray) -> np.ndarray:
        """What softmax weights [..., S] are when they meet these values."""
        return share if self.value in QUANTIZED else round_for(share, self.value)

    def as_mixed(self, mixed: np.ndarray) -> np.ndarray:
        """What the mixed values [T, H, V] are when they leave."""
        return rotated(mixed, self.value_rotation)


FLOAT32 = Kept()


def rotated(x: np.ndarray, count: int) -> np.ndarray:
    """Each run of ``count`` numbers (a power of two) of x [..., n] times the orthonormal Walsh-Hadamard matrix."""
    if not count:
        return x
    y, length = x.reshape(-1, count) * x.dtype.type(count**-0.5), 1
    while length < count:  # sums and differences of neighbours, then of pairs, ...
        pairs = y.reshape(len(y), -1, 2, length)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        y, length = np.stack([first + second, first - second], axis=2).reshape(-1, count), 2 * length
    return y.reshape(x.shape)


def kept_as(layers: Sequence[Layer], key: str, value: str, rank: int = 0) -> list[Kept]:
    """How each layer keeps its keys and values, for types of CACHE_TYPES.

    ``rank``: width of the vector that serves as both, where latent attention caches it; else 0. Raises ValueError for
    an unknown type, for two types where there is one vector, and where quantized blocks do not divide a head.
    """
    for flag, kind in (("-ctk, --cache-type-k", key), ("-ctv, --cache-type-v", value)):
        if kind not in CACHE_TYPES:
            raise ValueError(f"{flag}: {kind!r} is no type of the KV cache; accepted: {', '.join(CACHE_TYPES)}")
    if rank and key != value:
        raise ValueError(f"-ctk {key} -ctv {value}: this model caches one vector as both; give both the same type")
    key, value = key.upper(), value.upper()
    if value in QUANTIZED and key == "F32":
        key = "F16"
    return [_kept(layers, layer, key, value, rank) for layer in layers]


def _kept(layers: Sequence[Layer], layer: Layer, key: str, value: str, rank: int) -> Kept:
    if rank:
        assert layer.rope is not None
        _check_blocks(layer, "k", key, rank + layer.rope.n_rot)
        _check_blocks(layer, "v", value, rank)
        return Kept(key, value)
    _check_blocks(layer, "k", key, layer.key_length)
    _check_blocks(layer, "v", value, layer.value_length)
    together = [other for other in layers if bool(other.window) == bool(layer.window)]  # llama.cpp: one cache
    by_key = _may_rotate(key, layers[0].key_length, {other.key_length for other in together})
    by_value = _may_rotate(value, layers[0].value_length, {other.value_length for other in together})
    largest = layer.key_length & -layer.key_length  # power of two that divides it
    return Kept(key, value, largest if by_key else 0, LEAST_ROTATION if by_value else 0)


def _check_blocks(layer: Layer, letter: str, kind: str, width: int) -> None:
    if kind in QUANTIZED and width % BLOCK:
        raise ValueError(
            f"-ct{letter} {kind.lower()}: its blocks of {BLOCK} do not divide the {width} numbers that layer "
            f"{layer.index} caches of a head; use f16 or f32"
        )


def _may_rotate(kind: str, first: int, widths: set[int]) -> bool:
    """llama.cpp's rule: quantized, one width in all layers of a cache, and whole runs (also in the first layer)."""
    return kind in QUANTIZED and len(widths) == 1 and not any(width % LEAST_ROTATION for width in (first, *widths))
