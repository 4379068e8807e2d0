"""The whole model: tokens in, logits out.

One layer is two steps, each added to the residual stream: attention, then a feed-forward network
that is dense or routed. Everything else in the package is a function this file calls.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np

from moe_ref.attention import attend
from moe_ref.config import ModelConfig, load_config
from moe_ref.experts import Expert, moe, swiglu
from moe_ref.gguf import GGUFFile, open_gguf
from moe_ref.kv import KVCache
from moe_ref.norm import rms_norm
from moe_ref.rope import apply_rope, rope_tables
from moe_ref.routing import route
from moe_ref.tensors import check_tensors, vocab_rows
from moe_ref.weights import DEFAULT_KEEP_BYTES, Weights

Observer = Callable[[str, np.ndarray], None]


def _ignore(name: str, value: np.ndarray) -> None:
    del name, value


def check_ids(tokens: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    """``tokens`` as an int64 array [T]; raises ValueError unless it is a non-empty list of ids of the vocabulary."""
    ids = np.asarray(tokens)
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
        raise ValueError(f"tokens: expected a non-empty list of ids, found {ids.dtype} of shape {list(ids.shape)}")
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if len(wrong):
        raise ValueError(f"tokens: id {wrong[0]} is outside the vocabulary 0..{vocab_size - 1}")
    return ids.astype(np.int64)


class Model:
    """A model read from a GGUF file; weights are decoded when first needed.

    ``observe(name, array)`` is told each layer's ``l_out-N`` [T, D] (residual stream after layer N),
    ``ffn_moe_topk-N`` [T, k] and ``ffn_moe_weights-N`` [T, k], under llama.cpp's names for them.
    Raises GGUFError, ConfigError or FormatError for a file that cannot be run.
    """

    def __init__(self, file: GGUFFile | str | os.PathLike, dtype=np.float32, keep_bytes: int = DEFAULT_KEEP_BYTES):
        self.file = file if isinstance(file, GGUFFile) else open_gguf(file)
        try:
            self.config: ModelConfig = load_config(self.file.metadata, vocab_rows(self.file))
            check_tensors(self.config, self.file)
        except BaseException:
            self.file.close()
            raise
        self.weights = Weights(self.file, dtype, keep_bytes)
        self.dtype = dtype
        self.observe: Observer = _ignore

    def close(self) -> None:
        """Close the file; what is decoded already stays usable."""
        self.file.close()

    def new_cache(self) -> KVCache:
        """An empty KV cache for one sequence."""
        c = self.config
        return KVCache(c.block_count, c.head_count_kv, c.key_length, c.value_length, self.dtype)

    def forward(self, tokens: Sequence[int] | np.ndarray, cache: KVCache) -> np.ndarray:
        """Logits [T, vocab] for ``tokens`` [T], which follow the ``cache.length`` tokens already seen."""
        tokens = check_ids(tokens, self.config.vocab_size)
        c = self.config
        positions = cache.length + np.arange(len(tokens))
        rope = rope_tables(positions, c.rope_dimension_count, c.rope_freq_base, self.dtype)
        x = self.weights.rows("token_embd.weight", tokens)  # [T, D]
        for layer in range(c.block_count):
            x = x + self._attention(layer, x, cache, rope)
            x = x + self._ffn(layer, x)
            self.observe(f"l_out-{layer}", x)
        cache.advance(len(tokens))
        x = rms_norm(x, self.weights["output_norm.weight"], c.layer_norm_rms_epsilon)
        return x @ self.weights[self.output_name].T  # [T, D] -> [T, vocab]

    def logits(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Logits [T, vocab] of ``tokens`` [T] as a fresh sequence."""
        return self.forward(tokens, self.new_cache())

    @property
    def output_name(self) -> str:
        """The output head: its own tensor, or the embedding matrix again where the two are tied."""
        return "output.weight" if "output.weight" in self.weights else "token_embd.weight"

    def _attention(self, layer: int, x: np.ndarray, cache: KVCache, rope: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        c, w, block = self.config, self.weights, f"blk.{layer}."
        x = rms_norm(x, w[block + "attn_norm.weight"], c.layer_norm_rms_epsilon)
        q = self._heads(x, block + "attn_q", c.head_count)  # [T, H, K]
        k = self._heads(x, block + "attn_k", c.head_count_kv)  # [T, G, K]
        v = (x @ w[block + "attn_v.weight"].T).reshape(len(x), c.head_count_kv, c.value_length)
        q, k = (apply_rope(heads, *rope, c.quirks.rope) for heads in (q, k))
        keys, values = cache.append(layer, k, v)  # [S, G, K], [S, G, V]
        mixed = attend(q, keys, values, c.attention_scale).reshape(len(x), -1)  # [T, H*V]
        return mixed @ w[block + "attn_output.weight"].T

    def _heads(self, x: np.ndarray, name: str, count: int) -> np.ndarray:
        """Project x [T, D] to ``count`` heads [T, count, K], normalised per head where the architecture does."""
        heads = (x @ self.weights[name + ".weight"].T).reshape(len(x), count, self.config.key_length)
        if self.config.quirks.qk_norm == "head":
            heads = rms_norm(heads, self.weights[name + "_norm.weight"], self.config.layer_norm_rms_epsilon)
        return heads

    def _ffn(self, layer: int, x: np.ndarray) -> np.ndarray:
        block = f"blk.{layer}."
        x = rms_norm(x, self.weights[block + "ffn_norm.weight"], self.config.layer_norm_rms_epsilon)
        return self._moe(layer, x) if self.config.quirks.moe else swiglu(x, self._dense(block))

    def _moe(self, layer: int, x: np.ndarray) -> np.ndarray:
        logits = x @ self.weights[f"blk.{layer}.ffn_gate_inp.weight"].T  # [T, D] -> [T, E]
        ids, weights = route(logits, self.config)  # [T, k]
        self.observe(f"ffn_moe_topk-{layer}", ids)
        self.observe(f"ffn_moe_weights-{layer}", weights)
        return moe(x, ids, weights, lambda e: self.expert(layer, e))

    def expert(self, layer: int, index: int) -> Expert:
        """Gate [F, D], up [F, D] and down [D, F] of one routed expert; the others stay as they are on disk."""
        part = self.weights.part
        gate, up, down = (f"blk.{layer}.ffn_{name}_exps.weight" for name in ("gate", "up", "down"))
        return part(gate, index), part(up, index), part(down, index)

    def _dense(self, block: str) -> Expert:
        gate, up, down = (self.weights[f"{block}ffn_{name}.weight"] for name in ("gate", "up", "down"))
        return gate, up, down
