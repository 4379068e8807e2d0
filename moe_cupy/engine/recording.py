"""What one token launches in a part of a layer is the same for every token, but for the token's position.

So the launches of the first token are kept, made ready by the device as one function of the position, and run for
those that follow: what a launch needs is looked up and checked once, not for every token. Of the op ``experts`` only
the experts differ, whose matrices are where they have been loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from moe_cupy.device.base import Device
from moe_cupy.engine.block import Block

BEFORE, BEHIND = ("mix", "route"), ("beside", "join", "dense", "scale")  # the experts, in their order
ORDER = (*BEFORE, "experts", *BEHIND)


class Kept(NamedTuple):
    """A part of a layer over one cache of keys and values."""

    kv: Any
    run: Callable[..., None]  # takes the position, or experts and their matrices
    result: Any  # arrays that the part leaves behind, the same for every token


class Recorder:
    """Parts of layers by name and layer. Only for passes over one token, whose arrays stay where they are."""

    records = True

    def __init__(self, device: Device, stream: Any):
        self._device, self._stream = device, stream
        self._kept: dict[tuple[str, int], Kept] = {}
        self.version = 0  # how often something new was kept

    def takes(self, name: str, block: Block) -> bool:
        """Whether the launches of this pass are those of the next one with another position."""
        run, layer = block.run, block.layer
        differs = layer.mixer == "delta" or layer.index in run.temperature  # states are exchanged; scores are scaled
        return self._device.binds and run.is_single and not (name == "mix" and differs)

    def __call__(self, name: str, block: Block, perform: Callable[[Block], Any], is_done: bool = False) -> Any:
        """``perform(block)``, or what it has launched before, at the position of this pass; unless that ``is_done``."""
        run = block.run
        kept = self._kept.get((name, block.layer.index)) if run.is_single else None
        if kept is not None and kept.kv is run.kv:
            if not is_done:
                kept.run(run.kv.length)
            return kept.result
        return self._record(name, block, perform) if self.takes(name, block) else perform(block)

    def experts(self, block: Block, three: dict[str, Any], buffers: Callable[[], dict[str, Any]]) -> Any:
        """The op ``experts`` of this layer as a function of experts and their matrices; None if it differs each time.

        ``three`` are the matrices of one of them.
        """
        run, key = block.run, ("experts", block.layer.index)
        kept = self._kept.get(key) if run.is_single else None
        if kept is not None and kept.kv is run.kv:
            return kept.run
        if not self.takes("experts", block):
            return None
        made = self._device.bind_experts(three, self._stream, **buffers())
        self._keep(key, Kept(run.kv, made, None))
        return made

    def of_layer(self, index: int, kv: Any) -> tuple[list[Any], Any, list[Any]] | None:
        """What is kept of a layer over ``kv``: parts up to its routes, experts, parts behind; None if not all is."""
        kept = {name: self._kept.get((name, index)) for name in ORDER}
        there = {name: one.run for name, one in kept.items() if one is not None and one.kv is kv}
        if "mix" not in there or not {"join", "dense"} & there.keys():
            return None
        before, after = ([there[name] for name in names if name in there] for names in (BEFORE, BEHIND))
        return before, there.get("experts"), after

    def _record(self, name: str, block: Block, perform: Callable[[Block], Any]) -> Any:
        calls: list[tuple[str, dict[str, Any]]] = []

        def launch(op: str, **buffers: Any) -> None:
            block.launch(op, **buffers)
            calls.append((op, buffers))

        result = perform(replace(block, run=replace(block.run, launch=launch)))
        run = self._device.bind(calls, self._stream)
        self._keep((name, block.layer.index), Kept(block.run.kv, run, result))
        return result

    def _keep(self, key: tuple[str, int], kept: Kept) -> None:
        self._kept[key] = kept
        self.version += 1


class Unrecorded:
    """In place of a ``Recorder`` where every launch has to be seen: each part is performed anew."""

    records = False

    def __call__(self, name: str, block: Block, perform: Callable[[Block], Any], is_done: bool = False) -> Any:
        return perform(block)

    def experts(self, block: Block, three: dict[str, Any], buffers: Callable[[], dict[str, Any]]) -> Any:
        """None: the experts of each event are launched as an op."""
        return None
