"""One forward pass: launches in stream order, one visit to the host per layer to learn the routes.

Per layer: attention, router, then ``ids`` come back to the host, the cache plans, loads start, and the
expert kernels are launched behind the events of their loads. Whatever the next layer's router (run
early on this layer's hidden state) predicts is fetched meanwhile: copies overlap with compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from moe_cupy.cache import Scores
from moe_cupy.device.base import Device
from moe_cupy.engine import networks
from moe_cupy.engine.block import Block, Pass, Scratch
from moe_cupy.engine.choosing import Offer
from moe_cupy.engine.experts import ExpertMover, Held
from moe_cupy.engine.mixers import MIXERS
from moe_cupy.engine.recording import Recorder, Unrecorded
from moe_cupy.engine.weights import DenseWeights
from moe_cupy.engine.whole import Whole
from moe_cupy.prefetch import Prefetcher
from moe_cupy.store import MATRICES
from moe_ref.attention import softmax, temperature
from moe_ref.config import ModelConfig
from moe_ref.model import divisors
from moe_ref.quants import dequantize
from moe_ref.rope import Rope, scaled_tables

WAIT_EXPERTS = "expert load"
NOTHING = np.empty((0, 0), np.float32)


def distinct(ids: np.ndarray) -> list[int]:
    """The experts in ids [T, k]; of one token in rank order, else by id."""
    return ids[0].tolist() if len(ids) == 1 else np.unique(ids).tolist()


def _guessed(block: Block) -> Any:
    """Ids [T, k] if a layer's router saw the residual stream as it is before the layer's turn."""
    return networks.route(block, networks.router_logits(block, "ahead ")[1], "ahead ")[0]


def _scaled(block: Block) -> None:
    """What a layer puts out, times its scale."""
    block.launch("scale", x=block.run.x, factor=float(block.weights.scales["layer_output_scale"][0]))


class Routes(NamedTuple):
    """What a layer's router said of T tokens."""

    ids: np.ndarray  # int32 [T, k], best first
    weights: np.ndarray  # [T, k]
    router: np.ndarray  # logits [T, E]
    ahead: np.ndarray | None = None  # int32 [T, k]: the next layer's router on the stream before this layer's experts


RouteObserver = Callable[[int, Routes], None]  # told (layer, routes), in memory that the next layer reuses


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
        self.progress: Callable[[int], object] | None = None  # given the number of tokens that passed a layer
        self._launch: Callable[..., None] = partial(device.launch, stream=self.stream)
        self._decode_scratch = Scratch(device, self.stream, stays=True)
        self._again: Recorder | Unrecorded = Recorder(device, self.stream)
        self._whole = Whole(device, self._again, mover, [layer.is_moe for layer in config.layers])
        self._rotations = self._distinct_rotations()

    def __call__(self, tokens: np.ndarray, kv: Any, last_only: bool = False) -> np.ndarray:
        """Logits [T, vocab] (or [1, vocab] of the last token) for tokens int64 [T] that follow ``kv.length``."""
        return self._fetched_logits(self._launched(tokens, kv, last_only))

    def largest(self, tokens: np.ndarray, kv: Any, count: int) -> Offer:
        """The ``count`` largest logits of the last token; the others stay on the device."""
        return self._best(self._launched(tokens, kv, True), count)

    @contextmanager
    def each_launch(self, watch: Callable[[Callable[..., None]], Callable[..., None]]) -> Iterator[None]:
        """Meanwhile passes launch op by op, by ``watch(launch)``, whatever has been recorded."""
        before = self._launch, self._again
        self._launch, self._again = watch(self._launch), Unrecorded()
        try:
            yield
        finally:
            self._launch, self._again = before

    def _best(self, logits: Any, count: int) -> Offer:
        """The ``count`` largest of logits [1, vocab] in device memory.

        All of them if one of the largest is not finite, as a NaN makes it: whoever chooses has to see that.
        """
        values, ids = self._decode_scratch("best", 1, count), self._decode_scratch("best ids", 1, count, dtype=np.int32)
        self._launch("top_k", logits=logits, values=values, ids=ids)
        best, which = (self.device.fetch(name, a, self.stream) for name, a in (("best", values), ("best ids", ids)))
        self.stream.record().synchronize()
        if not np.isfinite(best).all():
            return Offer(self._fetched_logits(logits)[0])
        return Offer(best[0].copy(), which[0].copy())

    def _launched(self, tokens: np.ndarray, kv: Any, last_only: bool) -> Any:
        """Logits in device memory, once the stream has come there."""
        return self._pass(self._begin(tokens, kv), last_only)

    def _pass(self, run: Pass, last_only: bool, resumed_at: int = -1) -> Any:
        """All launches of a pass: logits [T or 1, vocab] in device memory; or those from a layer's experts on."""
        whole = self._whole.over(run.kv) if self._is_free(run) and resumed_at < 0 else None
        layers, index = list(zip(self.config.layers, self.weights.layers, strict=True)), max(0, resumed_at)
        while index < len(layers):
            begun = "mix" if index == resumed_at else ""
            if whole is not None:
                index, routed = whole(index, run.kv.length)
                begun = "route" if routed else ""
            if index < len(layers):
                self._layer(Block(run, *layers[index]), begun)
            index += 1
        return self._head(run, run.x[-1:] if last_only else run.x)

    def _is_free(self, run: Pass) -> bool:
        """Whether nobody on the host wants to know of a layer before the token is done."""
        watched = self.observe is not None or self.prefetcher.predicts or self.prefetcher.needs_next_router
        if watched or not (self._again.records and self.device.binds and run.is_single):
            return False
        return self.mover is None or not any(pool.policy.wants_scores for pool in self.mover.cache.pools)

    def _layer(self, block: Block, begun: str = "") -> None:
        """``begun`` says what of it has been done: nothing, "mix", or that and "route"."""
        if not begun:
            self._again("mix", block, self._mixed)
        if block.layer.is_moe:
            self._moe(block, begun == "route")
        else:
            self._again("dense", block, networks.dense)
        if "layer_output_scale" in block.weights.scales:
            self._again("scale", block, _scaled)
        if self.progress is not None:
            self.progress(len(block.run.x))

    def _begin(self, tokens: np.ndarray, kv: Any) -> Pass:
        """The residual stream as it begins, and what depends on positions alone, sent to the device."""
        c = self.config
        scratch = self._decode_scratch if len(tokens) == 1 else Scratch(self.device, self.stream)
        positions = kv.length + np.arange(len(tokens))
        heat = {layer.index: temperature(c, layer, positions) for layer in c.layers} if c.temperature else {}
        return Pass(
            config=c, launch=self._launch, scratch=scratch, kv=kv, tables=self._tables(positions, scratch),
            x=self._embedded(tokens, scratch),
            temperature={i: scratch.put(f"heat {i}", t.astype(np.float32)) for i, t in heat.items() if t is not None},
        )  # fmt: skip

    def _embedded(self, tokens: np.ndarray, scratch: Scratch) -> Any:
        """Rows [T, D] of the embedding: by the device, or in host memory where the table stayed there, and sent."""
        c, table = self.config, self.weights.token_embd
        if self.weights.looks_up:
            rows = table.data.reshape(table.rows, -1)[tokens]
            values = dequantize(rows, table.type, (len(tokens), table.cols), "token_embd.weight")
            return scratch.put("x", values * np.float32(c.embedding_scale))
        x = scratch("x", len(tokens), c.embedding_length)
        self._launch("embed", table=table, ids=scratch.put("tokens", tokens.astype(np.int32)), out=x)
        if c.embedding_scale != 1.0:
            self._launch("scale", x=x, factor=c.embedding_scale)
        return x

    def _distinct_rotations(self) -> dict[tuple[Rope, str | None], list[int]]:
        """Kinds of rotary positions, with the tensor that divides their frequencies, and the layers of each."""
        found: dict[tuple[Rope, str | None], list[int]] = {}
        for layer in self.config.layers:
            if layer.rope is not None and layer.mixer != "delta":
                key = layer.rope, divisors(self.config, layer, self.weights.divisors)
                found.setdefault(key, []).append(layer.index)
        return found

    def _tables(self, positions: np.ndarray, scratch: Scratch) -> dict[int, tuple[Any, Any]]:
        """Cosines and sines [T, n_rot/2] of each layer that has rotary positions."""
        tables: dict[int, tuple[Any, Any]] = {}
        for (rope, name), layers in self._rotations.items():
            cos, sin = scaled_tables(positions, rope, self.weights.divisors.get(name or "", 1.0))
            pair = scratch.put(f"cos {layers[0]}", cos), scratch.put(f"sin {layers[0]}", sin)
            tables |= dict.fromkeys(layers, pair)
        return tables

    def _head(self, run: Pass, x: Any) -> Any:
        c, w = self.config, self.weights
        scratch = Scratch(self.device, self.stream) if self.device.is_unified else run.scratch  # kept, or copied
        logits = scratch("logits", len(x), c.vocab_size)
        weight, bias = w.output_norm
        centred = c.quirks.norm == "layer"
        self._launch("norm", x=x, weight=weight, bias=bias, epsilon=c.norm_epsilon, centred=centred, out=x)
        run.product("linear", x, logits, w.output)
        if c.logit_scale != 1.0:
            self._launch("scale", x=logits, factor=1 / c.logit_scale)
        if c.final_logit_softcapping:
            self._launch("softcap", x=logits, limit=c.final_logit_softcapping)
        return logits

    def _fetched_logits(self, logits: Any) -> np.ndarray:
        """Logits in host memory, once they are there."""
        host = self.device.fetch("logits", logits, self.stream)
        self.stream.record().synchronize()
        return host if self.device.is_unified else host.copy()

    def _mixed(self, block: Block) -> None:
        mixer, last = MIXERS[block.layer.mixer]
        h = block.norm(block.run.x, "attn_norm", block.buffer("h", self.config.embedding_length))
        block.add_product(mixer(block, h), last, "post_attention_norm")

    def _ahead(self, block: Block) -> Any:
        """The next layer's routes [T, k] if its router saw the residual stream as it is; None if it has none."""
        following = block.layer.index + 1
        if not (self.prefetcher.needs_next_router and self._leads_on(block.layer.index)):
            return None
        guess = Block(block.run, self.config.layers[following], self.weights.layers[following])
        return self._again("ahead", guess, _guessed)

    def _leads_on(self, layer: int) -> bool:
        """Whether the next layer has routed experts too, which can be guessed from here."""
        following = self.config.layers[layer + 1 : layer + 2]
        return bool(following) and following[0].is_moe

    def _moe(self, block: Block, is_routed: bool = False) -> None:
        layer, c = block.layer.index, self.config
        ahead = self._ahead(block)
        h, logits, ids, weights = self._again("route", block, networks.routed, is_routed)
        routes = self._fetched(layer, ids, weights, logits, ahead)
        routed = self.stream.record()
        parts = block.buffer("parts", c.expert_used_count, c.embedding_length)
        buffers = partial(self._expert_buffers, block, h, ids, weights, parts)
        routed.synchronize()  # the routes are on the host now
        expected = self._told(layer, routes)
        others = self._experts(block, routes, expected, buffers, partial(self._beside, block, h))
        self._again("join", block, partial(networks.join, parts=parts, weights=weights, others=others))

    def _beside(self, block: Block, h: Any) -> Any:
        """What every token computes beside the routed experts, which see h."""
        if not (block.config.shared or block.config.quirks.dense_beside):
            return None
        return self._again("beside", block, partial(networks.beside, h=h))

    def _expert_buffers(self, block: Block, h: Any, ids: Any, weights: Any, parts: Any) -> dict[str, Any]:
        """What the op ``experts`` takes beside matrices: h [T, D], ids and weights [T, k], parts [T, k, D]."""
        given = weights if self.config.quirks.weigh == "input" else None
        kind, extra = self.config.quirks.activation, block.weights.of_experts()
        return {"x": h, "ids": ids, "weights": given, "parts": parts, "activation": kind, **extra}

    def _told(self, layer: int, routes: Routes) -> Sequence[int]:
        """Show the routes to whoever wants to see them; the experts that the next layer is expected to use."""
        if self.observe is not None:
            self.observe(layer, routes)
        if self.prefetcher.predicts:
            self.prefetcher.observe(layer, routes.ids.tolist())
        guess = [] if routes.ahead is None else routes.ahead.tolist()
        return self.prefetcher.predict(guess) if self._leads_on(layer) else []

    def _fetched(self, layer: int, ids: Any, weights: Any, logits: Any, ahead: Any) -> Routes:
        """The routes in host memory, valid after the stream's next event; what nobody asks for is left behind."""
        fetch = partial(self.device.fetch, stream=self.stream)
        asked = self._asks(layer, len(ids))
        told = (fetch("weights", weights), fetch("router", logits)) if asked else (NOTHING, NOTHING)
        return Routes(fetch("ids", ids), told[0], told[1], None if ahead is None else fetch("ahead", ahead))

    def _asks(self, layer: int, n_tokens: int) -> bool:
        """Whether anybody on the host wants more of the routes than ids."""
        return self.observe is not None or self._wants_scores(layer, n_tokens)

    def _experts(
        self,
        block: Block,
        routes: Routes,
        expected: Sequence[int],
        buffers: Callable[[], dict[str, Any]],
        meanwhile: Callable[[], Any],
    ) -> Any:
        """Launch the experts that were chosen; returns what ``meanwhile`` does, while the first are loaded."""
        assert self.mover is not None
        layer = block.layer.index
        waves = self.mover.waves(layer, distinct(routes.ids))
        held = self.mover.acquire(layer, waves[0], scores=self._scores(layer, routes))
        others, launch = meanwhile(), self._expert_launch(block, routes, held[0].matrices, buffers)
        for following in (*waves[1:], None):
            if following is None and expected:
                self.mover.prefetch(layer + 1, expected, {one.key for one in held})
            kept = set() if following is None else self._keep(layer, held)
            ahead = self.mover.acquire(layer, following, kept) if following is not None and kept else None
            self._compute(held, launch)
            held = self.mover.acquire(layer, following) if following is not None and ahead is None else ahead or []
        return others

    def _expert_launch(
        self, block: Block, routes: Routes, three: dict[str, Any], buffers: Callable[[], dict[str, Any]]
    ) -> Callable[..., None]:
        """The op ``experts`` as a function of experts and their matrices, which are like ``three``."""
        launch = self._again.experts(block, three, buffers)
        if launch is not None:
            return launch
        given = buffers()
        if not self.device.is_unified:  # such a device cannot look into memory of its own to group tokens by experts
            given |= {"on_host": routes.ids, "first": True}

        def launch_experts(wanted: Sequence[int], matrices: Sequence[dict[str, Any]]) -> None:
            several = {name: [one[name] for one in matrices] for name in MATRICES}
            self._launch("experts", wanted=np.array(wanted), **several, **given)
            if not self.device.is_unified:
                given["first"] = False

        return launch_experts

    def _scores(self, layer: int, routes: Routes) -> Scores | None:
        """What the router said of a single token, for policies that ask."""
        if not self._wants_scores(layer, len(routes.ids)):
            return None
        return Scores(routes.weights[0].tolist(), softmax(routes.router)[0].tolist())

    def _wants_scores(self, layer: int, n_tokens: int) -> bool:
        assert self.mover is not None
        return n_tokens == 1 and self.mover.cache.pool(layer).policy.wants_scores

    def _keep(self, layer: int, held: Sequence[Held]) -> set[int]:
        """What to pin while the next wave loads: this wave, unless the pool has a single slot."""
        assert self.mover is not None
        return {one.key for one in held} if self.mover.cache.pool(layer).slots > 1 else set()

    def _compute(self, held: Sequence[Held], launch: Callable[..., None]) -> None:
        """Launch what is here at once, then each of the others when it has come."""
        assert self.mover is not None
        late = [one for one in held if one.ready is not None]
        here = [one for one in held if one.ready is None] if late else held
        if here:
            launch([one.expert for one in here], [one.matrices for one in here])
        for one in late:
            self.mover.wait(self.stream, one.ready, WAIT_EXPERTS)
            launch([one.expert], [one.matrices])
        self.mover.used(held, self.stream.record())
