"""The whole model: tokens in, logits out.

One layer is two steps, each added to the residual stream: a mixer, through which tokens see each other, and a
feed-forward network that is dense or routed. Everything else in the package is a function this file calls.
"""

from __future__ import annotations

import os
from collections.abc import Container, Sequence

import numpy as np

from moe_ref.attention import attention
from moe_ref.block import Block, normalise
from moe_ref.config import ModelConfig, load_config
from moe_ref.deltanet import delta_net
from moe_ref.experts import Expert
from moe_ref.feed_forward import Observer, feed_forward
from moe_ref.gguf import GGUFFile
from moe_ref.kv import Cache
from moe_ref.kv_types import kept_as
from moe_ref.layers import Layer
from moe_ref.mla import mla
from moe_ref.rope import scaled_tables
from moe_ref.split import open_model
from moe_ref.tensors import check_tensors, vocab_rows
from moe_ref.weights import DEFAULT_KEEP_BYTES, RoundedWeights, Weights

ACTIVATIONS = {"f32": Weights, "q8": RoundedWeights}  # what is multiplied with a matrix: as it is, or rounded for it


def _ignore(name: str, value: np.ndarray) -> None:
    del name, value


def check_ids(tokens: Sequence[int] | np.ndarray, vocab_size: int, name: str = "tokens") -> np.ndarray:
    """``tokens`` as an int64 array [T]; raises ValueError unless it is a non-empty list of ids of the vocabulary."""
    ids = np.asarray(tokens)
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected a non-empty list of ids, found {ids.dtype} of shape {list(ids.shape)}")
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if len(wrong):
        raise ValueError(f"{name}: id {wrong[0]} is outside the vocabulary 0..{vocab_size - 1}")
    return ids.astype(np.int64)


def divisors(c: ModelConfig, layer: Layer, names: Container[str]) -> str | None:
    """The tensor that a layer's rotary frequencies are divided by; longrope has one for contexts beyond training's."""
    assert layer.rope is not None
    is_long = c.context_length > layer.rope.original_context_length
    for name in ("rope_freqs.weight", f"rope_factors_{'long' if is_long else 'short'}.weight"):
        if name in names and not (name == "rope_freqs.weight" and layer.window and not layer.chunked):
            return name
    return None


class Model:
    """A model read from a GGUF file; weights are decoded when first needed.

    ``observe(name, array)`` is told each layer's ``l_out-N`` [T, D] (residual stream after layer N),
    ``ffn_moe_logits-N`` [T, E], ``ffn_moe_topk-N`` and ``ffn_moe_weights-N`` [T, k], under llama.cpp's names for them.

    ``act`` "q8" multiplies as llama.cpp's CPU kernels do, with activations rounded for each matrix (quants/dots.py);
    ``cache_type_k`` and ``cache_type_v`` are those of keys and values (kv_types.py). All float32 by default.
    Raises GGUFError, ConfigError or FormatError for a file that cannot be run, ValueError for an option's value.
    """

    absorb_mla = True  # how multi-head latent attention is computed (mla.py); the result is the same

    def __init__(
        self,
        file: GGUFFile | str | os.PathLike,
        dtype=np.float32,
        keep_bytes: int = DEFAULT_KEEP_BYTES,
        *,
        act: str = "f32",
        cache_type_k: str = "f32",
        cache_type_v: str = "f32",
    ):
        if act not in ACTIVATIONS:
            raise ValueError(f"--act: {act!r} is no rounding of activations; accepted: {', '.join(ACTIVATIONS)}")
        self.file = file if isinstance(file, GGUFFile) else open_model(file)
        try:
            self.config: ModelConfig = load_config(self.file.metadata, vocab_rows(self.file))
            views = check_tensors(self.config, self.file)
            self.kept = kept_as(self.config.layers, cache_type_k, cache_type_v, self._cached_rank(views))
        except BaseException:
            self.file.close()
            raise
        self.weights = ACTIVATIONS[act](self.file, dtype, keep_bytes, views)
        self.dtype = dtype
        self.observe: Observer = _ignore

    def close(self) -> None:
        """Close the file; what is decoded already stays usable."""
        self.file.close()

    def new_cache(self) -> Cache:
        """An empty cache for one sequence."""
        return Cache(self.config.layers, self.kept)

    def forward(self, tokens: Sequence[int] | np.ndarray, cache: Cache) -> np.ndarray:
        """Logits [T, vocab] for ``tokens`` [T], which follow the ``cache.length`` tokens already seen.

        Raises NonFiniteError, with the name of the first weight or result that is NaN or infinite.
        """
        tokens = check_ids(tokens, self.config.vocab_size)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # an error where it counts, not a warning
            return self._forward(tokens, cache)

    def _forward(self, tokens: np.ndarray, cache: Cache) -> np.ndarray:
        c = self.config
        positions = cache.length + np.arange(len(tokens))
        x = self.weights.rows("token_embd.weight", tokens) * self.dtype(c.embedding_scale)  # [T, D]
        for layer in c.layers:
            x = self._layer(Block(c, layer, self.weights), x, positions, cache)
            self.observe(f"l_out-{layer.index}", x)
        cache.advance(len(tokens))
        x = normalise(x, self.weights, "output_norm", c)
        logits = self.weights.linear(x, self.output_name.removesuffix(".weight"))  # [T, D] -> [T, vocab]
        return self._softcapped(logits / self.dtype(c.logit_scale))

    def logits(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Logits [T, vocab] of ``tokens`` [T] as a fresh sequence."""
        return self.forward(tokens, self.new_cache())

    @property
    def output_name(self) -> str:
        """The output head: its own tensor, or the embedding matrix again where the two are tied."""
        return "output.weight" if "output.weight" in self.weights else "token_embd.weight"

    def expert(self, layer: int, index: int) -> Expert:
        """Gate [F, D], up [F, D] and down [D, F] of one routed expert; the others stay as they are on disk."""
        gate, up, down = (f"blk.{layer}.ffn_{name}_exps.weight" for name in ("gate", "up", "down"))
        return self.weights.part(gate, index), self.weights.part(up, index), self.weights.part(down, index)

    def _cached_rank(self, names: Container[str]) -> int:
        """Width of the vector that is cached for all heads; 0 where each head has its own key and value."""
        mla = self.config.mla
        return 0 if mla is None or "blk.0.attn_kv_b.weight" in names else mla.kv_lora_rank

    def _layer(self, block: Block, x: np.ndarray, positions: np.ndarray, cache: Cache) -> np.ndarray:
        c, residual = self.config, self.dtype(self.config.residual_scale)
        y = self._mix(block, block.norm(x, "attn_norm"), positions, cache)
        x = x + residual * (block.norm(y, "post_attention_norm") if c.quirks.post_norms else y)
        y = feed_forward(block, x, self.observe)
        x = x + residual * (block.norm(y, "post_ffw_norm") if c.quirks.post_norms else y)
        return x * block.vector("layer_output_scale.weight") if block.has("layer_output_scale") else x

    def _mix(self, block: Block, x: np.ndarray, positions: np.ndarray, cache: Cache) -> np.ndarray:
        layer = block.layer
        if layer.mixer == "delta":
            return delta_net(block, x, cache)
        kv = cache.kv[layer.index]
        if layer.rope is None:
            return attention(block, x, positions, None, kv)
        name = divisors(self.config, layer, self.weights)
        divisor = self.weights[name].astype(np.float64) if name else 1.0
        rope = scaled_tables(positions, layer.rope, divisor, self.dtype)
        if layer.mixer == "mla":
            return mla(block, x, positions, rope, kv, self.absorb_mla)
        return attention(block, x, positions, rope, kv)

    def _softcapped(self, logits: np.ndarray) -> np.ndarray:
        cap = self.dtype(self.config.final_logit_softcapping)
        return np.tanh(logits / cap) * cap if cap else logits
