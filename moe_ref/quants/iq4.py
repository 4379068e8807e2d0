"""Non-linear 4-bit: a nibble is an index into 16 values, spaced as weights are: dense near zero.

Source: ``block_iq4_nl``, ``block_iq4_xs`` and ``kvalues_iq4nl`` of ggml.
"""

from __future__ import annotations

import numpy as np

from moe_ref.quants.blocks import fields, inverse, pack_planes, planes, raw_bytes, scale_runs
from moe_ref.quants.fit import columns, fit_scale

BLOCK_IQ4_NL = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
BLOCK_IQ4_XS = np.dtype([("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)])

VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)


def decode_iq4_nl(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 18] -> float32 [n, 32]: ``x = d * VALUES[q]``.

    ::

        byte 0..1   d     half precision
        byte 2..17  qs    low nibble = element j, high nibble = element j + 16
    """
    block = raw.view(BLOCK_IQ4_NL)[:, 0]
    return scale_runs(block["d"].astype(np.float32)[:, None], np.take(VALUES, planes(block["qs"], 4)))


def decode_iq4_xs(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 136] -> float32 [n, 256]: ``x = d * (scale - 32) * VALUES[q]``, a 6-bit scale for every 32.

    ::

        byte 0..1    d          half precision
        byte 2..3    scales_h   top two bits of scale s at bits 2s, 2s + 1
        byte 4..7    scales_l   low four bits: scale 2i in the low nibble of byte i, 2i + 1 in the high
        byte 8..135  qs         16 bytes a sub-block, as in IQ4_NL
    """
    block = raw.view(BLOCK_IQ4_XS)[:, 0]
    low, top = fields(block["scales_l"], 4), fields(block["scales_h"], 2)  # [n, 4, 2], [n, 8]
    scales = (low.reshape(-1, 8) | (top << 4)).astype(np.float32) - 32
    q = np.take(VALUES, planes(block["qs"].reshape(-1, 8, 16), 4))  # [n, 8, 16] -> [n, 8, 2, 16]
    return scale_runs(block["d"].astype(np.float32)[:, None] * scales, q)


# Code of the nearest of VALUES for numbers from -127 on, in steps of a half: all their midpoints are whole or half.
_NEAREST = np.searchsorted((VALUES[1:].astype(np.int16) + VALUES[:-1]) / 2, np.arange(-254, 228) / 2, "right")
_NEAREST = _NEAREST.astype(np.uint8)


def _codes(x: np.ndarray) -> np.ndarray:
    """Numbers in units of the scale -> uint8 codes of the nearest value, the upper one at a midpoint."""
    at = np.floor(2 * x) + 254
    return _NEAREST[np.clip(at, 0, len(_NEAREST) - 1).astype(np.int16)]


def encode_iq4_nl(x: np.ndarray) -> np.ndarray:
    """float32 [n, 32] -> uint8 [n, 18]: ``fit_scale`` with squares weighted by x^2, as ggml without importances."""
    runs = columns(x, 32)
    values = VALUES.astype(np.float32)
    d = fit_scale(runs, runs * runs, (127, *range(-134, -119)), lambda y: values[_codes(y)])  # [n]
    block = np.empty(len(x), BLOCK_IQ4_NL)
    block["d"] = d
    block["qs"] = pack_planes(_codes(x * inverse(d)[:, None]).reshape(-1, 2, 16), 4)
    return raw_bytes(block)
