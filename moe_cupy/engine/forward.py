"""One forward pass: launches in stream order, one visit to the host per layer to learn the routes.

Per layer: attention, router, then ``ids`` come back to the host, the cache plans, loads start, and the
expert kernels are launched behind the events of their loads. Whatever the next layer's router (run
early on this layer's hidden state) predicts is fetched meanwhile: copies overlap with compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_cupy.cache import Scores
from moe_cupy.device.base import Device
from moe_cupy.engine.experts import ExpertMover, Held
from moe_cupy.engine.weights import DenseWeights, LayerWeights
from moe_cupy.prefetch import Prefetcher
from moe_ref.attention import softmax
from moe_ref.config import ModelConfig
from moe_ref.rope import rope_tables

Groups = dict[int, tuple[np.ndarray, np.ndarray]]  # expert -> (token indices, ranks)
WAIT_EXPERTS = "expert load"
_ONE = np.zeros(1, np.int64)


def group_by_expert(ids: np.ndarray) -> Groups:
    """ids [T, k] -> the tokens and ranks of each expert; for one token in rank order, else by expert id."""
    if len(ids) == 1:
        return {int(e): (_ONE, np.array([r])) for r, e in enumerate(ids[0])}
    groups: Groups = {}
    for expert in np.unique(ids):
        tokens, ranks = np.nonzero(ids == expert)
        groups[int(expert)] = tokens, ranks
    return groups


@dataclass(frozen=True, slots=True)
class Buffers:
    """Activations of a pass over T tokens, in device memory; reused from pass to pass of the same T."""

    x: Any  # [T, D] residual stream
    h: Any  # [T, D] its norm
    q: Any  # [T, H, K]
    k: Any  # [T, G, K]
    v: Any  # [T, G, V]
    mixed: Any  # [T, H, V]
    router: Any  # [T, E]
    ids: Any  # int64 [T, k]
    weights: Any  # [T, k]
    ahead: Any  # int64 [T, k]: the next layer's routes, guessed
    ahead_weights: Any  # [T, k]
    parts: Any  # [T, k, D]


def allocate(device: Device, c: ModelConfig, n_tokens: int) -> Buffers:
    """Buffers for passes over ``n_tokens``."""

    def array(*shape: int, dtype: type = np.float32) -> Any:
        count = int(np.prod(shape))
        return device.alloc(count * np.dtype(dtype).itemsize).view(dtype).reshape(shape)

    t, k = n_tokens, c.expert_used_count
    return Buffers(
        x=array(t, c.embedding_length),
        h=array(t, c.embedding_length),
        q=array(t, c.head_count, c.key_length),
        k=array(t, c.head_count_kv, c.key_length),
        v=array(t, c.head_count_kv, c.value_length),
        mixed=array(t, c.head_count, c.value_length),
        router=array(t, c.expert_count),
        ids=array(t, k, dtype=np.int64),
        weights=array(t, k),
        ahead=array(t, k, dtype=np.int64),
        ahead_weights=array(t, k),
        parts=array(t, k, c.embedding_length),
    )


RouteObserver = Callable[[int, Buffers], None]  # told (layer, buffers whose ids, weights, router, ahead are known)


class Forward:
    """Runs passes over a model whose dense part is resident and whose experts come through ``mover``."""

    def __init__(
        self,
        device: Device,
        config: ModelConfig,
        weights: DenseWeights,
        mover: ExpertMover | None,
        prefetcher: Prefetcher,
    ):
        self.device, self.config, self.weights = device, config, weights
        self.mover, self.prefetcher = mover, prefetcher
        self.stream = device.stream("compute")
        self.observe: RouteObserver | None = None
        self._decode_buffers = allocate(device, config, 1)

    def __call__(self, tokens: np.ndarray, kv: Any, last_only: bool = False) -> np.ndarray:
        """Logits [T, vocab] (or [1, vocab] of the last token) for tokens int64 [T] that follow ``kv.length``."""
        c, b = self.config, self._buffers(len(tokens))
        positions = kv.length + np.arange(len(tokens))
        rope = rope_tables(positions, c.rope_dimension_count, c.rope_freq_base)
        self._launch("embed", table=self.weights.token_embd, ids=tokens, out=b.x)
        for layer, w in enumerate(self.weights.layers):
            self._attention(w, b, kv, layer, rope)
            self._norm(b.x, w.ffn_norm, b.h)
            if w.ffn_gate_inp is None:
                self._launch("ffn_add", x=b.h, gate=w.ffn_gate, up=w.ffn_up, down=w.ffn_down, out=b.x)
            else:
                self._moe(layer, w, b)
        return self._head(b.x[-1:] if last_only else b.x)

    def _buffers(self, n_tokens: int) -> Buffers:
        return self._decode_buffers if n_tokens == 1 else allocate(self.device, self.config, n_tokens)

    def _launch(self, op: str, **buffers: Any) -> None:
        self.device.launch(op, self.stream, **buffers)

    def _norm(self, x: Any, weight: Any, out: Any) -> None:
        self._launch("rms_norm", x=x, weight=weight, epsilon=self.config.norm_epsilon, out=out)

    def _head(self, x: Any) -> np.ndarray:
        w, n_vocab = self.weights, self.config.vocab_size
        logits = self.device.alloc(4 * len(x) * n_vocab).view(np.float32).reshape(len(x), n_vocab)
        self._norm(x, w.output_norm, x)
        self._launch("linear", x=x, w=w.output, out=logits)
        self.stream.record().synchronize()
        return logits

    def _attention(self, w: LayerWeights, b: Buffers, kv: Any, layer: int, rope: tuple[np.ndarray, np.ndarray]) -> None:
        c, n_tokens = self.config, len(b.x)
        self._norm(b.x, w.attn_norm, b.h)
        for matrix, out in ((w.attn_q, b.q), (w.attn_k, b.k), (w.attn_v, b.v)):
            self._launch("linear", x=b.h, w=matrix, out=out.reshape(n_tokens, -1))
        for heads, gain in ((b.q, w.attn_q_norm), (b.k, w.attn_k_norm)):
            if gain is not None:
                self._norm(heads, gain, heads)
            self._launch("rope", x=heads, cos=rope[0], sin=rope[1], style=c.quirks.rope)
        keys, values = kv.layer(layer)
        self._launch("kv_store", cache=keys, new=b.k, position=kv.length)
        self._launch("kv_store", cache=values, new=b.v, position=kv.length)
        self._launch(
            "attention", q=b.q, k=keys, v=values, n_past=kv.length, scale=c.attention_scale, out=b.mixed
        )
        self._launch("linear_add", x=b.mixed.reshape(n_tokens, -1), w=w.attn_output, out=b.x)

    def _route(self, w: LayerWeights, b: Buffers, ids: Any, weights: Any) -> None:
        c = self.config
        self._launch("linear", x=b.h, w=w.ffn_gate_inp, out=b.router)
        self._launch(
            "route",
            logits=b.router,
            scale=c.expert_weights_scale,
            renormalise=c.renormalise,
            ids=ids,
            weights=weights,
        )

    def _moe(self, layer: int, w: LayerWeights, b: Buffers) -> None:
        guess = self.prefetcher.needs_next_router and layer + 1 < len(self.weights.layers)
        if guess:
            ahead = self.weights.layers[layer + 1]
            self._norm(b.x, ahead.ffn_norm, b.h)
            self._route(ahead, b, b.ahead, b.ahead_weights)
            self._norm(b.x, w.ffn_norm, b.h)
        self._route(w, b, b.ids, b.weights)
        self.stream.record().synchronize()  # the routes are on the host now
        if self.observe is not None:
            self.observe(layer, b)
        if self.prefetcher.predicts:
            self.prefetcher.observe(layer, b.ids.tolist())
        is_last = layer + 1 == len(self.weights.layers)
        self._experts(layer, b, [] if is_last else self.prefetcher.predict(b.ahead.tolist() if guess else []))
        self._launch("combine", parts=b.parts, weights=b.weights, out=b.x)

    def _experts(self, layer: int, b: Buffers, expected: Sequence[int]) -> None:
        assert self.mover is not None
        groups = group_by_expert(b.ids)
        waves = self.mover.waves(layer, list(groups))
        held = self.mover.acquire(layer, waves[0], scores=self._scores(layer, b))
        for following in (*waves[1:], None):
            if following is None and expected:
                self.mover.prefetch(layer + 1, expected, {one.key for one in held})
            self._compute(held, groups, b)
            if following is not None:
                held = self.mover.acquire(layer, following, self._keep(layer, held))

    def _scores(self, layer: int, b: Buffers) -> Scores | None:
        """What the router said of a single token, for policies that ask."""
        assert self.mover is not None
        if len(b.ids) > 1 or not self.mover.cache.pool(layer).policy.wants_scores:
            return None
        return Scores(b.weights[0].tolist(), softmax(b.router)[0].tolist())

    def _keep(self, layer: int, held: Sequence[Held]) -> set[int]:
        """What to pin while the next wave loads: this wave, unless the pool has a single slot."""
        assert self.mover is not None
        return {one.key for one in held} if self.mover.cache.pool(layer).slots > 1 else set()

    def _compute(self, held: Sequence[Held], groups: Groups, b: Buffers) -> None:
        assert self.mover is not None
        for one in held:
            if one.ready is not None:
                self.stream.wait(one.ready, WAIT_EXPERTS)
            self._launch("expert", x=b.h, chosen=groups[one.expert], parts=b.parts, **one.matrices)
        self.mover.used(held, self.stream.record())
