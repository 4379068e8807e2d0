"""Four-bit floats that share a small float as scale: MXFP4 of the OCP microscaling formats, and Nvidia's NVFP4.

Both store E2M1 weights: 1 sign, 2 exponent, 1 fraction bit. As in ggml, the table below holds twice their
values, so that all are whole, and the scales are halved in return. Source: OCP Microscaling Formats (MX)
specification 1.0; ``block_mxfp4``, ``block_nvfp4`` of ggml.
"""

from __future__ import annotations

import numpy as np

from moe_ref.quants.blocks import pack_planes, planes, raw_bytes, scale_runs

BLOCK_MXFP4 = np.dtype([("e", "u1"), ("qs", "u1", 16)])
BLOCK_NVFP4 = np.dtype([("d", "u1", 4), ("qs", "u1", 32)])


def minifloat(codes: np.ndarray, fraction_bits: int, smallest: int) -> np.ndarray:
    """Positive floats of few bits -> float32: whole steps of 2^smallest, doubled with every exponent above 1.

    ::

        code   eeee fff      exponent e, fraction f of ``fraction_bits``
        e = 0  (subnormal)   f * 2^smallest
        e > 0                (2^fraction_bits + f) * 2^(smallest + e - 1)
    """
    codes = np.asarray(codes, np.int32)
    exponent, fraction = codes >> fraction_bits, codes & (2**fraction_bits - 1)
    whole = np.where(exponent > 0, 2**fraction_bits + fraction, fraction)
    return np.ldexp(whole.astype(np.float32), smallest + np.maximum(exponent, 1) - 1)


_POSITIVE = minifloat(np.arange(8), fraction_bits=1, smallest=0).astype(np.int8)  # 0 1 2 3 4 6 8 12
E2M1_DOUBLED = np.concatenate([_POSITIVE, -_POSITIVE])  # int8 [16], by code; -0 is 0


def half_e8m0(codes: np.ndarray) -> np.ndarray:
    """uint8 -> float32, half of 2^(e - 127). Code 255, NaN in the OCP's text, is 2^128 to ggml, and here."""
    return np.ldexp(np.float32(1), codes.astype(np.int32) - 128)


def half_e4m3(codes: np.ndarray) -> np.ndarray:
    """uint8 -> float32, half of a float of 4 exponent (bias 7) and 3 fraction bits; the top bit is ignored.

    Code 0x7F, NaN by its definition, is 0 to ggml, and here.
    """
    return np.where(codes == 0x7F, np.float32(0), minifloat(codes & 0x7F, fraction_bits=3, smallest=-10))


def decode_mxfp4(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 17] -> float32 [n, 32]: ``x = 2^(e - 127) * e2m1``.

    ::

        byte 0      e     exponent of the shared scale (E8M0)
        byte 1..16  qs    low nibble = element j, high nibble = element j + 16
    """
    block = raw.view(BLOCK_MXFP4)[:, 0]
    q = np.take(E2M1_DOUBLED, planes(block["qs"], 4))  # [n, 16] -> [n, 2, 16]
    return scale_runs(half_e8m0(block["e"])[:, None], q)


def decode_nvfp4(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 36] -> float32 [n, 64]: ``x = e4m3 * e2m1``, a scale for every 16 weights.

    (The format's second scale, one float32 a tensor, is a tensor of its own in GGUF.)

    ::

        byte 0..3   d     scales of the 4 sub-blocks (E4M3)
        byte 4..35  qs    8 bytes a sub-block, low nibble = element j, high nibble = element j + 8
    """
    block = raw.view(BLOCK_NVFP4)[:, 0]
    q = np.take(E2M1_DOUBLED, planes(block["qs"].reshape(-1, 4, 8), 4))  # [n, 4, 8] -> [n, 4, 2, 8]
    return scale_runs(half_e4m3(block["d"]), q)


_MIDPOINTS = (0.5, 1.5, 2.5, 3.5, 5, 7, 10)  # between the magnitudes of E2M1_DOUBLED


def encode_mxfp4(x: np.ndarray) -> np.ndarray:
    """float32 [n, 32] -> uint8 [n, 17]: the scale puts the largest magnitude at 4 to 8; midpoints go to zero's side."""
    largest = np.abs(x).max(axis=1)  # [n]
    block = np.empty(len(x), BLOCK_MXFP4)
    block["e"] = np.where(largest > 0, np.floor(np.log2(largest)) - 2 + 127, 0).astype(np.uint8)
    size = np.ldexp(np.abs(x), 128 - block["e"].astype(np.int32)[:, None])
    code = np.zeros(x.shape, np.uint8)
    for midpoint in _MIDPOINTS:
        code += size > midpoint
    code = np.minimum(code, np.where(block["e"] < 253, 7, 5).astype(np.uint8)[:, None])  # 8 * 2^125 is no float32
    code |= ((x < 0) & (code > 0)).astype(np.uint8) << 3
    block["qs"] = pack_planes(code.reshape(-1, 2, 16), 4)
    return raw_bytes(block)
