"""Sets of remembered tokens, and ``Similar`` of moe_cupy/cache/echo.py, for Numba.

A set, there an integer of 1024 bits, is here uint64 [WORDS].
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from moe_cupy.cache.echo import TOKENS, TURNS
from moe_cupy.compiled.state import WORDS

ONE = np.uint64(1)


@intrinsic
def ones(typingctx, word):
    """Bits of a word that are set."""

    def codegen(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), codegen


@njit
def words_of(bits):
    """WORDS, said so that the compiler cannot know it: a loop of known length is unrolled before it is vectorised."""
    return min(WORDS, bits.size)


@njit
def count(bits):
    """Tokens of a set [W]."""
    n = np.uint64(0)
    for w in range(words_of(bits)):
        n += ones(bits[w])
    return np.int64(n)


@njit
def common(a, b):
    """Tokens of both sets [W]."""
    n = np.uint64(0)
    for w in range(words_of(a)):
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
    """The most similar past tokens and, turn by turn, those after them."""
    s.found = 1
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
    s.total[0] = s.prior_weight + count(taken)
    for i in range(TURNS):
        next_tokens(s, s.near[i], s.near[i + 1])
        s.total[i + 1] = s.prior_weight + count(s.near[i + 1])


@njit
def next_tokens(s, tokens, after):
    """The tokens after some, but for the one that is still to come."""
    for w in range(WORDS):
        after[w] = (tokens[w] << ONE) | (tokens[w - 1 if w else WORDS - 1] >> np.uint64(63))
    future = (s.token + 1) % TOKENS
    after[future // 64] &= ~bit_of(future)
