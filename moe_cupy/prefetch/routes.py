"""Predictors that need nothing but the routes so far. Of a pass over several tokens they look at the last one."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from math import sqrt

from moe_cupy.cache.echo import ALL, TOKENS, Similar
from moe_cupy.prefetch.predictors import NoPrefetch, Routes

Token = dict[int, tuple[int, ...]]  # layer -> experts
COLLECTION = 64  # activation matrices kept
MASS = 0.7  # SPICE halts below this share of the k experts' probability; here, what is fetched reaches it
NEIGHBOURS = 8  # more than the policy asks: a wrong copy in the way costs more than a right one gains …
SURE = 0.75  # … so this share of them must agree


class FromRoutes(NoPrefetch):
    """Bookkeeping: the current token's routes so far and the token's before, layer by layer."""

    predicts = True

    def __init__(self) -> None:
        self.layer = 0
        self.current: Token = {}
        self.previous: Token = {}

    def begin_sequence(self) -> None:
        self.current, self.previous = {}, {}

    def observe(self, layer: int, ids: Routes) -> None:
        if self.current and layer <= self.layer:
            self.previous, self.current = self.current, {}
            self.end_token(self.previous)
        self.layer, self.current[layer] = layer, tuple(ids[-1])
        self.learn(layer, self.current[layer])

    def learn(self, layer: int, ids: Sequence[int]) -> None:
        """Remember these routes."""

    def end_token(self, token: Token) -> None:
        """All of a token's routes are known."""

    @property
    def used(self) -> int:
        """Experts a token uses in a layer."""
        return len(self.current[self.layer])


class PreviousToken(FromRoutes):
    """What the token before used in the next layer."""

    def predict(self, next_ids: Routes) -> list[int]:
        return list(self.previous.get(self.layer + 1, ()))


class Frequency(FromRoutes):
    """The k experts that the next layer used most often so far."""

    def __init__(self) -> None:
        super().__init__()
        self._uses: defaultdict[int, Counter[int]] = defaultdict(Counter)

    def learn(self, layer: int, ids: Sequence[int]) -> None:
        self._uses[layer].update(ids)

    def predict(self, next_ids: Routes) -> list[int]:
        return best(self._uses[self.layer + 1].items(), self.used)


class Transition(FromRoutes):
    """A table learned as it goes: how often did the next layer use e' when this one used e?"""

    def __init__(self) -> None:
        super().__init__()
        self._after: defaultdict[tuple[int, int], Counter[int]] = defaultdict(Counter)
        self._uses: Counter[tuple[int, int]] = Counter()

    def learn(self, layer: int, ids: Sequence[int]) -> None:
        for expert in self.current.get(layer - 1, ()):
            self._after[layer - 1, expert].update(ids)
            self._uses[layer - 1, expert] += 1

    def probabilities(self) -> dict[int, float]:
        """Expert of the next layer -> mean over this layer's experts of how often it followed them."""
        total: defaultdict[int, float] = defaultdict(float)
        for expert in self.current[self.layer]:
            uses = self._uses[self.layer, expert] * self.used
            for following, count in self._after[self.layer, expert].items():
                total[following] += count / uses
        return total

    def predict(self, next_ids: Routes) -> list[int]:
        return best(self.probabilities().items(), self.used)


class ScoreDepth(Transition):
    """SpecMD: not a fixed number, but the likeliest until MASS of the k experts' probability, at most ``budget``.

    ``budget`` is what the link can bring while a layer computes. Scores are those of the transition table.
    """

    def __init__(self, budget: int = 16) -> None:
        super().__init__()
        self._budget = budget

    def predict(self, next_ids: Routes) -> list[int]:
        probability = self.probabilities()
        chosen, mass = [], 0.0
        for expert in best(probability.items(), self._budget):
            if mass >= MASS * self.used:
                break
            chosen.append(expert)
            mass += probability[expert]
        return chosen


class NearestMatrix(FromRoutes):
    """MoE-Infinity: counts of this sequence matched by cosine with those of earlier ones, whose next row is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self._matrix: Counter[tuple[int, int]] = Counter()
        self._collection: list[Counter[tuple[int, int]]] = []
        self._nearest: Counter[tuple[int, int]] | None = None

    def begin_sequence(self) -> None:
        super().begin_sequence()
        if self._matrix:
            self._collection = [*self._collection[-COLLECTION + 1 :], self._matrix]
        self._matrix, self._nearest = Counter(), None

    def learn(self, layer: int, ids: Sequence[int]) -> None:
        self._matrix.update((layer, expert) for expert in ids)

    def end_token(self, token: Token) -> None:
        self._nearest = max(self._collection, key=self._likeness, default=None)

    def _likeness(self, other: Counter[tuple[int, int]]) -> float:
        return sum(n * other[pair] for pair, n in self._matrix.items()) / sqrt(sum(n * n for n in other.values()))

    def predict(self, next_ids: Routes) -> list[int]:
        rows = self._nearest or self._matrix
        return best(((e, n) for (layer, e), n in rows.items() if layer == self.layer + 1), self.used)


class EchoPrefetch(FromRoutes):
    """What most of the most similar remembered tokens used in the next layer (see cache/echo.py)."""

    def __init__(self) -> None:
        super().__init__()
        self._similar = Similar()
        self._token = 0
        self._users: defaultdict[int, dict[int, int]] = defaultdict(dict)  # layer -> expert -> bits of tokens
        self._tokens: list[Token] = [{} for _ in range(TOKENS)]

    def learn(self, layer: int, ids: Sequence[int]) -> None:
        if len(self.current) == 1:
            self._similar.begin_token()
        users = self._users[layer]
        self._similar.add_layer([users.get(expert, 0) for expert in ids])

    def end_token(self, token: Token) -> None:
        at = self._token % TOKENS
        for layer, ids in self._tokens[at].items():
            for expert in ids:
                self._users[layer][expert] &= ~(1 << at)
        self._tokens[at] = token
        for layer, ids in token.items():
            for expert in ids:
                self._users[layer][expert] = self._users[layer].get(expert, 0) | 1 << at
        self._token += 1

    def predict(self, next_ids: Routes) -> list[int]:
        near = self._similar.best(NEIGHBOURS, ((1 << min(self._token, TOKENS)) - 1) & ALL)
        least = max(1, SURE * near.bit_count())
        votes = [(e, (bits & near).bit_count()) for e, bits in self._users[self.layer + 1].items()]
        return best(((e, n) for e, n in votes if n >= least), 2 * self.used)


def best(scores: Iterable[tuple[int, float]], count: int) -> list[int]:
    """The ``count`` experts of the highest scores; equal scores: the lower id."""
    return [expert for expert, _ in sorted(scores, key=lambda item: (-item[1], item[0]))[:count]]
