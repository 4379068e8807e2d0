"""One layer in one pass: its weights under their short names, and the operations everything is made of.

The mixers and networks of the runtime read like those of ``moe_ref``; each call here is one launch in stream order,
its result a buffer in device memory that the next use of the same name and shape writes over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_cupy.device.base import Device
from moe_cupy.engine.weights import LayerWeights, Linear
from moe_ref.config import Delta, Mla, ModelConfig
from moe_ref.layers import Layer

Norm = tuple[Any, Any]  # weight [n] or None, bias [n] or None
UNIT: Norm = (None, None)


class Scratch:
    """Activations of a pass in device memory, by name and shape, made at their first use."""

    def __init__(self, device: Device, stream: Any, stays: bool = False):
        self._device, self._stream, self._stays = device, stream, stays
        self._arrays: dict[tuple[Any, ...], Any] = {}

    def __call__(self, name: str, *shape: int, dtype: type = np.float32) -> Any:
        """The array of this name and shape; it holds what was last written there."""
        array = self._arrays.get((name, shape))
        if array is None:
            count = int(np.prod(shape))
            array = self._device.alloc(count * np.dtype(dtype).itemsize).view(dtype).reshape(shape)
            self._arrays[name, shape] = array
        return array

    def put(self, name: str, values: np.ndarray) -> Any:
        """``values`` of the host where ops can read them; where the last ones of this name were, if it ``stays``."""
        if self._device.is_unified and not self._stays:
            return values
        target = self(name, *values.shape, dtype=values.dtype.type)
        self._device.put(target, values, self._stream)
        return target


@dataclass(frozen=True, slots=True)
class Pass:
    """What layers share in one pass over T tokens at positions ``kv.length``..."""

    config: ModelConfig
    launch: Callable[..., None]  # op, buffers by name
    scratch: Scratch
    kv: Any  # DeviceKV
    tables: dict[int, tuple[Any, Any]]  # layer -> cosines and sines [T, n_rot/2]
    temperature: dict[int, Any]  # layer -> factor on scores [T]
    x: Any  # [T, D] residual stream
    abroad: Callable[[str, Any, Any, Linear], None] | None = None  # op, x, out, matrix on another device

    @property
    def is_single(self) -> bool:
        """Whether it is over one token, all of it on one device: the next such pass has the same arrays."""
        return len(self.x) == 1 and self.abroad is None

    def product(self, op: str, x: Any, out: Any, linear: Linear) -> None:
        """One of the ops "linear", "linear_add" and "linear_heads", where the matrix lies."""
        if linear.away:
            assert self.abroad is not None
            self.abroad(op, x, out, linear)
        else:
            self.launch(op, x=x, out=out, w=linear.w, scale=linear.scale, bias=linear.bias)


@dataclass(frozen=True, slots=True)
class Block:
    """Layer ``layer`` of a pass. Names are the GGUF's without "blk.N." and, for matrices and norms, their ending."""

    run: Pass
    layer: Layer
    weights: LayerWeights

    config = property(lambda self: self.run.config)
    n_tokens = property(lambda self: len(self.run.x))
    launch = property(lambda self: self.run.launch)  # op, buffers by name

    @property
    def mla(self) -> Mla:
        assert self.config.mla is not None
        return self.config.mla

    @property
    def delta(self) -> Delta:
        assert self.config.delta is not None
        return self.config.delta

    @property
    def is_plain(self) -> bool:
        """Whether what a branch computes is added to the residual stream as it is."""
        return not self.config.quirks.post_norms and self.config.residual_scale == 1.0

    def buffer(self, name: str, *shape: int, dtype: type = np.float32) -> Any:
        """Scratch [T, *shape]."""
        return self.run.scratch(name, len(self.run.x), *shape, dtype=dtype)

    def linear(self, x: Any, name: str) -> Any:
        """x [T, in] times a matrix, bias and scale included: [T, out] in scratch."""
        linear = self.weights.linears[name]
        out = self.buffer(name, linear.w.rows)
        self.run.product("linear", x, out, linear)
        return out

    def heads(self, x: Any, name: str, out: Any) -> None:
        """x [T, H, in] times each head's own matrix, into the first features of out [T, H, .]."""
        self.run.product("linear_heads", x, out, self.weights.linears[name])

    def norm(self, x: Any, name: str, out: Any = None) -> Any:
        """The architecture's norm of x [..., n] into ``out``, by default in place."""
        return self.normalise(x, self.weights.norms[name], out, self.config.quirks.norm == "layer")

    def normalise(self, x: Any, norm: Norm, out: Any = None, centred: bool = False) -> Any:
        """Norm of x with the weight and bias of ``norm``; UNIT has neither."""
        out = x if out is None else out
        epsilon = self.config.norm_epsilon
        self.launch("norm", x=x, weight=norm[0], bias=norm[1], epsilon=epsilon, centred=centred, out=out)
        return out

    def rotate(self, x: Any, first: int = 0) -> None:
        """Heads [T, H, K] turned by their positions, from feature ``first`` on."""
        assert self.layer.rope is not None
        cos, sin = self.run.tables[self.layer.index]
        self.launch("rope", x=x, cos=cos, sin=sin, style=self.layer.rope.style, first=first)

    def split(self, x: Any, widths: dict[str, int]) -> list[Any]:
        """Rows of x [n, sum of widths] cut into columns: one buffer [n, width] a name."""
        parts, first = [], 0
        for name, width in widths.items():
            parts.append(self.run.scratch(name, len(x), width))
            self.launch("columns", x=x, first=first, out=parts[-1], at=0, count=width)
            first += width
        return parts

    def add_product(self, x: Any, name: str, post_norm: str) -> None:
        """What a branch computes, the product of x with its last matrix, is added to the residual stream."""
        if self.is_plain:
            self.run.product("linear_add", x, self.run.x, self.weights.linears[name])
        else:
            self.add(self.linear(x, name), post_norm)

    def add(self, y: Any, post_norm: str) -> None:
        """Add a branch's result y [T, D] to the residual stream, normalised before and scaled where it has to be."""
        if self.config.quirks.post_norms:
            self.norm(y, post_norm)
        self.launch("add", x=y, factor=self.config.residual_scale, out=self.run.x)
