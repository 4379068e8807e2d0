"""What one token launches in a part of a layer is the same for every token, but for the token's position.

So the launches of the first token are kept, made ready by the device as one function of the position, and run for
those that follow: what a launch needs is looked up and checked once, not for every token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from moe_cupy.device.base import Device
from moe_cupy.engine.block import Block


class Kept(NamedTuple):
    """A part of a layer over one cache of keys and values."""

    kv: Any
    run: Callable[[int], None]  # takes the position
    result: Any  # arrays that the part leaves behind, the same for every token


class Recorder:
    """Parts of layers by name and layer. Only for passes over one token, whose arrays stay where they are."""

    def __init__(self, device: Device, stream: Any):
        self._device, self._stream = device, stream
        self._kept: dict[tuple[str, int], Kept] = {}

    def takes(self, block: Block) -> bool:
        """Whether the launches of this pass are those of the next one with another position."""
        run, layer = block.run, block.layer
        repeats = layer.mixer != "delta" and layer.index not in run.temperature  # states are exchanged; scores scaled
        return self._device.binds and block.n_tokens == 1 and run.abroad is None and repeats

    def __call__(self, name: str, block: Block, perform: Callable[[Block], Any]) -> Any:
        """``perform(block)``, or what it has launched before, at the position of this pass."""
        if not self.takes(block):
            return perform(block)
        kept = self._kept.get((name, block.layer.index))
        if kept is not None and kept.kv is block.run.kv:
            kept.run(block.run.kv.length)
            return kept.result
        return self._record(name, block, perform)

    def _record(self, name: str, block: Block, perform: Callable[[Block], Any]) -> Any:
        calls: list[tuple[str, dict[str, Any]]] = []

        def launch(op: str, **buffers: Any) -> None:
            block.launch(op, **buffers)
            calls.append((op, buffers))

        result = perform(replace(block, run=replace(block.run, launch=launch)))
        run = self._device.bind(calls, self._stream)
        self._kept[name, block.layer.index] = Kept(block.run.kv, run, result)
        return result
