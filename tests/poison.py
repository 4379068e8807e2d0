"""Copies of a GGUF file with numbers in them that are not finite."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from moe_cupy.kernels.samples import SCALES_AT
from moe_ref.gguf import GGUFFile, TensorInfo
from moe_ref.quants import BY_NAME

BITS = {  # how NaN and infinities are written in each type of number
    "F32": (4, (0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000, 0xFF800000)),
    "F16": (2, (0x7E00, 0x7FFF, 0xFFFF, 0x7C01, 0x7C00, 0xFC00)),
    "BF16": (2, (0x7FC0, 0x7FFF, 0xFFFF, 0x7F81, 0x7F80, 0xFF80)),
}


def can_be_poisoned(info: TensorInfo) -> bool:
    """Whether its type has numbers, or scales of blocks, that can be other than finite."""
    return info.type in BITS or bool(SCALES_AT.get(info.type))


def poisoned(source: Path, target: Path, info: TensorInfo, rng: np.random.Generator) -> str:
    """Copy a model, and poison one number or scale in each matrix (or, of an embedding, each row) of a tensor.

    Returns what was written, for messages.
    """
    width, patterns = BITS[info.type if info.type in BITS else "F16"]
    bits = int(rng.choice(patterns))
    kind, row = BY_NAME[info.type], BY_NAME[info.type].row_bytes(info.shape[-1])
    unit = row if info.name == "token_embd.weight" else info.nbytes // (info.shape[0] if len(info.shape) > 2 else 1)
    shutil.copyfile(source, target)
    with open(target, "r+b") as file:
        for start in range(0, info.nbytes, unit):
            block = int(rng.integers(unit // kind.block_bytes)) * kind.block_bytes
            at = 0 if info.type in BITS else int(rng.choice(SCALES_AT[info.type]))
            file.seek(info.offset + start + block + at)
            file.write(bits.to_bytes(width, "little"))
    return f"{info.name} ({info.type}): {bits:#x}"


def tensors_to_poison(file: GGUFFile) -> list[TensorInfo]:
    """Those of a model that any pass reads."""
    return [info for info in file.tensors.values() if can_be_poisoned(info)]
