"""The predictors the runtime can use. Each says what it needs and, given it, whom to fetch, likeliest first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol


class Prefetcher(Protocol):
    """Guesses the next layer's experts while this layer computes."""

    needs_next_router: bool  # whether the engine must run the next layer's router ahead of its time

    def predict(self, next_ids: Sequence[Sequence[int]]) -> list[int]:
        """Experts of the next layer to fetch, likeliest first; next_ids [T][k] is the router's early answer."""


class NoPrefetch:
    """Fetch on demand only."""

    needs_next_router = False

    def predict(self, next_ids: Sequence[Sequence[int]]) -> list[int]:
        return []


class NextGate:
    """The next layer's router applied to this layer's hidden state: the residual stream changes slowly.

    The hidden state is the one before this layer's experts are added, under the next layer's norm.
    Source: speculative loading of Eliseev & Mazur 2023 (arXiv 2312.17238); with the next layer's norm
    gains it is the "norm fix" without the mean expert term.
    """

    needs_next_router = True

    def predict(self, next_ids: Sequence[Sequence[int]]) -> list[int]:
        return rank(next_ids)


def rank(ids: Sequence[Sequence[int]]) -> list[int]:
    """Distinct experts by how many tokens want them, then by best rank, then by id; ids [T][k], best first."""
    count = Counter(e for row in ids for e in row)
    best: dict[int, int] = {}
    for row in ids:
        for position, expert in enumerate(row):
            best[expert] = min(position, best.get(expert, position))
    return sorted(count, key=lambda e: (-count[e], best[e], e))


PREFETCHERS: dict[str, Callable[[], Prefetcher]] = {"none": NoPrefetch, "next-gate": NextGate}
