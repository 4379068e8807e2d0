"""What earlier tokens of one sequence left behind, in device memory, allocated once for the whole context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_cupy.device.base import Device
from moe_cupy.kernels.kept import CACHES
from moe_ref.config import ModelConfig
from moe_ref.kv_types import kept_as
from moe_ref.layers import Layer

Shape = tuple[int, ...]


class DeviceKV:
    """``length`` tokens seen of at most ``capacity``. Raises ValueError for types that cannot be, or too little memory.

    ``homes`` are the devices of the layers, each of which keeps its layers' part.
    Keys and values of a token are written where they stay; until ``advance`` counts it, a pass can be run again.
    A recurrent layer has one state, so it has it twice: a pass reads one and writes the other, ``advance`` exchanges
    them. An empty sequence reads zeros instead, so ``reset`` touches no memory.
    """

    def __init__(self, homes: Sequence[Device], c: ModelConfig, capacity: int, type_k: str, type_v: str):
        self.length, self.capacity, self.types = 0, capacity, (type_k, type_v)
        types = self.types
        for device in {id(device): device for device in homes}.values():
            _check_types(device, c, type_k, type_v)
        kept = [_kept_shapes(c, layer, capacity) for layer in c.layers]
        per_context = [sum(_bytes(s, kind) for s, kind in zip(shapes, types, strict=False)) for shapes in kept]
        states = [_state_shapes(c) if layer.mixer == "delta" else () for layer in c.layers]
        fixed = [3 * sum(4 * math.prod(shape) for shape in shapes) for shapes in states]
        self.nbytes = sum(per_context) + sum(fixed)
        for device in {id(device): device for device in homes}.values():
            mine = [i for i, home in enumerate(homes) if home is device]
            self._check(device.memory()[0] - sum(fixed[i] for i in mine), sum(per_context[i] for i in mine))
        self._layers = [
            tuple(_array(device, s, kind) for s, kind in zip(shapes, types, strict=False))
            for device, shapes in zip(homes, kept, strict=True)
        ]
        self._states = [
            tuple(tuple(_array(device, shape, "f32") for shape in shapes) for _ in range(3))
            for device, shapes in zip(homes, states, strict=True)
        ]
        self._current = 0
        rank = c.mla.kv_lora_rank if c.mla is not None else 0
        self._rotations = [(how.key_rotation, how.value_rotation) for how in kept_as(c.layers, type_k, type_v, rank)]

    def rotations(self, index: int) -> tuple[int, int]:
        """How many neighbours of a layer's keys (and queries), and of its values, are rotated together; 0: none."""
        return self._rotations[index]

    def layer(self, index: int) -> tuple[Any, Any]:
        """Keys [capacity, G, K] and values [capacity, G, V] of a layer; latent attention has one array for both.

        The last axis holds items as ``kernels/kept.py`` has them, of quantized types the bytes of whole blocks.
        """
        kept = self._layers[index]
        return kept[0], kept[-1]

    def state(self, index: int) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """Of a recurrent layer (last inputs [C - 1, channels], matrices [H, S, S]): to be read, and to be written."""
        zeros, *both = self._states[index]
        return (both[self._current] if self.length else zeros), both[1 - self._current]

    def line(self) -> str:
        """Its size as a person reads it, in the report of the placement."""
        types = "/".join(dict.fromkeys(self.types))
        return f"KV cache     {self.nbytes / 2**20:9.1f} MiB  {self.capacity} tokens, {types}"

    @property
    def parity(self) -> int:
        """Which of the two copies of recurrent states is read next."""
        return self._current

    def advance(self, n_tokens: int) -> None:
        """A pass over ``n_tokens`` has succeeded."""
        self.length += n_tokens
        self._current = 1 - self._current

    def reset(self) -> None:
        """Begin a new sequence."""
        self.length = 0

    def _check(self, free: int, wanted: int) -> None:
        if wanted > free:
            fits = self.capacity * max(0, free) // wanted
            raise ValueError(
                f"-c {self.capacity}: the KV cache would take {wanted / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB are "
                f"free; use at most -c {fits}, or -ctk q8_0 -ctv q8_0"
            )


def _kept_shapes(c: ModelConfig, layer: Layer, capacity: int) -> tuple[Shape, ...]:
    """Of keys and values, or of what latent attention keeps for both: the latent and the key that all heads share."""
    if layer.mixer == "delta":
        return ()
    if layer.mixer == "mla":
        assert c.mla is not None and layer.rope is not None
        return ((capacity, 1, c.mla.kv_lora_rank + layer.rope.n_rot),)
    return (capacity, layer.head_count_kv, layer.key_length), (capacity, layer.head_count_kv, layer.value_length)


def _state_shapes(c: ModelConfig) -> tuple[Shape, ...]:
    assert c.delta is not None
    d = c.delta
    channels = 2 * d.key_width + d.value_width
    return (d.conv_kernel - 1, channels), (d.time_step_rank, d.state_size, d.state_size)


def _check_types(device: Device, c: ModelConfig, type_k: str, type_v: str) -> None:
    """Refuse in one line what no kernel serves."""
    for flag, kind in (("-ctk", type_k), ("-ctv", type_v)):
        if kind not in CACHES:
            raise ValueError(f"{flag}: KV cache type {kind!r} is not supported; supported: {', '.join(CACHES)}")
    given = f"-ctk {type_k} -ctv {type_v}"
    if c.mla is not None and type_k != type_v:
        raise ValueError(f"{given}: this model caches one vector as both; give both the same type")
    if type_k != type_v and not device.is_unified:
        raise ValueError(f"{given}: kernels of the {device.name} device take keys and values of one type")
    for layer in c.layers:
        for flag, kind, shape in zip(("-ctk", "-ctv"), (type_k, type_v), _kept_shapes(c, layer, 1), strict=False):
            block = CACHES[kind][2]
            if shape[-1] % block:
                raise ValueError(
                    f"{flag} {kind}: its blocks of {block} do not divide the {shape[-1]} numbers that layer "
                    f"{layer.index} caches of a head; use f16 or f32"
                )


def _stored(shape: Shape, kind: str) -> Shape:
    """As it is in memory: items, of quantized types the bytes of the last axis' blocks."""
    _, _, numbers, items = CACHES[kind]
    return (*shape[:-1], shape[-1] // numbers * items)


def _bytes(shape: Shape, kind: str) -> int:
    return math.prod(_stored(shape, kind)) * np.dtype(CACHES[kind][0]).itemsize


def _array(device: Device, shape: Shape, kind: str) -> Any:
    memory = device.upload(np.zeros(_bytes(shape, kind), np.uint8))  # its pages are taken now, not as the text grows
    return memory.view(CACHES[kind][0]).reshape(_stored(shape, kind))
