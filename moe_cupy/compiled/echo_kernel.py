"""The arithmetic of ``echo`` for Numba, function for function as in moe_cupy/cache/echo.py.

A set of remembered tokens, there an integer of 512 bits, is here eight words of 64. Formulas are written as there, in
the same order and without ``fastmath``, so that floats are equal to the bit and so are all decisions.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray, cfunc, from_dtype, njit, types
from numba.extending import intrinsic

from moe_cupy.cache.echo import LONGEST_REST, TOKENS
from moe_cupy.compiled.state import (
    ASKED,
    FIRST,
    FREE,
    KEYS,
    MISSING,
    PINNED,
    RECORD,
    SPANS,
    WORDS,
    floats,
    ints,
    sets,
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
    for i in range(1, s.sliced):
        s.slices[i - 1] = s.slices[i]
    s.slices[s.sliced - 1] = np.uint64(0)


@njit
def add_users(s, users):
    """2 more for the similarity of each of ``users`` [WORDS]."""
    for w in range(WORDS):
        carry, i = users[w], 1
        while carry:
            before = s.slices[i, w]
            s.slices[i, w] = before ^ carry
            carry &= before
            i += 1
        s.sliced = max(s.sliced, i)


@njit
def find_neighbours(s):
    """The most similar past tokens, those after them, and how many they weigh with the habit."""
    taken, left = s.near[0], s.near[1]
    taken[:] = np.uint64(0)
    left[:] = s.past
    for i in range(s.sliced - 1, -1, -1):
        bits, n = s.slices[i], np.uint64(0)
        for w in range(WORDS):
            n += ones(taken[w] | (left[w] & bits[w]))
        for w in range(WORDS):
            if n >= s.neighbours:
                left[w] &= bits[w]
            else:
                taken[w] |= left[w] & bits[w]
                left[w] &= ~bits[w]
    for w in range(WORDS):
        taken[w] |= left[w]
    for w in range(WORDS):
        left[w] = (taken[w] << ONE) | (taken[w - 1 if w else WORDS - 1] >> np.uint64(63))
    s.total = s.prior_weight + count(taken)
    s.found = 1


# ---------------------------------------------------------------------------------------------------------
# Echo


@njit
def probability(log_odds):
    return 1 / (1 + math.exp(-log_odds))


@njit
def begin(s, layer, keys):
    if layer <= s.layer:
        begin_token(s)
    s.layer, s.found, s.now = layer, 0, s.now + 1
    halve(s)
    used, last = sets(s.used), ints(s.last)
    for key in keys:
        add_users(s, used[key])
    at = s.token % TOKENS
    for key in keys:
        used[key, at // 64] |= bit_of(at)
        last[key] = s.token
    ints(s.turn)[layer] = s.token
    ints(s.stale)[layer] = 1
    look_at_hidden_again(s)


@njit
def begin_token(s):
    s.token += 1
    at, used = s.token % TOKENS, sets(s.used)
    for key in range(s.layers * s.experts):  # the token that was here is forgotten
        used[key, at // 64] &= ~bit_of(at)
    s.slices[:] = np.uint64(0)
    s.sliced = 2
    set_last(s.past, min(s.token, TOKENS - 1), (at - 1) % TOKENS)
    for i in range(SPANS):
        set_last(s.windows[i], s.spans[i], at)
    tabulate(s)


@njit
def tabulate(s):
    share, seen = min(1 / s.experts, 0.5), s.token + 1
    for i in range(SPANS):
        weight = s.habit[1 + i]
        if seen <= s.spans[i]:
            for n in range(seen + 1):
                s.of_uses[i, n] = weight * math.log((n + share) / (seen + 1 - n - share))


@njit
def look_at_hidden_again(s):
    stale, hidden = ints(s.stale), ints(s.hidden)
    for layer in range(s.layers):
        stale[layer] |= hidden[layer]
        hidden[layer] = 0


@njit
def admit(s, key):
    layer = key // s.experts
    residents = ints(s.residents)
    ints(s.resident)[layer * s.experts + residents[layer]] = key
    ints(s.place)[key] = residents[layer]
    residents[layer] += 1
    if not s.found:
        ints(s.stale)[layer] = 1
        return
    look_at(s, layer, key)
    lowest = ints(s.lowest_key)[layer]
    if lowest < 0 or goes_before(s, key, lowest):
        stands(s, layer, key)


@njit
def evict(s, key):
    layer = key // s.experts
    residents, resident, place = ints(s.residents), ints(s.resident), ints(s.place)
    residents[layer] -= 1
    moved = resident[layer * s.experts + residents[layer]]  # the last one closes the gap
    resident[layer * s.experts + place[key]] = moved
    place[moved], place[key] = place[key], -1
    if ints(s.lowest_key)[layer] == key:
        find_lowest(s, layer, False)


@njit
def victim(s):
    """Whom to give up, none that is ``pinned``; -1 if there is none."""
    prepare(s)
    while True:
        layer = least_dense_layer(s)
        if layer < 0:
            return -1
        key = ints(s.lowest_key)[layer]
        if ints(s.pinned)[key]:
            ints(s.hidden)[layer] = 1
            find_lowest(s, layer, True)
        elif ints(s.seen)[key] == s.now:
            return key
        else:
            look_at(s, layer, key)
            find_lowest(s, layer, False)


@njit
def least_dense_layer(s):
    """The layer whose lowest resident has the lowest q / d; -1 if nobody is left."""
    lowest = floats(s.lowest)
    least, found = np.inf, -1
    for layer in range(s.layers):
        density = lowest[layer] * (1 / ((layer - s.layer - 1) % s.layers + 1))
        if density < least:
            least, found = density, layer
    return found


@njit
def prepare(s):
    stale = ints(s.stale)
    if not s.found:
        find_neighbours(s)
        for ahead in range(1, s.refresh + 1):
            stale[(s.layer + ahead) % s.layers] = 1
    look_at_hidden_again(s)
    for layer in range(s.layers):
        if stale[layer]:
            look(s, layer)
            find_lowest(s, layer, False)
            stale[layer] = 0


@njit
def look(s, layer):
    """At all residents of a layer."""
    first, resident = layer * s.experts, ints(s.resident)
    for i in range(first, first + ints(s.residents)[layer]):
        look_at(s, layer, resident[i])


@njit
def look_at(s, layer, key):
    """The log-odds of a resident's q."""
    x = ((layer - s.layer - 1) % s.layers + 1) / s.layers
    bias, habit, near = s.mix[0] + s.mix[3] * x, s.mix[1] + s.mix[5] * x, s.mix[2] + s.mix[4] * x
    if ints(s.known)[key] != ints(s.turn)[layer]:
        learn_habit(s, key, ints(s.turn)[layer])
    uses = common(sets(s.used)[key], s.near[1 if layer <= s.layer else 0]) + floats(s.prior)[key]
    floats(s.chance)[key] = bias + habit * floats(s.odds)[key] + near * math.log(uses / (s.total - uses))
    ints(s.seen)[key] = s.now


@njit
def learn_habit(s, key, turn):
    used = sets(s.used)[key]
    odds = s.of_rest[min(turn - ints(s.last)[key], LONGEST_REST)]
    for i in range(SPANS):
        odds += s.of_uses[i, common(used, s.windows[i])]
    floats(s.odds)[key], floats(s.prior)[key], ints(s.known)[key] = odds, s.prior_weight * probability(odds), turn


@njit
def goes_before(s, key, other):
    chance = floats(s.chance)
    return chance[key] < chance[other] or (chance[key] == chance[other] and key < other)


@njit
def find_lowest(s, layer, passing_pinned):
    first, resident, pinned = layer * s.experts, ints(s.resident), ints(s.pinned)
    lowest = -1
    for i in range(first, first + ints(s.residents)[layer]):
        key = resident[i]
        if (lowest < 0 or goes_before(s, key, lowest)) and not (passing_pinned and pinned[key]):
            lowest = key
    stands(s, layer, lowest)


@njit
def stands(s, layer, key):
    ints(s.lowest_key)[layer] = key
    floats(s.lowest)[layer] = probability(floats(s.chance)[key]) if key >= 0 else np.inf


# ---------------------------------------------------------------------------------------------------------
# One call


@njit
def exchange(s, incoming, free):
    """``Policy.exchange``; the victims go to the outbox."""
    gone, outbox = 0, ints(s.outbox)
    for i in range(len(incoming)):
        if i >= free:
            leaving = victim(s)
            if leaving < 0:
                break
            evict(s, leaving)
            gone += 1
            outbox[gone] = leaving
        admit(s, incoming[i])
    outbox[0] = gone


@njit
def pin(s, keys, value):
    pinned = ints(s.pinned)
    for key in keys:
        pinned[key] = value


@cfunc(types.void(types.CPointer(from_dtype(RECORD))), cache=True)
def step(address):
    """Do what the inbox asks: an event, or a part of one."""
    s = carray(address, (1,))[0]
    box, outbox = ints(s.inbox), ints(s.outbox)
    missing = FIRST + box[KEYS]
    pinned = missing + box[MISSING]
    keys, kept = box[FIRST:missing], box[pinned : pinned + box[PINNED]]
    pin(s, keys, 1)
    pin(s, kept, 1)
    if box[ASKED] == EVICT:
        evict(s, keys[0])
    elif box[ASKED] == VICTIM:
        outbox[1] = victim(s)
        outbox[0] = outbox[1] >= 0
    else:
        if box[ASKED] >= 0:
            begin(s, box[ASKED], keys)
        exchange(s, box[missing:pinned], box[FREE])
    pin(s, keys, 0)
    pin(s, kept, 0)
