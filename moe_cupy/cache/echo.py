"""``echo``: routes repeat those of similar tokens seen before; keep what they say will be used soonest.

Three ideas, each a few lines.

*Memory.* The last 512 tokens are bits of an integer: ``used[key]`` has the bit of every token that used the key. How
often was it used in the last 8? ``(used[key] & last_8).bit_count()``.

*Similarity.* A token resembles the current one by how many experts they shared, layer by layer, older layers counting
half each layer: ``similarity = similarity / 2 + 2 * shared``. The 512 similarities are one bit-sliced number (a list of
integers, the least significant bits first), so adding an expert's users is a ripple of ANDs and XORs over all tokens
at once. The ``NEIGHBOURS`` most similar ones are found by descending the bits.

*Hit density.* Whoever lies in a slot until its layer's next turn, ``d`` layers ahead, costs d and brings a hit with
probability q: the lowest q / d goes. q is a logistic of two log-odds: the key's own habit (uses in the last 8, 64, 511
tokens and since when it rests) and what the neighbours did in that layer (for layers whose turn has passed: what the
tokens after them did). Near turns lean on neighbours, far ones on habit. The weights are in
echo.toml, fitted on recorded traces.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path

from moe_cupy.cache.policies import Geometry, Policy, Scores

TOKENS = 512  # remembered
NEIGHBOURS = 8
WINDOWS = (8, 64, TOKENS - 1)
LONGEST_REST = 300  # tokens: no difference beyond
PRIOR = 3.0  # neighbours' worth of habit that is mixed with what the neighbours say
REFRESH = 1  # layers ahead, whose residents are looked at anew when someone has to go
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
    """See the module. Residents are kept by layer with their last known log-odds of q; the lowest stands for a layer.

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
        self._chance, self._seen = [0.0] * pairs, [0] * pairs  # log-odds of q, and the event that they are from
        self._turn = [-1] * geometry.layers  # the token of each layer's last turn
        self._resident: list[set[int]] = [set() for _ in range(geometry.layers)]
        self._lowest: list[float] = [math.inf] * geometry.layers  # the least q of a layer's residents …
        self._lowest_key = [-1] * geometry.layers  # … and whose it is
        self._stale: set[int] = set()  # layers to look at before someone is given up
        self._hidden: set[int] = set()  # layers whose lowest leaves out someone pinned
        self._windows = (0,) * len(WINDOWS)  # the last 8, 64, … tokens as bits
        self._bit = self._past = 0  # the current token, and those before it, as bits
        self._neighbours, self._total = (0, 0), PRIOR  # the most similar tokens and those after them, as bits
        self._found = False  # whether this event's neighbours are known
        self._per_layer = [[1 / d for d in self._distances(layer)] for layer in range(geometry.layers)]

    def _distances(self, layer: int) -> list[int]:
        return [(other - layer - 1) % self._layers + 1 for other in range(self._layers)]

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
        if self._lowest_key[layer] == key:
            self._find_lowest(layer, ())

    def victim(self, pinned: Collection[int]) -> int | None:
        self._prepare()
        per_layer = self._per_layer[self._layer]
        while True:
            density = [q * share for q, share in zip(self._lowest, per_layer, strict=True)]
            least = min(density)
            if least == math.inf:
                return None
            layer = density.index(least)
            key = self._lowest_key[layer]
            if key in pinned:
                self._hidden.add(layer)
                self._find_lowest(layer, pinned)
            elif self._seen[key] == self._event:
                return key
            else:  # it looked dispensable some layers ago: does it still?
                self._look(layer, (key,))
                self._find_lowest(layer, ())

    def _prepare(self) -> None:
        """Look at what had its turn, and at what is about to have it."""
        if not self._found:
            near = self._similar.best(NEIGHBOURS, self._past)
            after = (near << 1 | near >> (TOKENS - 1)) & ALL
            self._neighbours, self._total, self._found = (near, after), PRIOR + near.bit_count(), True
            self._stale.update((self._layer + ahead) % self._layers for ahead in range(1, REFRESH + 1))
        self._stale |= self._hidden
        self._hidden.clear()
        for layer in sorted(self._stale):
            self._look(layer, self._resident[layer])
            self._find_lowest(layer, ())
        self._stale.clear()

    def _look(self, layer: int, keys: Collection[int]) -> None:
        """Compute q of ``keys``, all of one layer, from habit and neighbours."""
        bias, habit, near, far, near_far, habit_far = self._mix
        x = ((layer - self._layer - 1) % self._layers + 1) / self._layers  # of a token until its turn
        bias, habit, near = bias + far * x, habit + habit_far * x, near + near_far * x
        bits, total, turn = self._neighbours[layer <= self._layer], self._total, self._turn[layer]
        used, odds, prior, seen, known = self._used, self._odds, self._prior, self._seen, self._known
        for key in keys:
            if known[key] != turn:
                self._learn_habit(key, turn)
            uses = (used[key] & bits).bit_count() + prior[key]
            self._chance[key] = bias + habit * odds[key] + near * math.log(uses / (total - uses))
            seen[key] = self._event

    def _learn_habit(self, key: int, turn: int) -> None:
        """Log-odds that the key is used at its next turn, whatever the token."""
        used, rest = self._used[key], turn - self._last[key]
        odds = self._of_rest[rest if rest < LONGEST_REST else LONGEST_REST]
        for table, bits in zip(self._of_uses, self._windows, strict=True):
            odds += table[(used & bits).bit_count()]
        self._odds[key], self._prior[key], self._known[key] = odds, PRIOR * probability(odds), turn

    def _find_lowest(self, layer: int, pinned: Collection[int]) -> None:
        """Who of a layer's residents but ``pinned`` has the lowest q; of equals the one with the lowest id."""
        there, chance = self._resident[layer], self._chance
        candidates = [key for key in there if key not in pinned] if pinned else there
        self._stands(layer, min(candidates, key=lambda key: (chance[key], key), default=-1))

    def _update(self, layer: int, key: int) -> None:
        lowest, chance = self._lowest_key[layer], self._chance
        if lowest < 0 or (chance[key], key) < (chance[lowest], lowest):
            self._stands(layer, key)

    def _stands(self, layer: int, key: int) -> None:
        """``key`` stands for the layer (-1: nobody is left)."""
        self._lowest_key[layer] = key
        self._lowest[layer] = probability(self._chance[key]) if key >= 0 else math.inf


def probability(log_odds: float) -> float:
    """What has these log-odds."""
    return 1 / (1 + math.exp(-log_odds))


def last_bits(count: int, at: int) -> int:
    """The ``count`` positions of a ring of TOKENS that end at ``at``, as bits."""
    run = ((1 << count) - 1) << (at - count + 1) % TOKENS
    return (run | run >> TOKENS) & ALL
