"""Decoding driven by the device: which expert is where is decided by kernels, and a token is one graph launch.

After a layer's router, ``resolve`` finds the slots of the chosen experts and whom a missing one replaces, ``fill``
brings what is missing from page-locked memory, and the expert kernels follow: ids never go to the host. With
``next-gate`` the next layer's router guesses ahead, and a second branch of the graph brings whom it names. What changes
from token to token (id, position, rotations) is sent into fixed buffers before; so the launches of one token can be
captured and launched again. A prompt is taken as always, by the host; the pools are handed over (``handover.py``).

Where page-locked memory does not hold all experts, a layer that lacks one lets the token run out without experts
(a *halt*); the host reads it, and the token goes on from that layer, whose residual stream was kept.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import numpy as np

from moe_cupy.cache.tabled import RULES, Tabled
from moe_cupy.compiled import POLICIES
from moe_cupy.device.base import DeviceError
from moe_cupy.engine import networks
from moe_cupy.engine.block import Block, Pass
from moe_cupy.engine.forward import Forward
from moe_cupy.engine.handover import DevicePools
from moe_cupy.engine.placement import host_slots, place_experts
from moe_cupy.kernels.cuda import launches as to
from moe_cupy.kernels.cuda.expert_ops import resident_experts
from moe_cupy.store import ExpertStore, Packed

BRANCH = "ahead"  # the stream that fetches for the next layer


class DrivenForward(Forward):
    """Prompts by the host; single tokens eagerly until all memory is there, then as a graph, one for each parity of the
    states."""

    device: Any  # has graphs

    def __init__(self, device: Any, *args: Any, pools: DevicePools):
        super().__init__(device, *args)
        self.pools, self._work = pools, device.workspace(self.stream)
        self._branch = device.stream(BRANCH)
        self._position = device.array((1,), np.int32)
        self._loads = [device.array((1 + 3 * self.config.expert_used_count,), np.int32) for _ in range(2)]
        self._kept: dict[int, Any] = {}  # layer -> its residual stream before the experts, where a token may halt
        self._on_the_way = False  # whether the branch brings something for the next layer
        self._seen: set[int] = set()
        self._graphs: dict[int, tuple[Any, Any]] = {}  # parity -> graph, logits

    def _launched(self, tokens: np.ndarray, kv: Any, last_only: bool) -> Any:
        self._work.position, self._on_the_way = None, False
        if len(tokens) > 1 or not self._again.records:
            self.pools.to_host()
            return super()._launched(tokens, kv, last_only)
        self.pools.to_device()
        self._work.position = self._position
        run = self._begin(tokens, kv)
        self.device.put(self._position, np.array([kv.length], np.int32), self.stream)
        self.pools.begin_token()
        logits = self._token(run, kv, last_only)
        while (layer := self.pools.halted_at()) is not None:
            self.pools.read_missing(layer)
            self._launch("columns", x=self._kept[layer], first=0, out=run.x, at=0, count=run.x.shape[-1])
            logits = self._pass(run, last_only, layer)
        return logits

    def _token(self, run: Pass, kv: Any, last_only: bool) -> Any:
        """All launches of a token: logits in device memory."""
        if kv.length == 0 or kv.parity not in self._seen:
            self._seen |= {kv.parity} if kv.length else set()
            return self._pass(run, last_only)
        if kv.parity not in self._graphs:
            with self.device.capture(self.stream) as graph:
                self._graphs[kv.parity] = graph, self._pass(run, last_only)
        graph, logits = self._graphs[kv.parity]
        self.device.replay(graph, self.stream)
        return logits

    def _moe(self, block: Block, is_routed: bool = False) -> None:
        if self._work.position is None:
            super()._moe(block, is_routed)
            return
        c = self.config
        if self.pools.may_halt:
            self._keep_stream(block)
        ahead = self._ahead(block)
        h, logits = networks.router_logits(block)
        ids, weights = networks.route(block, logits)
        slots = self._bring(block, ids)
        if ahead is not None:
            self._bring_ahead(block, ahead)
        parts = block.buffer("parts", c.expert_used_count, c.embedding_length)
        self.device.launch_all(
            resident_experts, self.stream, x=h, ids=ids, slots=slots, parts=parts,
            resident=self.pools.of_layer(block.layer.index).resident, activation=c.quirks.activation,
            weights=weights if c.quirks.weigh == "input" else None, **block.weights.of_experts(),
        )  # fmt: skip
        networks.join(block, parts, weights, networks.beside(block, h))

    def _bring(self, block: Block, ids: Any) -> Any:
        """Slots [k] of a layer's experts, which are there once the stream is here.

        Copies do not wait for those of the branch, but for the few whose slot the branch has not filled yet.
        """
        layer, (loads, ahead), run = block.layer.index, self._loads, partial(self.device.run, stream=self.stream)
        pool, slots = self.pools.of_layer(layer), block.buffer("slots", ids.size, dtype=np.int32)
        given = ahead if self._on_the_way else None
        run(to.resolve(slots, loads, ids, pool.residency, layer, self.config.expert_count, ahead=given,
                       halt=self.pools.halt))  # fmt: skip
        run(pool.fill(loads))
        if self._on_the_way:
            self.device.order(self._branch, self.stream)
            run(pool.fill(loads, late=True))
            self._on_the_way = False
        return slots

    def _bring_ahead(self, block: Block, ids: Any) -> None:
        """On the branch, behind all that this layer demands: whom the next layer may want."""
        layer, loads = block.layer.index, self._loads[1]
        mine, pool = self.pools.of_layer(layer), self.pools.of_layer(layer + 1)
        most = min(ids.size, pool.slots - self.config.expert_used_count)
        if most <= 0:
            return
        first_key = (layer + 1) * self.config.expert_count
        self.device.run(to.resolve_ahead(loads, ids, pool.residency, first_key, most, apart=pool is not mine,
                                         halt=self.pools.halt), self.stream)  # fmt: skip
        self.device.order(self.stream, self._branch)
        self.device.run(pool.fill(loads), self._branch)
        self._on_the_way = True

    def _keep_stream(self, block: Block) -> None:
        layer, width = block.layer.index, self.config.embedding_length
        if layer not in self._kept:
            self._kept[layer] = self.device.array((1, width), np.float32)
        self._launch("columns", x=block.run.x, first=0, out=self._kept[layer], at=0, count=width)


def place_driven(device: Any, store: ExpertStore, used: int, options: Any) -> tuple[DevicePools, str]:
    """Page-locked memory and slots, both in the form that kernels know; ``options`` are those of the engine.

    Raises BudgetError if a budget cannot hold one token's experts, DeviceError where a device cannot drive.
    """
    if device.is_unified:
        raise DeviceError(f"--decode device: the {device.name} device has no memory of its own; use --decode host")
    o, packed = options, cast(Any, Packed(store))
    make = partial(Tabled, rule=o.policy) if o.policy in RULES else POLICIES[o.policy]
    [in_ram] = host_slots([packed], used, o.host_cache)
    mover, reason = place_experts(device, packed, used, o.cache, o.policy, o.reads_in_flight, in_ram, make=make)
    return DevicePools(device, packed, mover, used), reason
