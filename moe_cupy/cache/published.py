"""Rules of published offloading systems: HOBBIT and its LHU, MoE-Infinity's activation matrix, HybriMoE's score."""

from __future__ import annotations

from collections.abc import Sequence

from moe_cupy.cache.policies import Geometry, Scores
from moe_cupy.cache.ranked import Ranked

HIGH_PRECISION_UP_TO = 0.6  # T1: share of gate weight before an expert's turn up to which it is loaded in full
HOBBIT_WEIGHTS = (0.25, 0.25, 0.25, 0.25)  # recency, uses, uses in high precision, layer distance; theirs are unknown
HYBRIMOE_ALPHA = 0.5


def high_precision(weights: Sequence[float]) -> list[bool]:
    """HOBBIT's loader: which of an event's experts, given their gate weights, are wanted in full precision."""
    total, before, high = sum(weights) or 1.0, 0.0, {}
    for rank in sorted(range(len(weights)), key=lambda i: -weights[i]):
        high[rank] = before / total <= HIGH_PRECISION_UP_TO
        before += weights[rank]
    return [high[i] for i in range(len(weights))]


class Hobbit(Ranked):
    """w1 R/T + w2 F/T + w3 H/T + w4 (1 - layers ahead / L), all records of this sequence only (arXiv 2411.01433).

    R last use, F uses, H high-precision uses, T tokens. Without gate weights the first of an event counts as H.
    """

    wants_scores = True

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._pairs = geometry.layers * geometry.experts
        self.begin_sequence()

    def begin_sequence(self) -> None:
        self._start = self.token + (self.layer >= 0)  # the first token of this sequence
        self._last, self._uses, self._high = ([0] * self._pairs for _ in range(3))

    def use(self, keys: Sequence[int], scores: Scores | None) -> None:
        weights = scores.weights if scores is not None else None
        high = high_precision(weights) if weights is not None else [i == 0 for i in range(len(keys))]
        token = self.token - self._start + 1
        for key, is_high in zip(keys, high, strict=True):
            self._last[key] = token
            self._uses[key] += 1
            self._high[key] += is_high

    def numbers(self, keys: Sequence[int]) -> list[float]:
        w1, w2, w3, w4 = HOBBIT_WEIGHTS
        tokens = max(1, self.token - self._start + 1)
        w1, w2, w3 = w1 / tokens, w2 / tokens, w3 / tokens
        near = [w4 * (1 - (layer - self.layer) % self.layers / self.layers) for layer in range(self.layers)]
        last, uses, high, experts = self._last, self._uses, self._high, self.experts
        return [w1 * last[k] + w2 * uses[k] + w3 * high[k] + near[k // experts] for k in keys]


class LHU(Hobbit):
    """Least often wanted in high precision in this sequence (a term of HOBBIT's score)."""

    def numbers(self, keys: Sequence[int]) -> list[float]:
        high = self._high
        return [high[key] for key in keys]


class ActivationMatrix(Ranked):
    """MoE-Infinity: (1 - layers ahead / (L+1)) x share of this sequence's uses of the layer x uses while here."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.begin_sequence()
        self._visits = [0] * geometry.layers * geometry.experts

    def begin_sequence(self) -> None:
        self._matrix = [0] * self.layers * self.experts
        self._row = [0] * self.layers

    def use(self, keys: Sequence[int], scores: Scores | None) -> None:
        self._row[self.layer] += len(keys)
        for key in keys:
            self._matrix[key] += 1
            self._visits[key] += 1

    def evict(self, key: int) -> None:
        self._visits[key] = 0
        super().evict(key)

    def numbers(self, keys: Sequence[int]) -> list[float]:
        factor = [
            (1 - distance / (self.layers + 1)) / max(1, row)
            for distance, row in zip(self.distances(), self._row, strict=True)
        ]
        matrix, visits, experts = self._matrix, self._visits, self.experts
        return [factor[k // experts] * matrix[k] * visits[k] for k in keys]


class HybriMoE(Ranked):
    """Lowest moving average of router scores: S = a s + (1-a) S of the 2k highest, S = (1-a) S of others.

    Where only the chosen k have scores, these are used; without any, each counts 1/k (arXiv 2504.05897).
    """

    wants_scores = True

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._score = [0.0] * geometry.layers * geometry.experts
        self._turn = [0] * geometry.layers * geometry.experts  # of its layer, when the score was set
        self._turns = [0] * geometry.layers

    def use(self, keys: Sequence[int], scores: Scores | None) -> None:
        turn = self._turns[self.layer] = self._turns[self.layer] + 1
        for key, score in self._highest(keys, scores):
            faded = self._score[key] * (1 - HYBRIMOE_ALPHA) ** (turn - self._turn[key])
            self._score[key], self._turn[key] = HYBRIMOE_ALPHA * score + faded, turn

    def _highest(self, keys: Sequence[int], scores: Scores | None) -> list[tuple[int, float]]:
        if scores is not None and scores.router is not None:
            router, first = scores.router, self.layer * self.experts
            best = sorted(range(len(router)), key=lambda e: -router[e])[: 2 * len(keys)]
            return [(first + e, router[e]) for e in best]
        if scores is not None and scores.weights is not None:
            return list(zip(keys, scores.weights, strict=True))
        return [(key, 1 / len(keys)) for key in keys]

    def numbers(self, keys: Sequence[int]) -> list[float]:
        score, turn, turns, experts = self._score, self._turn, self._turns, self.experts
        return [score[k] * (1 - HYBRIMOE_ALPHA) ** (turns[k // experts] - turn[k]) for k in keys]
