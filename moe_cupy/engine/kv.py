"""Keys and values of one sequence in device memory, allocated once for the whole context."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_cupy.device.base import Device
from moe_ref.config import ModelConfig

KV_TYPES: dict[str, type] = {"f32": np.float32, "f16": np.float16}


class DeviceKV:
    """``length`` tokens seen of at most ``capacity``; pages of the host device fill as tokens come."""

    def __init__(self, device: Device, c: ModelConfig, capacity: int, type_k: str, type_v: str):
        self.length, self.capacity = 0, capacity
        self.nbytes = 0
        keys = (capacity, c.head_count_kv, c.key_length)
        values = (capacity, c.head_count_kv, c.value_length)
        self._layers = [
            (self._array(device, keys, type_k), self._array(device, values, type_v)) for _ in range(c.block_count)
        ]

    def layer(self, index: int) -> tuple[Any, Any]:
        """Keys [capacity, G, K] and values [capacity, G, V] of a layer."""
        return self._layers[index]

    def _array(self, device: Device, shape: tuple[int, ...], kind: str) -> Any:
        if kind not in KV_TYPES:
            raise ValueError(f"KV cache type {kind!r} is not supported; supported: {', '.join(KV_TYPES)}")
        nbytes = int(np.prod(shape)) * np.dtype(KV_TYPES[kind]).itemsize
        self.nbytes += nbytes
        return device.alloc(nbytes).view(KV_TYPES[kind]).reshape(shape)
