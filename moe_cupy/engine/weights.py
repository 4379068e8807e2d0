"""The dense part of a model in memory of its devices: all but the routed experts, in the file's own formats."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moe_cupy.engine.split import Split
from moe_cupy.kernels.matrix import Matrix
from moe_cupy.plan.rules import CPU
from moe_cupy.store import MATRICES
from moe_ref.config import ModelConfig
from moe_ref.console import with_progress
from moe_ref.finite import FILE_IS_DAMAGED, check_finite
from moe_ref.gguf import GGUFFile
from moe_ref.layers import Layer
from moe_ref.quants import FormatError, dequantize
from moe_ref.tensors import View, predicts_further

Views = Mapping[str, View]
EXPERTS = {matrix: f"ffn_{matrix}_exps" for matrix in MATRICES}
EXPANDED = ("ssm_conv1d", "attn_kv_b")  # tensors of two axes that are not multiplied with as they are stored
ROUTER_NORM = "router_norm"  # gemma4's: ffn_gate_inp.scale / sqrt(D), the weight of a norm before the router


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix, and what the file says is done to its product: ``scale * x W^T + bias``."""

    w: Matrix  # [rows, cols], or a stack of them, one below the other
    scale: Any = 1.0  # a number; of a stack, one for each [H]
    bias: Any = None  # [rows], of a stack [H, rows]
    away: bool = False  # all three lie on the device that is not the layer's home


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer by the GGUF's names without "blk.N.": matrices and norms by their stem, vectors by all of it."""

    linears: dict[str, Linear] = field(default_factory=dict)
    norms: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # weight, bias or None
    vectors: dict[str, Any] = field(default_factory=dict)  # float32
    scales: dict[str, np.ndarray] = field(default_factory=dict)  # on the host: the layer's [1]

    def of_experts(self) -> dict[str, Any]:
        """Scales [E] and biases [E, rows] of the products of the routed experts, as the op ``experts`` takes them."""
        if not self.vectors:
            return {"scales": {}, "biases": {}}
        scales, biases = (
            {m: self.vectors[f"{stem}.{end}"] for m, stem in EXPERTS.items() if f"{stem}.{end}" in self.vectors}
            for end in ("scale", "bias")
        )
        return {"scales": scales, "biases": biases}


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """Everything that is resident for good."""

    token_embd: Matrix
    output_norm: tuple[Any, Any]
    output: Linear
    divisors: dict[str, np.ndarray]  # of rotary frequencies, on the host
    layers: tuple[LayerWeights, ...]
    nbytes: Mapping[str, int]  # on each device
    lies: Mapping[str, str]  # tensor of the file -> device; numbers that launches are given lie on none
    looks_up: bool = False  # rows of the embedding are looked up in host memory, and sent to a device with its own


class _Uploader:
    """Sends tensors to where ``split`` says; ``home`` is the device of the layer that is being loaded."""

    def __init__(self, split: Split, file: GGUFFile, views: Views):
        self.split, self.file, self.views, self.home = split, file, views, split.homes[-1]
        self.nbytes: Counter[str] = Counter()
        self.lies: dict[str, str] = {}
        self.originals: list[Any] = []  # vectors that lie on one device and are used on the other

    def upload(self, raw: np.ndarray, at: str) -> Any:
        self.nbytes[at] += raw.nbytes
        return self.split.upload(raw, at)

    def place(self, name: str) -> str:
        """Where a tensor lies; it is noted, for it is sent there."""
        stored = self.views[name].stored.name
        self.lies[stored] = self.split.place(stored)
        return self.lies[stored]

    def raw(self, name: str) -> np.ndarray:
        view = self.views[name]
        return self.file.read(view.stored.name, *view.segment())

    def matrix(self, name: str) -> Matrix:
        """A matrix, or the matrices of a stack one below the other."""
        view = self.views[name]
        memory = self.upload(self.raw(name), self.place(name))
        return Matrix(view.stored.type, math.prod(view.shape[:-1]), view.shape[-1], memory)

    def values(self, name: str) -> np.ndarray:
        """A small tensor as float32. Raises NonFiniteError if one of its numbers is not finite."""
        view = self.views[name]
        with np.errstate(over="ignore", invalid="ignore"):
            values = dequantize(self.raw(name), view.stored.type, view.shape, name)
        return check_finite(values, name, FILE_IS_DAMAGED)

    def vector(self, name: str, at: str | None = None, factor: float = 1.0) -> Any:
        """A vector, times ``factor``, where it is used: at ``at``, by default the layer's home."""
        values = self.values(name) * np.float32(factor)
        place, at = self.place(name), at or self.home
        if place != at:
            self.originals.append(self.upload(values, place))
        return self.upload(values, at).view(np.float32).reshape(values.shape)

    def linear(self, stem: str) -> Linear:
        scale: Any = 1.0
        at = self.place(stem + ".weight")
        if (view := self.views.get(stem + ".scale")) is not None:
            is_stack = len(self.views[stem + ".weight"].shape) > 2
            scale = self.vector(stem + ".scale", at) if is_stack else float(self.values(stem + ".scale")[0])
            scale = scale if is_stack or view.shape == (1,) else 1.0
        bias = self.vector(stem + ".bias", at) if stem + ".bias" in self.views else None
        return Linear(self.matrix(stem + ".weight"), scale, bias, at != self.home)

    def norm(self, stem: str) -> tuple[Any, Any]:
        return self.vector(stem + ".weight"), self.vector(stem + ".bias") if stem + ".bias" in self.views else None

    def layer(self, layer: Layer) -> LayerWeights:
        """All tensors of a layer but the routed experts' matrices."""
        block, made = f"blk.{layer.index}.", LayerWeights()
        self.home, experts = self.split.homes[layer.index], self.split.experts[layer.index]
        for name in (name for name in self.views if name.startswith(block)):
            stem, _, end = name.removeprefix(block).rpartition(".")
            if stem in EXPERTS.values():
                if end in ("bias", "scale"):
                    made.vectors[f"{stem}.{end}"] = self.vector(name, experts)
            elif stem == "ffn_gate_inp" and end == "scale" and self.views[name].shape != (1,):
                made.norms[ROUTER_NORM] = self.vector(name, factor=self.views[name].shape[-1] ** -0.5), None
            elif stem == "attn_kv_b":
                if end == "weight":
                    made.linears.update(self.absorbed(block + stem, layer))
            elif stem == "layer_output_scale":
                made.scales[stem] = self.values(name)
            elif end == "weight" and "norm" in stem:
                made.norms[stem] = self.norm(block + stem)
            elif is_matrix(name, self.views[name]):
                made.linears[stem] = self.linear(block + stem)
            elif end == "weight" or f"{block}{stem}.weight" not in self.views:  # else it belongs to a matrix or norm
                made.vectors[name.removeprefix(block)] = self.vector(name)
        return made

    def absorbed(self, stem: str, layer: Layer) -> dict[str, Linear]:
        """attn_k_b [H, rank, plain] and attn_v_b [H, V, rank] of a file that has attn_kv_b, as float32.

        Its rows are per head first K's, used here transposed, then V's. (A bias of K would add the same to all scores.)
        """
        whole = self.values(stem + ".weight")
        if stem + ".scale" in self.views:
            whole = whole * self.values(stem + ".scale")
        by_head = whole.reshape(layer.head_count, -1, whole.shape[1])  # [H, plain + V, rank]
        k, v = by_head[:, : -layer.value_length].transpose(0, 2, 1), by_head[:, -layer.value_length :]
        bias, at = None, self.place(stem + ".weight")
        if stem + ".bias" in self.views:
            values = self.values(stem + ".bias").reshape(layer.head_count, -1)[:, -layer.value_length :]
            bias = self.upload(values, at).view(np.float32).reshape(values.shape)
        away, keys, mixed = at != self.home, self.stack(k, at), self.stack(v, at)
        return {"attn_k_b": Linear(keys, away=away), "attn_v_b": Linear(mixed, bias=bias, away=away)}

    def stack(self, values: np.ndarray, at: str) -> Matrix:
        """float32 [H, rows, cols] as one matrix."""
        return Matrix("F32", values.shape[0] * values.shape[1], values.shape[2], self.upload(values, at))

    def output(self, embedding: Matrix) -> Linear:
        """The output matrix; a tied one is the embedding, of which the output's device has a copy of its own."""
        if "output.weight" in self.views:
            return self.linear("output")
        if self.split.place("token_embd.weight") == self.home:
            return Linear(embedding)
        return Linear(replace(embedding, data=self.upload(embedding.data, self.home), prepared={}))


def is_matrix(name: str, view: View) -> bool:
    """Whether x is multiplied with this tensor ("attn_q.weight"), block by block as it is stored."""
    stem, _, end = name.rpartition(".")
    return end == "weight" and len(view.shape) > 1 and stem.rpartition(".")[2] not in EXPANDED


def check_formats(c: ModelConfig, views: Views, split: Split) -> None:
    """Raise FormatError for the first matrix of a type that its device's ops do not take (vectors are expanded)."""
    for name, view in views.items():
        if not is_matrix(name, view) or predicts_further(c, name):
            continue
        place = split.place(view.stored.name)
        if split.looked_up(name):  # rows of it are looked up, in any type; with a tied one the output multiplies
            if "output.weight" in views:
                continue
            place = split.homes[-1]
        device = split.devices[place]
        if view.stored.type not in device.formats:
            hint = "leave it on the GPU, " if len(split.devices) > 1 and place == CPU else ""
            raise FormatError(
                f"{name}: the {device.name} device has no kernel for type {view.stored.type}; it takes "
                f"{', '.join(device.formats)}; {hint}requantize the file, or use moe_ref"
            )


def load_dense(split: Split, file: GGUFFile, config: ModelConfig, views: Views, progress: bool = False) -> DenseWeights:
    """Copy the dense tensors of a checked file to their devices.

    Raises GGUFError if the file cannot be read, NonFiniteError where a vector holds a number that is not finite.
    """
    layers = with_progress(config.layers, "loading the dense part", len(config.layers)) if progress else config.layers
    up = _Uploader(split, file, views)
    token_embd = up.matrix("token_embd.weight")
    output_norm, output = up.norm("output_norm"), up.output(token_embd)
    factors = [name for name in config.quirks.rope_factors if name in views]
    return DenseWeights(
        token_embd=token_embd,
        output_norm=output_norm,
        output=output,
        divisors={name: up.values(name).astype(np.float64) for name in factors},
        layers=tuple(map(up.layer, layers)),
        nbytes=up.nbytes,
        lies=up.lies,
        looks_up=split.looked_up("token_embd.weight"),
    )
