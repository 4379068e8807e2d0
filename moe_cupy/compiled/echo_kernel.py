"""The arithmetic of ``echo`` for Numba, function for function as in moe_cupy/cache/echo.py.

Formulas are written as there, in the same order and without ``fastmath``, so that floats are equal to the bit and so
are all decisions.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray, cfunc, from_dtype, njit, types

from moe_cupy.cache.echo import LONGEST_REST, TOKENS, TURNS
from moe_cupy.compiled.similar import ONE, add_users, bit_of, common, find_neighbours, halve, ones, set_last
from moe_cupy.compiled.state import (
    ASKED,
    FIRST,
    FREE,
    KEYS,
    MISSING,
    PINNED,
    RECORD,
    SPANS,
    floats,
    ints,
    sets,
    table,
)

EXCHANGE, VICTIM, EVICT = -1, -2, -3  # what may be asked where an event has its layer


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
    at, users = s.token % TOKENS, users_of(s)[s.token % TOKENS]
    for key in keys:
        used[key, at // 64] |= bit_of(at)
        users[key // 64] |= bit_of(key)
        last[key] = s.token
    ints(s.turn)[layer] = s.token
    ints(s.stale)[layer] = 1
    look_at_hidden_again(s)


@njit
def begin_token(s):
    s.token += 1
    at = s.token % TOKENS
    forget(s, at)
    s.slices[:] = np.uint64(0)
    s.sliced = 2
    set_last(s.past, min(s.token, TOKENS - 1), (at - 1) % TOKENS)
    for i in range(SPANS):
        set_last(s.windows[i], s.spans[i], at)
    tabulate(s)


@njit
def users_of(s):
    return table(s.users, s.layers * s.experts // 64 + 1)


@njit
def forget(s, at):
    """The token that was at this position."""
    users, used = users_of(s)[at], sets(s.used)
    for w in range(s.layers * s.experts // 64 + 1):
        while users[w]:
            lowest = users[w] & (~users[w] + ONE)
            used[64 * w + np.int64(ones(lowest - ONE)), at // 64] &= ~bit_of(at)
            users[w] ^= lowest


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
    compare(s, layer, key)


@njit
def compare(s, layer, key):
    """Who stands for a layer: who did, or ``key``."""
    lowest, q, later = ints(s.lowest), floats(s.q), floats(s.later)
    ahead, other = ahead_of(s, layer), lowest[layer]
    if other >= 0:
        worth, least = max(q[key] / ahead, later[key]), max(q[other] / ahead, later[other])
        if worth > least or (worth == least and key > other):
            return
    lowest[layer] = key


@njit
def evict(s, key):
    layer = key // s.experts
    residents, resident, place = ints(s.residents), ints(s.resident), ints(s.place)
    residents[layer] -= 1
    moved = resident[layer * s.experts + residents[layer]]  # the last one closes the gap
    resident[layer * s.experts + place[key]] = moved
    place[moved], place[key] = place[key], -1
    if ints(s.lowest)[layer] == key:
        find_lowest(s, layer, False)


@njit
def victim(s):
    """Whom to give up, none that is ``pinned``; -1 if there is none."""
    prepare(s)
    while True:
        key = least_worth(s)
        if key < 0:
            return -1
        layer = key // s.experts
        if ints(s.pinned)[key]:
            ints(s.hidden)[layer] = 1
            find_lowest(s, layer, True)
        elif ints(s.seen)[key] == s.now:
            return key
        else:
            look_at(s, layer, key)
            find_lowest(s, layer, False)


@njit
def least_worth(s):
    """Of those who stand for a layer, the one that is worth least; -1 if nobody is left."""
    lowest, q, later = ints(s.lowest), floats(s.q), floats(s.later)
    least, found = np.inf, -1
    for layer in range(s.layers):
        key = lowest[layer]
        if key >= 0:
            worth = max(q[key] / ahead_of(s, layer), later[key])
            if worth < least:
                least, found = worth, key
    return found


@njit
def ahead_of(s, layer):
    ahead = layer - s.layer
    return ahead if ahead > 0 else ahead + s.layers


@njit
def prepare(s):
    stale = ints(s.stale)
    if not s.found:
        find_neighbours(s)
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
    """What a resident promises."""
    ahead = ahead_of(s, layer)
    x = ahead / s.layers
    bias, habit, near = s.mix[0] + s.mix[3] * x, s.mix[1] + s.mix[5] * x, s.mix[2] + s.mix[4] * x
    if ints(s.known)[key] != ints(s.turn)[layer]:
        learn_habit(s, key, ints(s.turn)[layer])
    first = 1 if layer <= s.layer else 0
    used, prior = sets(s.used)[key], floats(s.prior)[key]
    uses = common(used, s.near[first]) + prior
    q = probability(bias + habit * floats(s.odds)[key] + near * math.log(uses / (s.total[first] - uses)))
    hits, waited, best = q, ahead, 0.0
    for i in range(first + 1, min(first + TURNS, TURNS + 1)):
        hits += (common(used, s.near[i]) + prior) / s.total[i]
        waited += s.layers
        best = max(best, hits / waited)
    floats(s.q)[key], floats(s.later)[key], ints(s.seen)[key] = q, best, s.now


@njit
def learn_habit(s, key, turn):
    used = sets(s.used)[key]
    odds = s.of_rest[min(turn - ints(s.last)[key], LONGEST_REST)]
    for i in range(SPANS):
        odds += s.of_uses[i, common(used, s.windows[i])]
    floats(s.odds)[key], floats(s.prior)[key], ints(s.known)[key] = odds, s.prior_weight * probability(odds), turn


@njit
def find_lowest(s, layer, passing_pinned):
    first, resident, pinned = layer * s.experts, ints(s.resident), ints(s.pinned)
    q, later, ahead = floats(s.q), floats(s.later), ahead_of(s, layer)
    least, lowest = np.inf, -1
    for i in range(first, first + ints(s.residents)[layer]):
        key = resident[i]
        worth = max(q[key] / ahead, later[key])
        if (worth < least or (worth == least and key < lowest)) and not (passing_pinned and pinned[key]):
            least, lowest = worth, key
    ints(s.lowest)[layer] = lowest


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
