"""What the compiled ``echo`` knows: arrays, handed over as one array of their addresses."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from moe_cupy.cache.echo import LONGEST_REST, TOKENS, WINDOWS

WORDS = TOKENS // 64  # of a set of remembered tokens
SLICES = 24  # bits of a similarity, which is at most 4 x the experts of an event
SPANS = len(WINDOWS)
LAYERS, EXPERTS, TOKEN, LAYER, NOW, FOUND, SLICED, HEAD = range(8)  # of the head
ASKED, KEYS, MISSING, FREE, PINNED, FIRST = range(6)  # of the inbox: what is asked, four counts, then keys


class State(NamedTuple):
    """Names as in moe_cupy/cache/echo.py. P = layers x experts, L = layers, W = WORDS."""

    head: Any  # int64 [HEAD]
    inbox: Any  # int64 [FIRST + 3 P]
    outbox: Any  # int64 [1 + P]: how many victims, who
    turn: Any  # int64 [L]
    lowest_key: Any  # int64 [L]
    stale: Any  # int64 [L]
    hidden: Any  # int64 [L]
    last: Any  # int64 [P]
    known: Any  # int64 [P]
    seen: Any  # int64 [P]
    resident: Any  # int64 [P]
    pinned: Any  # int64 [P]
    habit: Any  # float64 [5]
    mix: Any  # float64 [6]
    of_rest: Any  # float64 [LONGEST_REST + 1]
    of_uses: Any  # float64 [SPANS, TOKENS + 1]
    lowest: Any  # float64 [L]
    odds: Any  # float64 [P]
    prior: Any  # float64 [P]
    chance: Any  # float64 [P]
    total: Any  # float64 [1]
    used: Any  # uint64 [P, W]
    slices: Any  # uint64 [SLICES, W]
    windows: Any  # uint64 [SPANS, W]
    past: Any  # uint64 [1, W]
    near: Any  # uint64 [2, W]: the neighbours, and those after them


FIELDS = len(State._fields)


def empty_state(layers: int, experts: int) -> State:
    """Before the first token."""
    pairs = layers * experts
    head = np.array([layers, experts, -1, layers - 1, 0, 0, 0], np.int64)
    ints = [np.zeros(n, np.int64) for n in (FIRST + 3 * pairs, 1 + pairs, *[layers] * 4, *[pairs] * 5)]
    floats = [np.zeros(n) for n in (5, 6, LONGEST_REST + 1, (SPANS, TOKENS + 1), layers, *[pairs] * 3, 1)]
    words = [np.zeros((n, WORDS), np.uint64) for n in (pairs, SLICES, SPANS, 1, 2)]
    state = State(head, *ints, *floats, *words)
    state.turn[:] = state.lowest_key[:] = -1
    state.last[:], state.known[:], state.lowest[:] = -LONGEST_REST, -2, np.inf
    return state


@intrinsic
def pointer(typingctx, address):
    """An address as a pointer."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), codegen


@njit
def ints(address, n):
    return carray(pointer(address), (n,), np.int64)


@njit
def floats(address, n):
    return carray(pointer(address), (n,), np.float64)


@njit
def words(address, n):
    return carray(pointer(address), (n, WORDS), np.uint64)


@njit
def state_at(addresses):
    """The arrays at these addresses, in the order of the fields."""
    a = carray(addresses, (FIELDS,))
    head = ints(a[0], HEAD)
    layers, pairs = head[LAYERS], head[LAYERS] * head[EXPERTS]
    return State(
        head, ints(a[1], FIRST + 3 * pairs), ints(a[2], 1 + pairs),
        ints(a[3], layers), ints(a[4], layers), ints(a[5], layers), ints(a[6], layers),
        ints(a[7], pairs), ints(a[8], pairs), ints(a[9], pairs), ints(a[10], pairs), ints(a[11], pairs),
        floats(a[12], 5), floats(a[13], 6), floats(a[14], LONGEST_REST + 1),
        carray(pointer(a[15]), (SPANS, TOKENS + 1), np.float64), floats(a[16], layers),
        floats(a[17], pairs), floats(a[18], pairs), floats(a[19], pairs), floats(a[20], 1),
        words(a[21], pairs), words(a[22], SLICES), words(a[23], SPANS), words(a[24], 1), words(a[25], 2),
    )  # fmt: skip
