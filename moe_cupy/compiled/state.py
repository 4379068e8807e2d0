"""What the compiled ``echo`` knows, as one record: numbers, tables, and the addresses of arrays that grow with a model.

A function that is handed 26 arrays is handed 182 numbers; one that is handed a record, its address.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from moe_cupy.cache.echo import LONGEST_REST, NEIGHBOURS, PRIOR, TOKENS, TURNS, WINDOWS

WORDS = TOKENS // 64  # of a set of remembered tokens: uint64 [WORDS]
SLICES = 24  # bits of a similarity, which is at most 4 x the experts of an event
SPANS = len(WINDOWS)
ASKED, KEYS, MISSING, FREE, PINNED, FIRST = range(6)  # of the inbox: what is asked, four counts, then keys
ENDLESS = 1 << 60

# Names as in moe_cupy/cache/echo.py. Its constants are handed over too: code on disk does not see them change.
NUMBERS = [(name, "i8") for name in ("layers", "experts", "token", "layer", "now", "found", "sliced", "neighbours")]
TABLES = [
    ("prior_weight", "f8"),
    ("total", "f8", TURNS + 1),
    ("spans", "i8", SPANS),
    ("habit", "f8", 5),
    ("mix", "f8", 6),
    ("of_rest", "f8", LONGEST_REST + 1),
    ("of_uses", "f8", (SPANS, TOKENS + 1)),
    ("slices", "u8", (SLICES, WORDS)),
    ("windows", "u8", (SPANS, WORDS)),
    ("past", "u8", WORDS),
    ("near", "u8", (TURNS + 1, WORDS)),  # the neighbours, those after them, …
]
BY_LAYER = {"turn": -1, "lowest": -1, "stale": 0, "hidden": 0, "residents": 0}  # array: what it holds at first
BY_KEY = {
    "last": -LONGEST_REST, "known": -2, "seen": 0, "pinned": 0, "odds": 0.0, "prior": 0.0, "q": 0.0, "later": 0.0,
    "resident": -1, "place": -1,  # residents of layer l: from l x experts, residents[l] of them; where each is
}  # fmt: skip
# uint64 [keys, WORDS]: tokens that used a key; uint64 [tokens, keys / 64]: keys that a token used; int64: a request;
# int64: how many victims, who
OTHERS = ("used", "users", "inbox", "outbox")
# Numba keeps compiled code until the file of the outermost function or a type changes; so the type tells all sources.
SOURCES = zlib.crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
ADDRESSES = [(name, "i8") for name in (*BY_LAYER, *BY_KEY, *OTHERS)]
RECORD = np.dtype([(f"of_{SOURCES:x}", "i8"), *NUMBERS, *TABLES, *ADDRESSES])


def empty_state(layers: int, experts: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The record [1] before the first token, and the arrays that it has the addresses of; "rows" are most as one."""
    keys = layers * experts
    parts = [np.full(layers, value) for value in BY_LAYER.values()] + [np.full(keys, v) for v in BY_KEY.values()]
    rows, ends = np.concatenate([part.view(np.int64) for part in parts]), np.cumsum([len(part) for part in parts])
    views = zip((*BY_LAYER, *BY_KEY), parts, ends, strict=True)
    arrays = {name: rows[end - len(part) : end].view(part.dtype) for name, part, end in views} | {"rows": rows}
    arrays |= {"used": np.zeros((keys, WORDS), np.uint64), "users": np.zeros((TOKENS, keys // 64 + 1), np.uint64)}
    arrays |= {"inbox": np.zeros(FIRST + 3 * keys, np.int64), "outbox": np.zeros(1 + keys, np.int64)}
    state = np.zeros(1, RECORD)
    state["layers"], state["experts"], state["token"], state["layer"] = layers, experts, -1, layers - 1
    state["neighbours"], state["prior_weight"], state["spans"] = NEIGHBOURS, PRIOR, WINDOWS
    for name, _ in ADDRESSES:
        state[name] = arrays[name].ctypes.data
    return state, arrays


@intrinsic
def pointer(typingctx, address):
    """An address as a pointer."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), codegen


@njit
def ints(address):
    """The int64 [n] at an address."""
    return carray(pointer(address), (ENDLESS,), np.int64)


@njit
def floats(address):
    """The float64 [n] at an address."""
    return carray(pointer(address), (ENDLESS,), np.float64)


@njit
def table(address, width):
    """The uint64 [n, width] at an address."""
    return carray(pointer(address), (ENDLESS, width), np.uint64)


@njit
def sets(address):
    """The sets of tokens uint64 [n, WORDS] at an address."""
    return carray(pointer(address), (ENDLESS, WORDS), np.uint64)
