"""The predictors the runtime can use. Each is told every layer's routes and says whom the next layer may want."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

Routes = Sequence[Sequence[int]]  # [T][k]


class Prefetcher(Protocol):
    """Guesses the next layer's experts while this layer computes."""

    needs_next_router: bool  # whether the engine must run the next layer's router ahead of its time
    predicts: bool  # whether it ever names anyone

    def begin_sequence(self) -> None:
        """What follows has nothing to do with the tokens so far."""

    def observe(self, layer: int, ids: Routes) -> None:
        """The router of ``layer`` has spoken; a layer that does not come after the last begins a new pass."""

    def predict(self, next_ids: Routes) -> list[int]:
        """Experts of the layer after the one observed, likeliest first; next_ids is its router's early answer."""


class NoPrefetch:
    """Fetch on demand only."""

    needs_next_router = False
    predicts = False

    def begin_sequence(self) -> None:
        """Nothing is remembered."""

    def observe(self, layer: int, ids: Routes) -> None:
        """Nothing is remembered."""

    def predict(self, next_ids: Routes) -> list[int]:
        return []


class NextGate(NoPrefetch):
    """The next layer's router applied to this layer's hidden state: the residual stream changes slowly.

    The hidden state is the one before this layer's experts are added, under the next layer's norm.
    Source: speculative loading of Eliseev & Mazur 2023 (arXiv 2312.17238); with the next layer's norm
    gains it is the "norm fix" without the mean expert term.
    """

    needs_next_router = True
    predicts = True

    def predict(self, next_ids: Routes) -> list[int]:
        return rank(next_ids)


def rank(ids: Routes) -> list[int]:
    """Distinct experts by how many tokens want them, then by best rank, then by id; ids [T][k], best first."""
    count = Counter(e for row in ids for e in row)
    best: dict[int, int] = {}
    for row in ids:
        for position, expert in enumerate(row):
            best[expert] = min(position, best.get(expert, position))
    return sorted(count, key=lambda e: (-count[e], best[e], e))
