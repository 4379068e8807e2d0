"""What llama.cpp's CPU kernels make of the numbers that meet a stored matrix, before they multiply.

A dot product with quantized weights runs on small integers, so the other side is rounded to 8 bits first; one with
half-precision weights rounds it to the same half precision. Each ``round_`` function maps float32 [..., n] to float32
[..., n]: numbers its type can hold. (In what order products are then added: dots.py.)

Source: ``type_traits_cpu`` (``ggml-cpu.c``) and ``quantize_row_*`` (``arch/x86/quants.c``, ``ggml-quants.c``) of
ggml 0.25.3. Where ggml's portable code rounds halves away from zero, its x86 code rounds them to even; so does this.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_EIGHT_BITS = "Q1_0 Q2_0 Q4_0 Q5_0 Q8_0 IQ4_NL MXFP4 NVFP4"
_EIGHT_BITS_256 = "Q2_K Q3_K Q4_K Q5_K Q6_K IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_XS TQ1_0 TQ2_0"

DOT_TYPES: dict[str, str] = {  # type of a matrix -> type of what it is multiplied with; not here: F32
    "F16": "F16",
    "BF16": "BF16",
    "Q4_1": "Q8_1",
    "Q5_1": "Q8_1",
    **dict.fromkeys(_EIGHT_BITS.split(), "Q8_0"),
    **dict.fromkeys(_EIGHT_BITS_256.split(), "Q8_K"),
}


def round_f16(x: np.ndarray) -> np.ndarray:
    """To the nearest half-precision number, ties to even; too large becomes infinity."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def round_bf16(x: np.ndarray) -> np.ndarray:
    """To the nearest number with the upper 16 bits of a float32, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), x, nearest.view(np.float32))


def _divided(numerator: float, x: np.ndarray) -> np.ndarray:
    """``numerator / x``, and zero where x is."""
    return np.divide(np.float32(numerator), x, out=np.zeros_like(x), where=x != 0)


def _largest(blocks: np.ndarray) -> np.ndarray:
    """The number of the largest magnitude of each block, with its sign; the first of several. [B, n] -> [B, 1]."""
    return np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)


Quantized = tuple[np.ndarray, np.ndarray]  # steps [B, 1] and whole numbers [B, n], as float32


def quantize_q8_0(x: np.ndarray) -> Quantized:
    """Blocks of 32: -127..127; the step is not yet rounded to half precision."""
    blocks = x.reshape(-1, 32)
    most = np.abs(blocks).max(axis=1, keepdims=True)  # [B, 1]
    return most / np.float32(127), np.rint(blocks * _divided(127, most))


def quantize_q8_k(x: np.ndarray) -> Quantized:
    """Blocks of 256: -127..127 times a step whose sign makes the number of the largest magnitude -127."""
    blocks = x.reshape(-1, 256)
    steps_per_one = _divided(-127, _largest(blocks))  # [B, 1]
    return _divided(1, steps_per_one), np.minimum(np.rint(blocks * steps_per_one), 127)


def round_q8_0(x: np.ndarray) -> np.ndarray:
    """Whole numbers times a half-precision step."""
    step, q = quantize_q8_0(x)
    return (round_f16(step) * q).reshape(x.shape)


def round_q8_k(x: np.ndarray) -> np.ndarray:
    """Whole numbers times a float32 step."""
    step, q = quantize_q8_k(x)
    return (step * q).reshape(x.shape)


def round_q4_0(x: np.ndarray) -> np.ndarray:
    """Blocks of 32: -8..7 times a half-precision step whose sign makes the number of the largest magnitude -8."""
    blocks = x.reshape(-1, 32)
    step = _largest(blocks) / np.float32(-8)  # [B, 1]
    q = np.minimum(np.floor(blocks * _divided(1, step) + np.float32(8.5)), 15) - 8
    return (round_f16(step) * q).reshape(x.shape)


ROUNDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F16": round_f16,
    "BF16": round_bf16,
    "Q8_0": round_q8_0,
    "Q8_1": round_q8_0,  # Q8_1 adds the block's sum, to be multiplied with the minimum of the weights
    "Q8_K": round_q8_k,
    "Q4_0": round_q4_0,
}


def round_to(x: np.ndarray, kind: str) -> np.ndarray:
    """x [..., n], rounded to what type ``kind`` can hold; "F32" changes nothing. A float64 x stays float64."""
    if kind == "F32":
        return x
    return ROUNDINGS[kind](x.astype(np.float32, copy=False)).astype(x.dtype, copy=False)


def round_for(x: np.ndarray, matrix_type: str) -> np.ndarray:
    """x [..., n] as it is multiplied with a matrix of type ``matrix_type``."""
    return round_to(x, DOT_TYPES.get(matrix_type, "F32"))
