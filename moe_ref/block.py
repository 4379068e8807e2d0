"""One layer's weights under their short names, and the two operations everything is made of: linear and norm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_ref.config import Delta, Mla, ModelConfig
from moe_ref.finite import check_finite
from moe_ref.layers import Layer
from moe_ref.norm import layer_norm, rms_norm
from moe_ref.rope import Tables, apply_rope
from moe_ref.weights import Weights


def normalise(x: np.ndarray, weights: Weights, name: str, config: ModelConfig) -> np.ndarray:
    """The architecture's norm of x [..., n] with the weight, and the bias if there is one, called ``name``."""
    norm = rms_norm if config.quirks.norm == "rms" else layer_norm
    y = norm(x, weights[name + ".weight"], config.norm_epsilon)
    y = y + weights[name + ".bias"] if name + ".bias" in weights else y
    return check_finite(y, f"the result of {name}")


@dataclass(frozen=True, slots=True)
class Block:
    """Layer ``layer`` of a model; tensor names are given without "blk.N." and, where it is ".weight", their ending."""

    config: ModelConfig
    layer: Layer
    weights: Weights

    @property
    def mla(self) -> Mla:
        assert self.config.mla is not None
        return self.config.mla

    @property
    def delta(self) -> Delta:
        assert self.config.delta is not None
        return self.config.delta

    def rotate(self, y: np.ndarray, rope: Tables) -> np.ndarray:
        """Heads [T, H, K] turned by their positions."""
        assert self.layer.rope is not None
        return apply_rope(y, *rope, self.layer.rope.style)

    def full(self, name: str) -> str:
        return f"blk.{self.layer.index}.{name}"

    def has(self, name: str) -> bool:
        return self.full(name) + ".weight" in self.weights

    def vector(self, name: str) -> np.ndarray:
        """A small tensor by its whole name ("ssm_dt.bias")."""
        return self.weights[self.full(name)]

    def linear(self, x: np.ndarray, name: str, index: int | None = None) -> np.ndarray:
        """Multiply x [T, in] with a matrix (the ``index``-th of a stack): [T, out], bias and scale included."""
        return self.weights.linear(x, self.full(name), index)

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return normalise(x, self.weights, self.full(name), self.config)

    def unit_norm(self, x: np.ndarray) -> np.ndarray:
        """RMS norm without a weight."""
        return rms_norm(x, np.ones(1, x.dtype), self.config.norm_epsilon)
