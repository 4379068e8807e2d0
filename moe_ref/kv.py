"""The cache: what earlier tokens left behind, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_ref.finite import check_finite
from moe_ref.kv_types import FLOAT32, Kept
from moe_ref.layers import Layer

Seen = tuple[np.ndarray, np.ndarray, np.ndarray]  # keys [S, G, K], values [S, G, V], their positions [S]


class KV:
    """Keys and values of one layer; a layer with a window keeps only what a later token can still see.

    Arrays grow by doubling, so memory follows the tokens seen, not the context the header promises. They hold
    what the types of ``kept`` can express, still as floats.
    """

    def __init__(self, window: int = 0, chunked: bool = False, kept: Kept = FLOAT32, layer: int = 0):
        self.window, self.chunked, self.kept, self.layer = window, chunked, kept, layer
        self.first = 0  # position of the first row kept
        self._arrays: list[np.ndarray] = []

    def append(self, k: np.ndarray, v: np.ndarray, position: int) -> Seen:
        """Store k [T, G, K] and v [T, G, V] at ``position``..; return all that the new tokens may see.

        Raises NonFiniteError where one of them is too large for the type that it is kept in.
        """
        k = check_finite(self.kept.as_key(k), f"keys of layer {self.layer} as {self.kept.key}", "use -ctk f32")
        v = check_finite(self.kept.as_value(v), f"values of layer {self.layer} as {self.kept.value}", "use -ctv f32")
        self._forget_before(position)
        if not self._arrays:
            self._arrays = [np.empty((0, *new.shape[1:]), new.dtype) for new in (k, v)]
        start, end = position - self.first, position - self.first + len(k)
        for i, new in enumerate((k, v)):
            if end > len(self._arrays[i]):
                grown = np.empty((max(end, 2 * len(self._arrays[i])), *new.shape[1:]), new.dtype)
                grown[:start] = self._arrays[i][:start]
                self._arrays[i] = grown
            self._arrays[i][start:end] = new
        keys, values = self._arrays
        return keys[:end], values[:end], self.first + np.arange(end)

    def _forget_before(self, position: int) -> None:
        """Drop what neither the token at ``position`` nor a later one sees."""
        if not self.window or not self._arrays:
            return
        oldest = position // self.window * self.window if self.chunked else position - self.window + 1
        if oldest > self.first:
            self._arrays = [a[oldest - self.first : position - self.first].copy() for a in self._arrays]
            self.first = oldest


class Cache:
    """One sequence: its length, and for each layer its keys and values or, in a recurrent layer, its state."""

    def __init__(self, layers: Sequence[Layer], kept: Sequence[Kept]):
        self.length = 0
        self.kv = [KV(one.window, one.chunked, how, one.index) for one, how in zip(layers, kept, strict=True)]
        self.state: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # recurrent layer -> last inputs, matrix

    def advance(self, n_tokens: int) -> None:
        """Move on after all layers have stored their part of ``n_tokens`` tokens."""
        self.length += n_tokens
