"""Policies that know more than a cache can: the future (Belady), or how often everything will be used (a profile)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moe_cupy.cache.policies import Geometry, Policy, Scores
from moe_cupy.cache.ranked import Ranked
from moe_cupy.lab.trace import RouteTrace

NEVER = 1 << 62


def next_uses(trace: RouteTrace) -> list[list[list[int]]]:
    """[T][L][k]: the event (token * L + layer) that next uses the same (layer, expert), NEVER if none does."""
    tokens, layers, k = trace.shape
    following = np.full((layers, trace.n_experts), NEVER, np.int64)
    answer = np.empty((tokens, layers, k), np.int64)
    each = np.arange(layers)[:, None]
    ids = trace.experts.astype(np.int64)
    for token in range(tokens - 1, -1, -1):
        answer[token] = following[each, ids[token]]
        following[each, ids[token]] = token * layers + each
    return answer.tolist()


class Belady(Ranked):
    """Furthest next use goes first: no policy can do better on this trace (Belady 1966)."""

    def __init__(self, geometry: Geometry, future: Sequence[Sequence[Sequence[int]]]) -> None:
        super().__init__(geometry)
        self._future = future
        self._next = [NEVER] * geometry.layers * geometry.experts

    def use(self, keys: Sequence[int], scores: Scores | None) -> None:
        for key, event in zip(keys, self._future[self.token][self.layer], strict=True):
            self._next[key] = event

    def numbers(self, keys: Sequence[int]) -> list[float]:
        upcoming = self._next
        return [-upcoming[key] for key in keys]


class Static(Ranked):
    """A hot set chosen beforehand: the most used of a profile; residents outside it go first."""

    def __init__(self, geometry: Geometry, profile: Sequence[int]) -> None:
        super().__init__(geometry)
        self._profile = profile

    def numbers(self, keys: Sequence[int]) -> list[float]:
        profile = self._profile
        return [profile[key] for key in keys]


def knowing(trace: RouteTrace, profile: RouteTrace | None = None) -> dict[str, Callable[[Geometry], Policy]]:
    """Policies that need the trace (or another one, as profile) to be made; names ending in -admit may bypass."""
    made: dict[str, Any] = {}

    def future() -> Any:
        if "future" not in made:
            made["future"] = next_uses(trace)
        return made["future"]

    def counts() -> Any:
        source = profile or trace
        flat = (source.experts.astype(np.int64) + np.arange(source.shape[1])[:, None] * source.n_experts).ravel()
        return np.bincount(flat, minlength=trace.pairs).tolist()

    return {
        "static": lambda geometry: Static(geometry, counts()),
        "belady": lambda geometry: Belady(geometry, future()),
        "belady-admit": lambda geometry: Belady(geometry, future()),
    }
