"""``echo`` as one compiled call an event; moe_cupy/cache/echo.py says what is decided and why.

Requests go in and victims come out through two of the state's arrays. The call costs a fraction of a microsecond since
it takes a single address. It keeps the interpreter lock: giving it up for two microseconds would let another thread
have it for milliseconds.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Collection, Sequence
from struct import Struct

from moe_cupy.cache.echo import LONGEST_REST, load_weights
from moe_cupy.cache.policies import Geometry, Policy, Scores
from moe_cupy.compiled.echo_kernel import EVICT, EXCHANGE, VICTIM, step
from moe_cupy.compiled.state import empty_state

_STEP = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(step.address)
_WHOLE = [Struct(f"{n}q") for n in range(64)]


def whole(count: int) -> Struct:
    """``count`` whole numbers of 8 bytes."""
    return _WHOLE[count] if count < len(_WHOLE) else Struct(f"{count}q")


class CompiledEcho(Policy):
    """Decides what ``Echo`` decides, key for key (tests/moe_cupy/test_compiled.py)."""

    def __init__(self, geometry: Geometry, weights: dict[str, list[float]] | None = None) -> None:
        weights = weights or load_weights()
        self.state, self.arrays = empty_state(geometry.layers, geometry.experts)
        self.state["habit"], self.state["mix"] = weights["habit"], weights["mix"]
        first, last = weights["habit"][0], weights["habit"][-1]
        self.state["of_rest"] = [first + last * math.log(1 + rest) for rest in range(LONGEST_REST + 1)]
        self._address = ctypes.c_void_p(self.state.ctypes.data)
        self._inbox, self._outbox = (self.arrays[name].data for name in ("inbox", "outbox"))

    def begin(self, layer: int, keys: Sequence[int], scores: Scores | None = None) -> None:
        self._ask(layer, keys, (), 0, ())

    def admit(self, key: int) -> None:
        self._ask(EXCHANGE, (), (key,), 1, ())

    def evict(self, key: int) -> None:
        self._ask(EVICT, (key,), (), 0, ())

    def victim(self, pinned: Collection[int]) -> int | None:
        self._ask(VICTIM, (), (), 0, pinned)
        return next(iter(self._victims()), None)

    def exchange(self, incoming: Sequence[int], free: int, pinned: Collection[int]) -> list[int]:
        self._ask(EXCHANGE, (), incoming, free, pinned)
        return self._victims()

    def event(
        self,
        layer: int,
        keys: Sequence[int],
        missing: Sequence[int],
        free: int,
        pinned: Collection[int] = (),
        scores: Scores | None = None,
    ) -> list[int]:
        self._ask(layer, keys, missing, free, pinned)
        return self._victims() if len(missing) > free else []

    def _ask(self, what: int, keys: Sequence[int], missing: Sequence[int], free: int, pinned: Collection[int]) -> None:
        n, m, p = len(keys), len(missing), len(pinned)
        whole(5 + n + m + p).pack_into(self._inbox, 0, what, n, m, free, p, *keys, *missing, *pinned)
        _STEP(self._address)

    def _victims(self) -> list[int]:
        return list(whole(self._outbox[0]).unpack_from(self._outbox, 8))
