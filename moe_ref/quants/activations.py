"""What llama.cpp's CPU kernels make of the numbers that meet a stored matrix, before they multiply.

A dot product with quantized weights runs on small integers, so the other side is rounded to 8 bits first; one with
half-precision weights rounds it to the same half precision. (In what order products are then added: dots.py.)

Source: ``type_traits_cpu`` (``ggml-cpu.c``) and ``quantize_row_*`` (``arch/x86/quants.c``, ``ggml-quants.c``) of
ggml 0.25.3. Where ggml's portable code rounds halves away from zero, its x86 code rounds them to even; so does this.
"""

from __future__ import annotations

import numpy as np

from moe_ref.quants import BY_NAME, ENCODERS, FORMATS
from moe_ref.quants.blocks import inverse
from moe_ref.quants.k import BLOCK_Q8_K

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


def quantize_q8_0(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of 32: steps [B, 1], not yet rounded to half precision, and whole numbers -127..127 [B, 32]."""
    blocks = x.reshape(-1, 32)
    most = np.abs(blocks).max(axis=1, keepdims=True)  # [B, 1]
    return most / np.float32(127), np.rint(blocks * inverse(most, times=127))


def quantize_q8_k(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of 256: steps [B, 1] and whole numbers -127..127 [B, 256]."""
    block = ENCODERS["Q8_K"](x.reshape(-1, 256)).view(BLOCK_Q8_K)
    return block["d"], block["qs"][:, 0]


def round_half(x: np.ndarray) -> np.ndarray:
    """To the nearest half-precision number, ties to even; too large becomes infinity."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def _rounded(x: np.ndarray, kind: str) -> np.ndarray:
    if kind in ("Q8_0", "Q8_1"):  # Q8_1 adds the block's sum, which the minimums of the weights meet (dots.py)
        step, q = quantize_q8_0(x)
        return round_half(step) * q
    if kind == "F16":
        return round_half(x)
    return FORMATS[kind](ENCODERS[kind](np.ascontiguousarray(x).reshape(-1, BY_NAME[kind].block_elements)))


def round_to(x: np.ndarray, kind: str) -> np.ndarray:
    """x [..., n], rounded to what type ``kind`` can hold; "F32" changes nothing. A float64 x stays float64."""
    if kind == "F32":
        return x
    return _rounded(x.astype(np.float32, copy=False), kind).reshape(x.shape).astype(x.dtype, copy=False)


def round_for(x: np.ndarray, matrix_type: str) -> np.ndarray:
    """x [..., n] as it is multiplied with a matrix of type ``matrix_type``."""
    return round_to(x, DOT_TYPES.get(matrix_type, "F32"))
