"""The arithmetic of ``echo`` for Numba, function for function as in moe_cupy/cache/echo.py.

A set of remembered tokens, there an integer of 512 bits, is here eight words of 64. Formulas are written as there, in
the same order and without ``fastmath``, so that floats are equal to the bit and so are all decisions.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cfunc, njit, types
from numba.extending import intrinsic

from moe_cupy.cache.echo import LONGEST_REST, NEIGHBOURS, PRIOR, REFRESH, TOKENS, WINDOWS
from moe_cupy.compiled.state import (
    ASKED,
    EXPERTS,
    FIRST,
    FOUND,
    FREE,
    KEYS,
    LAYER,
    LAYERS,
    MISSING,
    NOW,
    PINNED,
    SLICED,
    SLICES,
    TOKEN,
    WORDS,
    state_at,
)

EXCHANGE, VICTIM, EVICT = -1, -2, -3  # what may be asked where an event has its layer
ONE = np.uint64(1)


@intrinsic
def ones(typingctx, word):
    """Bits of a word that are set."""

    def codegen(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), codegen


@njit
def count(bits):
    """Tokens of a set [W]."""
    n = np.uint64(0)
    for w in range(WORDS):
        n += ones(bits[w])
    return np.int64(n)


@njit
def common(a, b):
    """Tokens of both sets [W]."""
    n = np.uint64(0)
    for w in range(WORDS):
        n += ones(a[w] & b[w])
    return np.int64(n)


@njit
def bit_of(position):
    return ONE << np.uint64(position % 64)


@njit
def set_last(bits, n, at):
    """The ``n`` positions of the ring that end at ``at``: ``last_bits``."""
    bits[:] = np.uint64(0)
    for i in range(n):
        position = (at - i) % TOKENS
        bits[position // 64] |= bit_of(position)


# ---------------------------------------------------------------------------------------------------------
# Similar


@njit
def halve(s):
    """Every similarity loses its lowest bit."""
    for i in range(1, s.head[SLICED]):
        s.slices[i - 1] = s.slices[i]
    s.slices[max(0, s.head[SLICED] - 1)] = np.uint64(0)


@njit
def add_users(s, users):
    """2 more for the similarity of each of ``users`` [W]."""
    for w in range(WORDS):
        carry, i = users[w], 1
        while carry:
            before = s.slices[i, w]
            s.slices[i, w] = before ^ carry
            carry &= before
            i += 1
        s.head[SLICED] = max(s.head[SLICED], i)


@njit
def find_neighbours(s):
    """The most similar past tokens, those after them, and how many they weigh with the habit."""
    taken, left = s.near[0], s.near[1]
    taken[:] = np.uint64(0)
    left[:] = s.past[0]
    for i in range(s.head[SLICED] - 1, -1, -1):
        bits, n = s.slices[i], np.uint64(0)
        for w in range(WORDS):
            n += ones(taken[w] | (left[w] & bits[w]))
        enough = np.int64(n) >= NEIGHBOURS
        for w in range(WORDS):
            if enough:
                left[w] &= bits[w]
            else:
                taken[w] |= left[w] & bits[w]
                left[w] &= ~bits[w]
    for w in range(WORDS):
        taken[w] |= left[w]
    for w in range(WORDS):
        left[w] = (taken[w] << ONE) | (taken[w - 1 if w else WORDS - 1] >> np.uint64(63))
    s.total[0] = PRIOR + count(taken)
    s.head[FOUND] = 1


# ---------------------------------------------------------------------------------------------------------
# Echo


@njit
def probability(log_odds):
    return 1 / (1 + math.exp(-log_odds))


@njit
def begin(s, layer, keys):
    head = s.head
    if layer <= head[LAYER]:
        begin_token(s)
    head[LAYER], head[FOUND] = layer, 0
    head[NOW] += 1
    halve(s)
    for key in keys:
        add_users(s, s.used[key])
    word, bit = (head[TOKEN] % TOKENS) // 64, bit_of(head[TOKEN] % TOKENS)
    for key in keys:
        s.used[key, word] |= bit
        s.last[key] = head[TOKEN]
    s.turn[layer] = head[TOKEN]
    s.stale[layer] = 1
    look_at_hidden_again(s)


@njit
def begin_token(s):
    head = s.head
    head[TOKEN] += 1
    at = head[TOKEN] % TOKENS
    word, others = at // 64, ~bit_of(at)
    for key in range(len(s.used)):  # the token that was here is forgotten
        s.used[key, word] &= others
    s.slices[:] = np.uint64(0)
    head[SLICED] = 2
    set_last(s.past[0], min(head[TOKEN], TOKENS - 1), (at - 1) % TOKENS)
    for i in range(len(WINDOWS)):
        set_last(s.windows[i], WINDOWS[i], at)
    tabulate(s)


@njit
def tabulate(s):
    share, seen = min(1 / s.head[EXPERTS], 0.5), s.head[TOKEN] + 1
    for i in range(len(WINDOWS)):
        weight = s.habit[1 + i]
        if seen <= WINDOWS[i]:
            for n in range(seen + 1):
                s.of_uses[i, n] = weight * math.log((n + share) / (seen + 1 - n - share))


@njit
def look_at_hidden_again(s):
    for layer in range(s.head[LAYERS]):
        s.stale[layer] |= s.hidden[layer]
        s.hidden[layer] = 0


@njit
def admit(s, key):
    layer = key // s.head[EXPERTS]
    s.resident[key] = 1
    if s.head[FOUND]:
        look(s, layer, key, key + 1)
        lowest = s.lowest_key[layer]
        if lowest < 0 or s.chance[key] < s.chance[lowest] or (s.chance[key] == s.chance[lowest] and key < lowest):
            stands(s, layer, key)
    else:
        s.stale[layer] = 1


@njit
def evict(s, key):
    layer = key // s.head[EXPERTS]
    s.resident[key] = 0
    if s.lowest_key[layer] == key:
        find_lowest(s, layer, False)


@njit
def victim(s):
    """Whom to give up, none that is ``pinned``; -1 if there is none."""
    prepare(s)
    while True:
        layer = lowest_density(s)
        if layer < 0:
            return -1
        key = s.lowest_key[layer]
        if s.pinned[key]:
            s.hidden[layer] = 1
            find_lowest(s, layer, True)
        elif s.seen[key] == s.head[NOW]:
            return key
        else:
            look(s, layer, key, key + 1)
            find_lowest(s, layer, False)


@njit
def lowest_density(s):
    """The layer whose lowest resident has the lowest q / d; -1 if nobody is left."""
    layers, now = s.head[LAYERS], s.head[LAYER]
    least, found = np.inf, -1
    for layer in range(layers):
        density = s.lowest[layer] * (1 / ((layer - now - 1) % layers + 1))
        if density < least:
            least, found = density, layer
    return found


@njit
def prepare(s):
    layers, experts = s.head[LAYERS], s.head[EXPERTS]
    if not s.head[FOUND]:
        find_neighbours(s)
        for ahead in REFRESH:
            s.stale[(s.head[LAYER] + ahead) % layers] = 1
    look_at_hidden_again(s)
    for layer in range(layers):
        if s.stale[layer]:
            look(s, layer, layer * experts, (layer + 1) * experts)
            find_lowest(s, layer, False)
            s.stale[layer] = 0


@njit
def look(s, layer, first, end):
    """The log-odds of q of the residents among keys ``first`` to ``end`` of the layer."""
    layers, now = s.head[LAYERS], s.head[LAYER]
    x = ((layer - now - 1) % layers + 1) / layers
    bias, habit, near = s.mix[0] + s.mix[3] * x, s.mix[1] + s.mix[5] * x, s.mix[2] + s.mix[4] * x
    neighbours, total, turn = s.near[1 if layer <= now else 0], s.total[0], s.turn[layer]
    for key in range(first, end):
        if s.resident[key]:
            if s.known[key] != turn:
                learn_habit(s, key, turn)
            uses = common(s.used[key], neighbours) + s.prior[key]
            s.chance[key] = bias + habit * s.odds[key] + near * math.log(uses / (total - uses))
            s.seen[key] = s.head[NOW]


@njit
def learn_habit(s, key, turn):
    odds = s.of_rest[min(turn - s.last[key], LONGEST_REST)]
    for i in range(len(WINDOWS)):
        odds += s.of_uses[i, common(s.used[key], s.windows[i])]
    s.odds[key], s.prior[key], s.known[key] = odds, PRIOR * probability(odds), turn


@njit
def find_lowest(s, layer, passing_pinned):
    experts = s.head[EXPERTS]
    lowest, least = -1, np.inf
    for key in range(layer * experts, (layer + 1) * experts):
        if s.resident[key] and s.chance[key] < least and not (passing_pinned and s.pinned[key]):
            least, lowest = s.chance[key], key
    stands(s, layer, lowest)


@njit
def stands(s, layer, key):
    s.lowest_key[layer] = key
    s.lowest[layer] = probability(s.chance[key]) if key >= 0 else np.inf


# ---------------------------------------------------------------------------------------------------------
# One call


@njit
def exchange(s, incoming, free):
    """``Policy.exchange``; the victims go to the outbox."""
    gone = 0
    for i in range(len(incoming)):
        if i >= free:
            leaving = victim(s)
            if leaving < 0:
                break
            evict(s, leaving)
            gone += 1
            s.outbox[gone] = leaving
        admit(s, incoming[i])
    s.outbox[0] = gone


@njit
def pin(s, keys, value):
    for key in keys:
        s.pinned[key] = value


@cfunc("void(CPointer(int64))", cache=True)
def step(addresses):
    """Do what the inbox asks: an event, or a part of one."""
    s = state_at(addresses)
    box = s.inbox
    missing = FIRST + box[KEYS]
    pinned = missing + box[MISSING]
    in_use = box[FIRST:missing], box[pinned : pinned + box[PINNED]]
    for keys in in_use:
        pin(s, keys, 1)
    if box[ASKED] == EVICT:
        evict(s, box[FIRST])
    elif box[ASKED] == VICTIM:
        s.outbox[1] = victim(s)
        s.outbox[0] = s.outbox[1] >= 0
    else:
        if box[ASKED] >= 0:
            begin(s, box[ASKED], in_use[0])
        exchange(s, box[missing:pinned], box[FREE])
    for keys in in_use:
        pin(s, keys, 0)
