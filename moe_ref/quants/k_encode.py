"""Encoders of the k-quants: fit a scale to every run, round the scales to their few bits, then choose the codes.

As ``quantize_row_q*_K_ref`` of ggml 0.25.3 (no importance matrix), but with one weight for the squares of all
five formats, which ggml takes for the same search with an importance matrix.
"""

from __future__ import annotations

import numpy as np

from moe_ref.quants.blocks import inverse, pack_planes, raw_bytes
from moe_ref.quants.fit import columns, fit_affine, fit_scale, largest, size_weight
from moe_ref.quants.k import BLOCK_Q2_K, BLOCK_Q3_K, BLOCK_Q4_K, BLOCK_Q5_K, BLOCK_Q6_K, BLOCK_Q8_K


def pack_scales(scales: np.ndarray, mins: np.ndarray) -> np.ndarray:
    """uint8 [n, 8] twice, of 6 bits -> uint8 [n, 12]: undoes ``k.unpack_scales``."""
    first, second = scales[:, :4] | (scales[:, 4:] >> 4 << 6), mins[:, :4] | (mins[:, 4:] >> 4 << 6)
    return np.concatenate([first, second, (scales[:, 4:] & 15) | (mins[:, 4:] << 4)], axis=1)


def pack_signed_scales(scales: np.ndarray) -> np.ndarray:
    """Integers [n, 16] of -32..31 -> uint8 [n, 12]: undoes ``k.unpack_signed_scales``."""
    codes = (scales + 32).astype(np.uint8)
    low, top = (codes & 15).reshape(-1, 2, 8), (codes >> 4).reshape(-1, 4, 4)
    return np.concatenate([pack_planes(low, 4), pack_planes(top, 2)], axis=1)


def _whole_parts(values: np.ndarray, end: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Values [n, s] -> a step float16 [n], which puts the largest magnitude at ``end``, and integers float32 [n, s].

    The integers are chosen for the step as half precision rounds it.
    """
    step = (largest(values, 1) / np.float32(end)).astype(np.float16)  # [n, 1]
    numbers = np.rint(values * inverse(step.astype(np.float32)))
    return step[:, 0], np.clip(numbers, low, high, out=numbers)


def _codes(x: np.ndarray, step: np.ndarray, low: int, high: int) -> np.ndarray:
    """x [n, 256] over steps [n, s], to the nearest integer of low..high; float32 [n, 256]."""
    steps = np.where(step == 0, 1, step)[:, :, None]
    q = np.rint(x.reshape(*step.shape, -1) / steps)
    return np.clip(q, low, high, out=q).reshape(x.shape)


def _encode_affine(x: np.ndarray, layout: np.dtype, run: int, top: int, nudges: np.ndarray) -> tuple:
    """The record with d and dmin; integers of scales and mins uint8 [n, 256 / run]; codes uint8 [n, 256]."""
    most = 15 if layout == BLOCK_Q2_K else 63
    scale, floor = (part.reshape(len(x), -1) for part in fit_affine(columns(x, run), top, nudges))
    block = np.zeros(len(x), layout)
    block["d"], scales = _whole_parts(scale, most, 0, most)
    block["dmin"], mins = _whole_parts(floor, most, 0, most)
    step, floor = (block[name].astype(np.float32)[:, None] * part for name, part in (("d", scales), ("dmin", mins)))
    raised = (x.reshape(*floor.shape, -1) + floor[:, :, None]).reshape(x.shape)
    return block, scales.astype(np.uint8), mins.astype(np.uint8), _codes(raised, step, 0, top).astype(np.uint8)


def _encode_symmetric(x: np.ndarray, layout: np.dtype, zero: int, scale_zero: int) -> tuple:
    """The record with d; scales float32 [n, 16] of -scale_zero..scale_zero - 1; codes uint8 [n, 256]."""
    runs = columns(x, 16)
    ends = -(zero + np.arange(-9, 10) / 10)
    scale = fit_scale(runs, size_weight(runs), ends, lambda y: np.clip(np.rint(y), -zero, zero - 1)).reshape(-1, 16)
    block = np.zeros(len(x), layout)
    block["d"], scales = _whole_parts(scale, -scale_zero, -scale_zero, scale_zero - 1)
    q = _codes(x, block["d"].astype(np.float32)[:, None] * scales, -zero, zero - 1) + zero
    return block, scales, q.astype(np.uint8)


def encode_q2_k(x: np.ndarray) -> np.ndarray:
    """float32 [n, 256] -> uint8 [n, 84]."""
    block, scales, mins, q = _encode_affine(x, BLOCK_Q2_K, 16, 3, np.arange(-5, 11) / 10)
    block["scales"] = scales | (mins << 4)
    block["qs"] = pack_planes(q.reshape(-1, 2, 4, 32), 2).reshape(-1, 64)
    return raw_bytes(block)


def encode_q3_k(x: np.ndarray) -> np.ndarray:
    """float32 [n, 256] -> uint8 [n, 110]."""
    block, scales, q = _encode_symmetric(x, BLOCK_Q3_K, 4, 32)
    block["scales"] = pack_signed_scales(scales)
    block["hmask"] = pack_planes((q >> 2).reshape(-1, 8, 32), 1)
    block["qs"] = pack_planes((q & 3).reshape(-1, 2, 4, 32), 2).reshape(-1, 64)
    return raw_bytes(block)


def encode_q4_k(x: np.ndarray) -> np.ndarray:
    """float32 [n, 256] -> uint8 [n, 144]."""
    block, scales, mins, q = _encode_affine(x, BLOCK_Q4_K, 32, 15, np.arange(-10, 11) / 10)
    block["scales"] = pack_scales(scales, mins)
    block["qs"] = pack_planes(q.reshape(-1, 4, 2, 32), 4).reshape(-1, 128)
    return raw_bytes(block)


def encode_q5_k(x: np.ndarray) -> np.ndarray:
    """float32 [n, 256] -> uint8 [n, 176]."""
    block, scales, mins, q = _encode_affine(x, BLOCK_Q5_K, 32, 31, np.arange(-5, 11) / 10)
    block["scales"] = pack_scales(scales, mins)
    block["qh"] = pack_planes((q >> 4).reshape(-1, 8, 32), 1)
    block["qs"] = pack_planes((q & 15).reshape(-1, 4, 2, 32), 4).reshape(-1, 128)
    return raw_bytes(block)


def encode_q6_k(x: np.ndarray) -> np.ndarray:
    """float32 [n, 256] -> uint8 [n, 210]."""
    block, scales, q = _encode_symmetric(x, BLOCK_Q6_K, 32, 128)
    block["scales"] = scales
    block["ql"] = pack_planes((q & 15).reshape(-1, 2, 2, 64), 4).reshape(-1, 128)
    block["qh"] = pack_planes((q >> 4).reshape(-1, 2, 4, 32), 2).reshape(-1, 64)
    return raw_bytes(block)


def encode_q8_k(x: np.ndarray) -> np.ndarray:
    """float32 [n, 256] -> uint8 [n, 292]: the largest magnitude becomes -127 steps; NaN, where one is not finite."""
    block = np.zeros(len(x), BLOCK_Q8_K)
    with np.errstate(invalid="ignore", over="ignore"):
        reciprocal = inverse(largest(x, 1), times=-127)  # [n, 1]
        block["d"] = np.where(np.isfinite(x).all(axis=1), inverse(reciprocal)[:, 0], np.nan)
        block["qs"] = np.minimum(np.rint(reciprocal * x), 127)
    block["bsums"] = block["qs"].reshape(-1, 16, 16).sum(axis=2, dtype=np.int16)
    return raw_bytes(block)
