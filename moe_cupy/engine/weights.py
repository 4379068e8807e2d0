"""The dense part of a model in device memory: everything but the routed experts, in the file's own formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from moe_cupy.device.base import Device
from moe_cupy.kernels.matrix import Matrix
from moe_ref.config import ModelConfig
from moe_ref.gguf import GGUFFile
from moe_ref.quants import FormatError, dequantize


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer, attributes named like the GGUF tensors; vectors float32, matrices in block format."""

    attn_norm: Any
    attn_q: Matrix
    attn_k: Matrix
    attn_v: Matrix
    attn_output: Matrix
    ffn_norm: Any
    attn_q_norm: Any = None  # [K], where the architecture normalises heads
    attn_k_norm: Any = None
    ffn_gate_inp: Matrix | None = None  # router, in a layer of routed experts
    ffn_gate: Matrix | None = None  # dense FFN
    ffn_up: Matrix | None = None
    ffn_down: Matrix | None = None


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """Everything that is resident for good."""

    token_embd: Matrix
    output_norm: Any
    output: Matrix
    layers: tuple[LayerWeights, ...]
    nbytes: int


class _Uploader:
    def __init__(self, device: Device, file: GGUFFile):
        self.device, self.file, self.nbytes = device, file, 0

    def _upload(self, raw: np.ndarray) -> Any:
        self.nbytes += raw.nbytes
        target = self.device.alloc(raw.nbytes)
        target[...] = raw  # at load time: nothing is overlapped with it
        return target

    def matrix(self, name: str) -> Matrix:
        info = self.file.tensors[name]
        return Matrix(info.type, info.shape[0], info.shape[1], self._upload(self.file.read(name)))

    def vector(self, name: str) -> Any:
        info = self.file.tensors[name]
        values = dequantize(self.file.read(name), info.type, info.shape, name)
        return self._upload(values.view(np.uint8)).view(np.float32)

    def layer(self, block: str) -> LayerWeights:
        loaded = {}
        for field in LayerWeights.__dataclass_fields__:
            name = f"{block}{field}.weight"
            if name in self.file.tensors:
                loaded[field] = self.vector(name) if field.endswith("norm") else self.matrix(name)
        return LayerWeights(**loaded)


def check_formats(file: GGUFFile, device: Device) -> None:
    """Raise FormatError for the first matrix of a type that the device's ops do not take (vectors are expanded)."""
    for info in file.tensors.values():
        if len(info.shape) > 1 and info.type not in device.formats:
            raise FormatError(
                f"{info.name}: the {device.name} device has no kernel for type {info.type}; it takes "
                f"{', '.join(device.formats)}; requantize the file, or use moe_ref"
            )


def load_dense(device: Device, file: GGUFFile, config: ModelConfig, progress: bool = False) -> DenseWeights:
    """Copy the dense tensors of a checked file to the device. Raises GGUFError if the file cannot be read."""
    blocks = tqdm(range(config.block_count), "loading dense part", unit="layer", disable=not progress, leave=False)
    up = _Uploader(device, file)
    token_embd = up.matrix("token_embd.weight")
    tied = "output.weight" not in file.tensors
    return DenseWeights(
        token_embd=token_embd,
        output_norm=up.vector("output_norm.weight"),
        output=token_embd if tied else up.matrix("output.weight"),
        layers=tuple(up.layer(f"blk.{i}.") for i in blocks),
        nbytes=up.nbytes,
    )
