"""A pass over a model that is divided between a GPU and the CPU, as ``split`` says: two ``Forward`` that take turns.

Layers run at home, and the residual stream follows them: with ``-ngl`` it moves once, from the CPU's layers to those of
the GPU. Where a layer's experts are on the other device, what they see goes there, and one vector a token comes back;
what is beside them is computed at home meanwhile. A product whose matrix is away is computed there.

The order of streams does the rest. What goes to the GPU is copied at once into page-locked memory, and from there in
stream order. What comes from the GPU is there after an event, and the host waits for that one alone; the CPU's stream
is the caller. Of a layer with experts on the CPU this is the event for which the routes are waited for anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from moe_cupy.engine import networks
from moe_cupy.engine.block import Block, Pass, Scratch
from moe_cupy.engine.choosing import Offer
from moe_cupy.engine.forward import Forward, RouteObserver, Routes
from moe_cupy.engine.split import EMBEDDING, Split
from moe_cupy.engine.weights import Linear
from moe_cupy.plan.rules import CPU, GPU


class Half(Forward):
    """The layers at home on one device, and the experts and products that are computed there for the other."""

    other: Half
    run: Pass  # the pass under way

    def __init__(self, place: str, split: Split, *args: Any):
        super().__init__(split.devices[place], *args)
        self.place, self.split = place, split
        starts = split.homes[0] if self.weights.looks_up else split.place(EMBEDDING)
        self.embeds = starts == place
        self._rotations = {
            key: mine for key, layers in self._rotations.items() if (mine := [i for i in layers if self.is_home(i)])
        }

    def is_home(self, layer: int) -> bool:
        return self.split.homes[layer] == self.place

    def begin(self, tokens: np.ndarray, kv: Any) -> None:
        """Room for a pass over ``tokens`` [T]."""
        self.run = replace(self._begin(tokens, kv), abroad=self._abroad)

    def layer(self, index: int) -> None:
        """One layer at home here."""
        self._layer(Block(self.run, self.config.layers[index], self.weights.layers[index]))

    def logits(self, last_only: bool) -> np.ndarray:
        """Of the residual stream that came here last, in host memory."""
        x = self.run.x[-1:] if last_only else self.run.x
        return self._fetched_logits(self._head(self.run, x))

    def best(self, count: int) -> Offer:
        """The ``count`` largest logits of the last token of the residual stream that came here last."""
        return self._best(self._head(self.run, self.run.x[-1:]), count)

    def taken(self, name: str, x: Any) -> Any:
        """``x``, which the other device has, in memory of this one: valid once the other's stream got as far as now."""
        if self.place == GPU:
            return self.run.scratch.put(name, x)
        return self.other.device.fetch(name, x, self.other.stream)

    def bring(self, out: Any, x: Any) -> None:
        """Into ``out`` goes what the other device has in ``x``."""
        if self.place == GPU:
            self.device.put(out, x, self.stream)
            return
        values = self.taken("brought", x)
        self.other.settle()
        np.copyto(out, values)

    def settle(self) -> None:
        """The host waits until this device has done what it was given; the CPU has already."""
        self.stream.record().synchronize()

    def _embedded(self, tokens: np.ndarray, scratch: Scratch) -> Any:
        if self.embeds:
            return super()._embedded(tokens, scratch)
        return scratch("x", len(tokens), self.config.embedding_length)

    def _abroad(self, op: str, x: Any, out: Any, linear: Linear) -> None:
        """A product by the other device, which has the matrix."""
        there, target = self.other, out
        if op == "linear_add":
            target, op = self.run.scratch("product", *out.shape), "linear"
        seen = there.taken("factor", x)
        made = there.taken("made", out) if op == "linear_heads" else there.run.scratch("made", *out.shape)
        self.settle()
        there.run.launch(op, x=seen, out=made, w=linear.w, scale=linear.scale, bias=linear.bias)
        self.bring(target, made)
        if target is not out:
            self._launch("add", x=target, factor=1.0, out=out)

    def _leads_on(self, layer: int) -> bool:
        """Also, the next layer is at home where this one is, and so are its experts."""
        homes, experts = self.split.homes, self.split.experts
        return super()._leads_on(layer) and (homes[layer], experts[layer]) == (homes[layer + 1], experts[layer + 1])

    def _asks(self, layer: int, n_tokens: int) -> bool:
        return self.split.experts[layer] != self.place or super()._asks(layer, n_tokens)

    def _moe(self, block: Block, is_routed: bool = False) -> None:
        layer, there = block.layer.index, self.other
        if self.split.experts[layer] == self.place:
            super()._moe(block, is_routed)
            return
        ahead = self._ahead(block)
        h, logits = networks.router_logits(block)
        ids, weights = networks.route(block, logits)
        routes = self._fetched(layer, ids, weights, logits, ahead)
        seen = there.taken("seen", h)
        self.settle()  # the routes, and what the experts see if the CPU has them
        beside = partial(networks.beside, block, h)
        y, others = there.experts_for(block, routes, self._told(layer, routes), seen, beside)
        here = block.buffer("from experts", self.config.embedding_length)
        self.bring(here, y)
        networks.join(block, here.reshape(len(routes.ids), 1, -1), None, others)

    def experts_for(
        self, block: Block, routes: Routes, expected: Sequence[int], x: Any, beside: Callable[[], Any]
    ) -> tuple[Any, Any]:
        """The weighted sum [T, D] of what a layer's experts, which are here, make of x [T, D]; what ``beside`` gives.

        The layer is at home on the other device, which does what is ``beside`` the experts.
        """
        c, t, scratch = self.config, len(routes.ids), self.run.scratch
        ids, weights = scratch.put("chosen", routes.ids), scratch.put("chosen weights", routes.weights)
        parts, y = scratch("parts", t, c.expert_used_count, c.embedding_length), scratch("sum", t, c.embedding_length)
        buffers = partial(self._expert_buffers, block, x, ids, weights, parts)
        others = self._experts(block, routes, expected, buffers, beside)
        self._launch("combine", parts=parts, weights=None if c.quirks.weigh == "input" else weights, out=y, add=False)
        return y, others


class TwoDevices:
    """A ``Forward`` for a divided model. What is given are arguments of both halves but for device and mover."""

    def __init__(self, split: Split, movers: dict[str, Any], config: Any, weights: Any, prefetcher: Any):
        self.split, self.config = split, config
        self.halves = {at: Half(at, split, config, weights, movers.get(at), prefetcher) for at in (GPU, CPU)}
        self.progress: Callable[[int], object] | None = None
        self.halves[GPU].other, self.halves[CPU].other = self.halves[CPU], self.halves[GPU]

    @property
    def prefetcher(self) -> Any:
        """What both halves ask."""
        return self.halves[GPU].prefetcher

    @prefetcher.setter
    def prefetcher(self, value: Any) -> None:
        for half in self.halves.values():
            half.prefetcher = value

    @property
    def observe(self) -> RouteObserver | None:
        """Who is told the routes of all layers."""
        return self.halves[GPU].observe

    @observe.setter
    def observe(self, value: RouteObserver | None) -> None:
        for half in self.halves.values():
            half.observe = value

    def __call__(self, tokens: np.ndarray, kv: Any, last_only: bool = False) -> np.ndarray:
        """Logits [T, vocab] (or [1, vocab] of the last token) for tokens int64 [T] that follow ``kv.length``."""
        return self._through(tokens, kv).logits(last_only)

    def largest(self, tokens: np.ndarray, kv: Any, count: int) -> Offer:
        """The ``count`` largest logits of the last token; the others stay where they were made."""
        return self._through(tokens, kv).best(count)

    def _through(self, tokens: np.ndarray, kv: Any) -> Half:
        """All layers; gives the half that has the residual stream, and the output."""
        for half in self.halves.values():
            half.begin(tokens, kv)
        at = next(half for half in self.halves.values() if half.embeds)
        for index, home in enumerate(self.split.homes):
            if at.place != home:
                at = self._moved(at.other)
            if index < len(self.split.experts):
                at.layer(index)
                if self.progress is not None:
                    self.progress(len(tokens))
        return at

    def _moved(self, to: Half) -> Half:
        """The residual stream is ``to``'s now."""
        to.bring(to.run.x, to.other.run.x)
        return to
