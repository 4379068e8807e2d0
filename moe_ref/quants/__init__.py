"""Tensor formats: what the bytes of a GGUF tensor mean.

``FORMATS`` maps a type's name to the function that decodes its blocks,
uint8 [n, block_bytes] -> float32 [n, block_elements]. One small file per family.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moe_ref.quants.k import decode_q4_k, decode_q5_k, decode_q6_k
from moe_ref.quants.legacy import decode_q4_0, decode_q8_0
from moe_ref.quants.plain import decode_bf16, decode_f16, decode_f32
from moe_ref.quants.types import BY_ID, BY_NAME, GGMLType

__all__ = ["BY_ID", "BY_NAME", "FORMATS", "FormatError", "GGMLType", "dequantize", "unsupported"]

FORMATS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": decode_f32,
    "F16": decode_f16,
    "BF16": decode_bf16,
    "Q4_0": decode_q4_0,
    "Q8_0": decode_q8_0,
    "Q4_K": decode_q4_k,
    "Q5_K": decode_q5_k,
    "Q6_K": decode_q6_k,
}


class FormatError(ValueError):
    """A tensor type that is not supported, or bytes that do not fill whole blocks."""


def unsupported(name: str, type_name: str) -> FormatError:
    """The one sentence for a tensor of a type that nothing here can decode."""
    return FormatError(
        f"{name}: type {type_name} is not supported; supported: {', '.join(FORMATS)}; "
        f"requantize the file (llama-quantize --allow-requantize IN.gguf OUT.gguf Q4_K_M)"
    )


def dequantize(raw: np.ndarray, type_name: str, shape: tuple[int, ...], name: str = "tensor") -> np.ndarray:
    """Decode the bytes of a tensor: uint8 [nbytes] -> float32 of ``shape`` (NumPy order).

    Raises FormatError for an unsupported type and for a byte count that does not match the shape.
    """
    if type_name not in FORMATS:
        raise unsupported(name, type_name)
    kind = BY_NAME[type_name]
    n_elements = int(np.prod(shape, dtype=np.int64))
    wanted = n_elements // kind.block_elements * kind.block_bytes
    if n_elements % kind.block_elements or raw.nbytes != wanted:
        raise FormatError(f"{name}: {raw.nbytes} bytes are not {n_elements} elements of {type_name} ({wanted} bytes)")
    blocks = np.ascontiguousarray(raw).reshape(-1, kind.block_bytes)
    with np.errstate(invalid="ignore", over="ignore"):  # a scale may be NaN or infinite: the result says so
        return FORMATS[type_name](blocks).reshape(shape)
