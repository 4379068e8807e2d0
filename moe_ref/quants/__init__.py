"""Tensor formats: what the bytes of a GGUF tensor mean.

``FORMATS`` maps a type's name to the function that decodes its blocks,
uint8 [n, block_bytes] -> float32 [n, block_elements]; ``ENCODERS`` the other way, for the types that have one.
One small file per family.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moe_ref.quants import fp4, iq, iq4, k, k_encode, legacy, plain, ternary
from moe_ref.quants.types import BY_ID, BY_NAME, GGMLType

__all__ = [
    "BY_ID",
    "BY_NAME",
    "ENCODERS",
    "FORMATS",
    "FormatError",
    "GGMLType",
    "dequantize",
    "quantize",
    "unsupported",
]

FORMATS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F64": plain.decode_f64,
    "F32": plain.decode_f32,
    "F16": plain.decode_f16,
    "BF16": plain.decode_bf16,
    "I64": plain.integer_decoder(8),
    "I32": plain.integer_decoder(4),
    "I16": plain.integer_decoder(2),
    "I8": plain.integer_decoder(1),
    "Q4_0": legacy.decode_q4_0,
    "Q4_1": legacy.decode_q4_1,
    "Q5_0": legacy.decode_q5_0,
    "Q5_1": legacy.decode_q5_1,
    "Q8_0": legacy.decode_q8_0,
    "Q2_K": k.decode_q2_k,
    "Q3_K": k.decode_q3_k,
    "Q4_K": k.decode_q4_k,
    "Q5_K": k.decode_q5_k,
    "Q6_K": k.decode_q6_k,
    "Q8_K": k.decode_q8_k,
    "IQ1_S": iq.decode_iq1_s,
    "IQ1_M": iq.decode_iq1_m,
    "IQ2_XXS": iq.decode_iq2_xxs,
    "IQ2_XS": iq.decode_iq2_xs,
    "IQ2_S": iq.decode_iq2_s,
    "IQ3_XXS": iq.decode_iq3_xxs,
    "IQ3_S": iq.decode_iq3_s,
    "IQ4_NL": iq4.decode_iq4_nl,
    "IQ4_XS": iq4.decode_iq4_xs,
    "Q1_0": ternary.decode_q1_0,
    "Q2_0": ternary.decode_q2_0,
    "TQ1_0": ternary.decode_tq1_0,
    "TQ2_0": ternary.decode_tq2_0,
    "MXFP4": fp4.decode_mxfp4,
    "NVFP4": fp4.decode_nvfp4,
}

ENCODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": plain.encode_f32,
    "F16": plain.encode_f16,
    "BF16": plain.encode_bf16,
    "Q4_0": legacy.encode_q4_0,
    "Q4_1": legacy.encode_q4_1,
    "Q5_0": legacy.encode_q5_0,
    "Q5_1": legacy.encode_q5_1,
    "Q8_0": legacy.encode_q8_0,
    "Q2_K": k_encode.encode_q2_k,
    "Q3_K": k_encode.encode_q3_k,
    "Q4_K": k_encode.encode_q4_k,
    "Q5_K": k_encode.encode_q5_k,
    "Q6_K": k_encode.encode_q6_k,
    "Q8_K": k_encode.encode_q8_k,
    "IQ4_NL": iq4.encode_iq4_nl,
    "MXFP4": fp4.encode_mxfp4,
}
_CHUNK_ELEMENTS = 1 << 18  # encoded at a time: it bounds the memory, and what stays in the processor's cache is fast


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


def quantize(array: np.ndarray, type_name: str, name: str = "tensor") -> np.ndarray:
    """Encode an array row by row: numbers [..., elements] -> uint8 [..., row bytes].

    Raises FormatError for a type without an encoder and for rows that are no whole blocks.
    """
    if type_name not in ENCODERS:
        raise FormatError(f"{name}: nothing here encodes type {type_name}; accepted: {', '.join(ENCODERS)}")
    kind, shape = BY_NAME[type_name], array.shape or (1,)
    if shape[-1] % kind.block_elements:
        raise FormatError(
            f"{name}: a row of {shape[-1]} elements is not a multiple of the block of {kind.block_elements} of "
            f"{type_name}; choose a type with a smaller block"
        )
    blocks = np.ascontiguousarray(array, np.float32).reshape(-1, kind.block_elements)  # [n, block_elements]
    out = np.empty((len(blocks), kind.block_bytes), np.uint8)
    step = _CHUNK_ELEMENTS // kind.block_elements
    with np.errstate(invalid="ignore", over="ignore", divide="ignore", under="ignore"):
        for start in range(0, len(blocks), step):
            out[start : start + step] = ENCODERS[type_name](blocks[start : start + step])
    return out.reshape(*shape[:-1], kind.row_bytes(shape[-1]))
