"""The key/value cache: what earlier tokens left behind for attention."""

from __future__ import annotations

import numpy as np


class KVCache:
    """Keys and values of every layer for positions 0..length-1.

    Arrays grow by doubling, so memory follows the tokens seen, not the context the header promises.
    """

    def __init__(self, block_count: int, head_count_kv: int, key_length: int, value_length: int, dtype=np.float32):
        self.length = 0
        self._k = [np.empty((0, head_count_kv, key_length), dtype) for _ in range(block_count)]
        self._v = [np.empty((0, head_count_kv, value_length), dtype) for _ in range(block_count)]

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Store k [T, G, K] and v [T, G, V] of one layer at ``length``; return all of it, [S, G, K] and [S, G, V]."""
        end = self.length + len(k)
        for store, new in ((self._k, k), (self._v, v)):
            if end > len(store[layer]):
                grown = np.empty((max(end, 2 * len(store[layer])), *new.shape[1:]), store[layer].dtype)
                grown[: self.length] = store[layer][: self.length]
                store[layer] = grown
            store[layer][self.length : end] = new
        return self._k[layer][:end], self._v[layer][:end]

    def advance(self, n_tokens: int) -> None:
        """Move on after all layers have stored their part of ``n_tokens`` tokens."""
        self.length += n_tokens
