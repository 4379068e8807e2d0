"""The policies by the names of the command line."""

from __future__ import annotations

from collections.abc import Callable

from moe_cupy.cache.echo import Echo
from moe_cupy.cache.policies import LFU, LRU, Geometry, Policy
from moe_cupy.cache.published import LHU, ActivationMatrix, Hobbit, HybriMoE
from moe_cupy.cache.ranked import FIFO, LFRU, DecayedLFU, LayerDistance, LeastStale, UseClass

POLICIES: dict[str, Callable[[Geometry], Policy]] = {
    "lru": LRU,
    "fifo": FIFO,
    "lfu": LFU,
    "lfru": LFRU,
    "decayed-lfu": DecayedLFU,
    "use-class": UseClass,
    "lhu": LHU,
    "layer-distance": LayerDistance,
    "hobbit": Hobbit,
    "least-stale": LeastStale,
    "activation-matrix": ActivationMatrix,
    "hybrimoe": HybriMoE,
    "echo": Echo,
}
