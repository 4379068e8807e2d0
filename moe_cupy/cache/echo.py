"""``echo``: routes repeat those of similar tokens seen before; keep what they say will be used soonest.

Three ideas, each a few lines.

*Memory.* The last 1024 tokens are bits of an integer: ``used[key]`` has the bit of every token that used the key. How
often was it used in the last 8? ``(used[key] & last_8).bit_count()``.

*Similarity.* A token resembles the current one by how many experts they shared, layer by layer, older layers counting
half each layer: ``similarity = similarity / 2 + 2 * shared``. The 1024 similarities are one bit-sliced number (a list
of integers, the least significant bits first), so adding an expert's users is a ripple of ANDs and XORs over all tokens
at once. The ``NEIGHBOURS`` most similar ones are found by descending the bits.

*Hit density.* Whoever lies in a slot until its layer's next turn, ``d`` layers ahead, costs d and brings a hit with
probability q; until the turn after that, d + L layers, it brings q + q', and so on for ``TURNS`` turns. Its worth is
the best of these, hits per layer of waiting; the lowest goes. q is a logistic of two log-odds: the key's own habit
(uses in the last 8, 64, 1023 tokens and since when it rests) and what the neighbours did in that layer (for layers
whose turn has passed: what the tokens after them did). Near turns lean on neighbours, far ones on habit; for later
turns the habit is a few more neighbours. The weights are in echo.toml, fitted on recorded traces.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path

from moe_cupy.cache.policies import Geometry, Policy, Scores

TOKENS = 1024  # remembered
NEIGHBOURS = 4
TURNS = 4  # of its layer that a resident may wait for
WINDOWS = (8, 64, TOKENS - 1)
LONGEST_REST = 300  # tokens: no difference beyond
PRIOR = 3.0  # neighbours' worth of habit that is mixed with what the neighbours say
ALL = (1 << TOKENS) - 1
WEIGHTS = Path(__file__).with_name("echo.toml")


def load_weights() -> dict[str, list[float]]:
    """The fitted weights: ``habit`` (bias, log-odds of three windows, log rest), ``mix`` (see ``Echo._refresh``)."""
    weights: dict[str, list[float]] = tomllib.loads(WEIGHTS.read_text("utf-8"))["weights"]
    return weights


class Similar:
    """How much each remembered token resembles the current one, as a bit-sliced number; positions are bits."""

    def __init__(self) -> None:
        self._slices: list[int] = []  # of all similarities: bit 0 of each, bit 1 of each, …

    def begin_token(self) -> None:
        """Nothing is known of the new token."""
        self._slices = []

    def add_layer(self, users: Sequence[int]) -> None:
        """One more layer: halve, then add 2 for every expert shared; ``users`` are who used each expert."""
        slices = [*self._slices[1:], 0, 0][: max(2, len(self._slices))]
        for carry in users:
            at = 1
            while carry:
                if at == len(slices):
                    slices.append(0)
                slices[at], carry = slices[at] ^ carry, slices[at] & carry
                at += 1
        self._slices = slices

    def best(self, count: int, among: int) -> int:
        """The ``count`` most similar of ``among`` and all that equal the last of them, as bits."""
        taken, left = 0, among
        for bits in reversed(self._slices):
            with_bit = left & bits
            if (taken | with_bit).bit_count() >= count:
                left = with_bit
            else:
                taken |= with_bit
                left &= ~bits
        return taken | left


class Echo(Policy):
    """See the module. Residents are kept by layer with what was last known of them; the lowest stands for a layer.

    This is the definition. The runtime runs moe_cupy/compiled/echo.py, which decides the same, key for key.
    """

    def __init__(self, geometry: Geometry, weights: dict[str, list[float]] | None = None) -> None:
        self._layers, self._experts = geometry.layers, geometry.experts
        pairs = geometry.layers * geometry.experts
        weights = weights or load_weights()
        self._habit, self._mix = weights["habit"], weights["mix"]
        self._of_rest = [self._habit[0] + self._habit[-1] * math.log(1 + rest) for rest in range(LONGEST_REST + 1)]
        self._of_uses: list[list[float]] = [[0.0] for _ in WINDOWS]
        self._similar = Similar()
        self._token, self._layer, self._event = -1, geometry.layers - 1, 0  # before the first
        self._used = [0] * pairs  # bits of the tokens that used a key
        self._users_of: list[list[int]] = [[] for _ in range(TOKENS)]  # keys used by the token at each position
        self._last = [-LONGEST_REST] * pairs  # the last token that used a key
        self._odds, self._prior = [0.0] * pairs, [0.0] * pairs  # of habit: its log-odds, and PRIOR x its probability
        self._known = [-2] * pairs  # the turn of its layer after which these were computed
        self._q, self._later = [0.0] * pairs, [0.0] * pairs  # of the next turn; density of waiting for later ones
        self._seen = [0] * pairs  # the event these are from
        self._turn = [-1] * geometry.layers  # the token of each layer's last turn
        self._resident: list[set[int]] = [set() for _ in range(geometry.layers)]
        self._lowest = [-1] * geometry.layers  # the resident of a layer that is worth least
        self._stale: set[int] = set()  # layers to look at before someone is given up
        self._hidden: set[int] = set()  # layers whose lowest leaves out someone pinned
        self._windows = (0,) * len(WINDOWS)  # the last 8, 64, … tokens as bits
        self._bit = self._past = 0  # the current token, and those before it, as bits
        self._turns = [(0, PRIOR)] * (TURNS + 1)  # the most similar tokens, those after them, …; how many, with PRIOR
        self._found = False  # whether this event's neighbours are known

    def begin(self, layer: int, keys: Sequence[int], scores: Scores | None = None) -> None:
        if layer <= self._layer:
            self._begin_token()
        self._layer, self._event, self._found = layer, self._event + 1, False
        used, bit = self._used, self._bit
        self._similar.add_layer([used[key] for key in keys])
        self._users_of[self._token % TOKENS] += keys
        for key in keys:
            used[key] |= bit
            self._last[key] = self._token
        self._turn[layer] = self._token
        self._stale.add(layer)
        self._stale |= self._hidden
        self._hidden.clear()

    def _begin_token(self) -> None:
        self._token += 1
        at = self._token % TOKENS
        self._bit = 1 << at
        for key in self._users_of[at]:  # the token that was here is forgotten
            self._used[key] &= ~self._bit
        self._users_of[at] = []
        self._similar.begin_token()
        self._past = ((1 << min(self._token, TOKENS)) - 1) & ~self._bit
        self._windows = tuple(last_bits(window, at) for window in WINDOWS)
        self._tabulate()

    def _tabulate(self) -> None:
        """What each number of uses in each window adds to the log-odds; the same for good when the windows are full."""
        share, seen = min(1 / self._experts, 0.5), self._token + 1
        for i, (window, weight) in enumerate(zip(WINDOWS, self._habit[1:-1], strict=True)):
            if seen <= window:
                self._of_uses[i] = [weight * math.log((n + share) / (seen + 1 - n - share)) for n in range(seen + 1)]

    def admit(self, key: int) -> None:
        layer = key // self._experts
        self._resident[layer].add(key)
        if self._found:
            self._look(layer, (key,))
            self._update(layer, key)
        else:
            self._stale.add(layer)

    def evict(self, key: int) -> None:
        layer = key // self._experts
        self._resident[layer].remove(key)
        if self._lowest[layer] == key:
            self._find_lowest(layer, ())

    def victim(self, pinned: Collection[int]) -> int | None:
        self._prepare()
        while True:
            key = min([key for key in self._lowest if key >= 0], key=self._worth, default=-1)
            if key < 0:
                return None
            layer = key // self._experts
            if key in pinned:
                self._hidden.add(layer)
                self._find_lowest(layer, pinned)
            elif self._seen[key] == self._event:
                return key
            else:  # it looked dispensable some layers ago: does it still?
                self._look(layer, (key,))
                self._find_lowest(layer, ())

    def _worth(self, key: int) -> float:
        """Hits per layer of waiting that the key promises from here."""
        now, later = self._q[key] / self._ahead(key // self._experts), self._later[key]
        return now if now > later else later

    def _ahead(self, layer: int) -> int:
        """Layers until a layer's next turn: 1 for the next one, L for the current one."""
        ahead = layer - self._layer
        return ahead if ahead > 0 else ahead + self._layers

    def _prepare(self) -> None:
        """Look at who was used or came, and whose turn has just been."""
        if not self._found:
            self._find_neighbours()
        self._stale |= self._hidden
        self._hidden.clear()
        for layer in sorted(self._stale):
            self._look(layer, self._resident[layer])
            self._find_lowest(layer, ())
        self._stale.clear()

    def _find_neighbours(self) -> None:
        """The most similar tokens and, turn by turn, those after them, as far as there are any."""
        near, future = self._similar.best(NEIGHBOURS, self._past), 1 << (self._token + 1) % TOKENS
        self._turns, self._found = [(near, PRIOR + near.bit_count())], True
        for _ in range(TURNS):
            near = (near << 1 | near >> (TOKENS - 1)) & ALL & ~future
            self._turns.append((near, PRIOR + near.bit_count()))

    def _look(self, layer: int, keys: Collection[int]) -> None:
        """Compute what ``keys``, all of one layer, promise, from habit and neighbours."""
        bias, habit, near, far, near_far, habit_far = self._mix
        ahead, turn = self._ahead(layer), self._turn[layer]
        x = ahead / self._layers  # of a token until its turn
        bias, habit, near = bias + far * x, habit + habit_far * x, near + near_far * x
        (bits, total), *later = self._turns[layer <= self._layer :][:TURNS]
        for key in keys:
            if self._known[key] != turn:
                self._learn_habit(key, turn)
            uses = (self._used[key] & bits).bit_count() + self._prior[key]
            q = probability(bias + habit * self._odds[key] + near * math.log(uses / (total - uses)))
            self._q[key], self._later[key], self._seen[key] = q, self._density(key, q, ahead, later), self._event

    def _density(self, key: int, hits: float, waited: float, later: Sequence[tuple[int, float]]) -> float:
        """The most hits per layer of waiting for a turn after the next, which brings ``hits`` after ``waited``."""
        used, prior, best = self._used[key], self._prior[key], 0.0
        for bits, total in later:
            hits += ((used & bits).bit_count() + prior) / total
            waited += self._layers
            best = max(best, hits / waited)
        return best

    def _learn_habit(self, key: int, turn: int) -> None:
        """Log-odds that the key is used at its next turn, whatever the token."""
        used, rest = self._used[key], turn - self._last[key]
        odds = self._of_rest[rest if rest < LONGEST_REST else LONGEST_REST]
        for table, bits in zip(self._of_uses, self._windows, strict=True):
            odds += table[(used & bits).bit_count()]
        self._odds[key], self._prior[key], self._known[key] = odds, PRIOR * probability(odds), turn

    def _find_lowest(self, layer: int, pinned: Collection[int]) -> None:
        """Who of a layer's residents but ``pinned`` is worth least; of equals the one with the lowest id."""
        there, ahead, q, later = self._resident[layer], self._ahead(layer), self._q, self._later
        candidates = [key for key in there if key not in pinned] if pinned else there
        self._lowest[layer] = min([(max(q[key] / ahead, later[key]), key) for key in candidates], default=(0, -1))[1]

    def _update(self, layer: int, key: int) -> None:
        lowest = self._lowest[layer]
        if lowest < 0 or (self._worth(key), key) < (self._worth(lowest), lowest):
            self._lowest[layer] = key


def probability(log_odds: float) -> float:
    """What has these log-odds."""
    return 1 / (1 + math.exp(-log_odds))


def last_bits(count: int, at: int) -> int:
    """The ``count`` positions of a ring of TOKENS that end at ``at``, as bits."""
    run = ((1 << count) - 1) << (at - count + 1) % TOKENS
    return (run | run >> TOKENS) & ALL
