"""Keys and values of one sequence in device memory, allocated once for the whole context."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from moe_cupy.device.base import Device
from moe_ref.config import ModelConfig

KV_TYPES: dict[str, type] = {"f32": np.float32, "f16": np.float16}


class DeviceKV:
    """``length`` tokens seen of at most ``capacity``. Raises ValueError for an unknown type or too little memory."""

    def __init__(self, device: Device, c: ModelConfig, capacity: int, type_k: str, type_v: str):
        self.length, self.capacity = 0, capacity
        keys = (capacity, c.head_count_kv, c.key_length)
        values = (capacity, c.head_count_kv, c.value_length)
        self.nbytes = c.block_count * (_bytes(keys, type_k) + _bytes(values, type_v))
        free = device.memory()[0]
        if self.nbytes > free:
            fits = capacity * free // self.nbytes
            raise ValueError(
                f"-c {capacity}: the KV cache would take {self.nbytes / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB are "
                f"free; use at most -c {fits}, or -ctk f16 -ctv f16"
            )
        self._layers = [
            (_array(device, keys, type_k), _array(device, values, type_v)) for _ in range(c.block_count)
        ]

    def layer(self, index: int) -> tuple[Any, Any]:
        """Keys [capacity, G, K] and values [capacity, G, V] of a layer."""
        return self._layers[index]


def _bytes(shape: tuple[int, ...], kind: str) -> int:
    if kind not in KV_TYPES:
        raise ValueError(f"KV cache type {kind!r} is not supported; supported: {', '.join(KV_TYPES)}")
    return math.prod(shape) * np.dtype(KV_TYPES[kind]).itemsize


def _array(device: Device, shape: tuple[int, ...], kind: str) -> Any:
    memory = device.alloc(_bytes(shape, kind))
    memory[...] = 0  # takes the pages now: memory in use does not grow with the text
    return memory.view(KV_TYPES[kind]).reshape(shape)
