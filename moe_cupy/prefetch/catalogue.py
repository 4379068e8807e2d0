"""The predictors by the names of the command line."""

from __future__ import annotations

from collections.abc import Callable

from moe_cupy.prefetch.predictors import NextGate, NoPrefetch, Prefetcher
from moe_cupy.prefetch.routes import EchoPrefetch, Frequency, NearestMatrix, PreviousToken, ScoreDepth, Transition

PREFETCHERS: dict[str, Callable[[], Prefetcher]] = {
    "none": NoPrefetch,
    "next-gate": NextGate,
    "previous-token": PreviousToken,
    "frequency": Frequency,
    "transition": Transition,
    "score-depth": ScoreDepth,
    "nearest-matrix": NearestMatrix,
    "echo": EchoPrefetch,
}
