"""A token's layers one after the other without the interpreter, as far as the experts are at hand.

The device does what the recorder has kept of each layer and looks up for itself whom the router has chosen. Where one
is missing it stops, and the layer goes on in Python. Hits change nobody's place, so the cache is told of them later.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from moe_cupy.engine.experts import ExpertMover
from moe_cupy.engine.recording import Recorder

LONGEST_CALL = 0.1  # seconds, after which an interrupt is heard


class WholeToken:
    """Layers over one cache of keys and values. ``run`` does layers first..last-1 and says how far it came."""

    def __init__(self, kv: Any, run: Any, mover: ExpertMover | None, routed: list[bool]):
        self.kv, self._run, self._mover, self._routed = kv, run, mover, routed
        self._at_once = 1

    def __call__(self, first: int, position: int) -> tuple[int, bool]:
        """From layer ``first`` on: the first that is left to be done, and whether its routes are known already."""
        last = len(self._routed)
        while first < last:
            start, goal = time.perf_counter(), min(last, first + self._at_once)
            index, is_routed = self._run(first, goal, position)
            self._tell(first, index)
            if index < goal:
                return index, is_routed
            self._at_once = max(1, int(LONGEST_CALL * (goal - first) / (time.perf_counter() - start)))
            first = goal
        return last, False

    def _tell(self, first: int, last: int) -> None:
        """Let the cache know what layers first..last-1 have used."""
        for layer in range(first, last):
            if self._routed[layer]:
                assert self._mover is not None
                self._mover.seen(layer, self._run.chosen[layer].tolist())


class Whole:
    """Makes a ``WholeToken`` once the recorder has all layers of a token."""

    def __init__(self, device: Any, again: Recorder, mover: ExpertMover | None, routed: list[bool]):
        self._device, self._again, self._mover, self._routed = device, again, mover, routed
        self._made: WholeToken | None = None
        self._version = 0

    def over(self, kv: Any) -> WholeToken | None:
        """For tokens over ``kv``; None while it is not known what they launch, or where a device cannot do it."""
        if self._version != self._again.version:
            self._version = self._again.version
            parts = [self._again.of_layer(index, kv) for index in range(len(self._routed))]
            places = np.empty((0, 3), np.int64) if self._mover is None else self._mover.places
            self._made = WholeToken(kv, self._device.bind_token(parts, places), self._mover, self._routed)
        return self._made if self._made is not None and self._made.kv is kv else None
