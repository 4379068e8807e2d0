"""What ``echo`` remembers, in device memory: the record and the arrays of moe_cupy/compiled/state.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_cupy.compiled.echo import CompiledEcho
from moe_cupy.compiled.state import ADDRESSES, RECORD

KEPT = ("rows", "used", "users")


def parts(policy: CompiledEcho) -> tuple[np.ndarray, ...]:
    """The record, int64 [words], and the arrays; of its addresses the device makes no use."""
    return policy.state.view(np.int64), *(policy.arrays[name] for name in KEPT)


class EchoMemory:
    """Room for the memory of one pool's policy, and the two ways between it and the host's."""

    def __init__(self, device: Any, policy: CompiledEcho):
        self._device = device
        self.arrays: Any = tuple(device.array(part.shape, part.dtype) for part in parts(policy))

    def give(self, policy: CompiledEcho, stream: Any) -> None:
        """The device remembers what the host does."""
        for target, values in zip(self.arrays, parts(policy), strict=True):
            self._device.put(target, values, stream)

    def fetch(self, name: str, stream: Any) -> list[np.ndarray]:
        """Host memory that has it all once the stream is here."""
        return [self._device.fetch(f"{name} {i}", array, stream) for i, array in enumerate(self.arrays)]


def take(policy: CompiledEcho, record: np.ndarray, *arrays: np.ndarray) -> None:
    """The host remembers what was fetched."""
    addresses = {name: policy.state[name].copy() for name, _ in ADDRESSES}
    policy.state[...] = record.view(RECORD)
    for name, address in addresses.items():
        policy.state[name] = address
    for name, array in zip(KEPT, arrays, strict=True):
        policy.arrays[name][...] = array
