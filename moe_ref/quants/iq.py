"""i-quants: groups of 4 or 8 weights are points of a codebook, their signs and scales stored beside them.

``x = d * (2s + 1) * c * sign * point``: half-precision ``d`` of a super-block of 256, small integer ``s`` of a
run of 16 or 32 weights (an odd multiplier cannot be zero), ``c`` a constant of the format. The one-bit
formats have no signs: their points are of -1, 0 and 1, moved by 1/8 one way or the other.
Source: ``block_iq1_s`` ... ``block_iq3_s`` of ggml; the codebooks are in ``codebooks.py``.
"""

from __future__ import annotations

from math import prod

import numpy as np

from moe_ref.quants.blocks import fields, scale_runs
from moe_ref.quants.codebooks import EVEN_SIGNS, SIGNS, codebook

BLOCK_IQ1_S = np.dtype([("d", "<f2"), ("qs", "u1", 32), ("qh", "<u2", 8)])
BLOCK_IQ1_M = np.dtype([("qs", "u1", 32), ("qh", "u1", 16), ("scales", "<u2", 4)])
BLOCK_IQ2_XXS = np.dtype([("d", "<f2"), ("runs", [("qs", "u1", 4), ("word", "<u4")], 8)])
BLOCK_IQ2_XS = np.dtype([("d", "<f2"), ("qs", "<u2", 32), ("scales", "u1", 8)])
BLOCK_IQ2_S = np.dtype([("d", "<f2"), ("qs", "u1", 32), ("signs", "u1", 32), ("qh", "u1", 8), ("scales", "u1", 8)])
BLOCK_IQ3_XXS = np.dtype([("d", "<f2"), ("qs", "u1", 64), ("words", "<u4", 8)])
BLOCK_IQ3_S = np.dtype([("d", "<f2"), ("qs", "u1", 64), ("qh", "u1", 8), ("signs", "u1", 32), ("scales", "u1", 4)])


def _odd_steps(d: np.ndarray, s: np.ndarray) -> np.ndarray:
    """``d * (2s + 1)``: float16 [n]; s, uint [n, ...] of r numbers -> float32 [n, r]."""
    return d.astype(np.float32)[:, None] * (2 * s.reshape(len(d), prod(s.shape[1:])) + 1).astype(np.float32)


def _points(book: str, index: np.ndarray) -> np.ndarray:
    """uint [n, ...] -> int8 [n, 256]."""
    return np.take(codebook(book), index, axis=0).reshape(-1, 256)


def _signs(table: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """uint [n, ...] of 32 codes -> int8 [n, 256] of 1 and -1."""
    return np.take(table, codes, axis=0).reshape(-1, 256)


def _wide(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Indices of more than 8 bits: uint8 [n, w], the bits above them in uint [n, ...] -> uint16 [n, w]."""
    return low | (high.reshape(low.shape).astype(np.uint16) << 8)


def decode_iq2_xxs(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 66] -> float32 [n, 256]: ``x = d * (2s + 1) / 8 * sign * point``.

    ::

        byte 0..1    d     half precision
        byte 2..65         8 runs of 32 weights, 8 bytes each:
          byte 0..3  qs    index of the point of weights 8i..8i+7 of the run
          byte 4..7  word  ssss ddddddd ccccccc bbbbbbb aaaaaaa
                           s, and the signs (``EVEN_SIGNS``) of points 0 (a) to 3 (d)
    """
    block = raw.view(BLOCK_IQ2_XXS)[:, 0]
    qs, word = block["runs"]["qs"], block["runs"]["word"]  # [n, 8, 4], [n, 8]
    x = _points("iq2xxs", qs) * _signs(EVEN_SIGNS, fields(word, 7))
    return scale_runs(_odd_steps(block["d"], word >> 28) / 8, x)


def decode_iq2_xs(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 74] -> float32 [n, 256]: ``x = d * (2s + 1) / 8 * sign * point``.

    ::

        byte 0..1    d        half precision
        byte 2..65   qs       32 words: 9 bits of index (low), 7 bits of signs (``EVEN_SIGNS``)
        byte 66..73  scales   s of runs of 16: run 2i in the low nibble of byte i, 2i + 1 in the high
    """
    block = raw.view(BLOCK_IQ2_XS)[:, 0]
    x = _points("iq2xs", block["qs"] & 511) * _signs(EVEN_SIGNS, block["qs"] >> 9)
    return scale_runs(_odd_steps(block["d"], fields(block["scales"], 4)) / 8, x)


def decode_iq2_s(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 82] -> float32 [n, 256]: ``x = d * (2s + 1) / 8 * sign * point``.

    ::

        byte 0..1    d        half precision
        byte 2..33   qs       low 8 bits of the index of each of 32 points
        byte 34..65  signs    bit j of byte i: weight 8i + j is negative
        byte 66..73  qh       top 2 bits of the indices: point 4i + p at bits 2p, 2p + 1 of byte i
        byte 74..81  scales   as in IQ2_XS
    """
    block = raw.view(BLOCK_IQ2_S)[:, 0]
    x = _points("iq2s", _wide(block["qs"], fields(block["qh"], 2))) * _signs(SIGNS, block["signs"])
    return scale_runs(_odd_steps(block["d"], fields(block["scales"], 4)) / 8, x)


def decode_iq3_xxs(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 98] -> float32 [n, 256]: ``x = d * (2s + 1) / 4 * sign * point``, points of 4 weights.

    ::

        byte 0..1    d       half precision
        byte 2..65   qs      index of each of 64 points
        byte 66..97  words   s and the signs of 8 runs of 32 weights, as in IQ2_XXS
    """
    block = raw.view(BLOCK_IQ3_XXS)[:, 0]
    x = _points("iq3xxs", block["qs"]) * _signs(EVEN_SIGNS, fields(block["words"], 7))
    return scale_runs(_odd_steps(block["d"], block["words"] >> 28) / 4, x)


def decode_iq3_s(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 110] -> float32 [n, 256]: ``x = d * (2s + 1) * sign * point``, points of 4 weights.

    ::

        byte 0..1      d        half precision
        byte 2..65     qs       low 8 bits of the index of each of 64 points
        byte 66..73    qh       ninth bits: point 8i + p at bit p of byte i
        byte 74..105   signs    as in IQ2_S
        byte 106..109  scales   s of runs of 32: run 2i in the low nibble of byte i, 2i + 1 in the high
    """
    block = raw.view(BLOCK_IQ3_S)[:, 0]
    x = _points("iq3s", _wide(block["qs"], fields(block["qh"], 1))) * _signs(SIGNS, block["signs"])
    return scale_runs(_odd_steps(block["d"], fields(block["scales"], 4)), x)


def _shifted_points(index: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Index and direction of 32 points, uint [n, 32] each -> float32 [n, 32, 8]: -1, 0, 1, each plus or minus 1/8."""
    points = np.take(codebook("iq1s"), index, axis=0)
    return points + np.where(down, np.float32(-0.125), np.float32(0.125))[:, :, None]


def decode_iq1_s(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 50] -> float32 [n, 256]: ``x = d * (2s + 1) * (point ± 1/8)``.

    ::

        byte 0..1    d    half precision
        byte 2..33   qs   low 8 bits of the index of each of 32 points
        byte 34..49  qh   8 words, one for each run of 32 weights: - sss ddd ccc bbb aaa
                          minus 1/8 (else plus), s, and the top 3 bits of indices 0 (a) to 3 (d)
    """
    block = raw.view(BLOCK_IQ1_S)[:, 0]
    triples = fields(block["qh"], 3)  # [n, 8] -> [n, 8, 5]
    down = np.repeat(block["qh"] >> 15, 4, axis=1)  # [n, 8] -> [n, 32]
    x = _shifted_points(_wide(block["qs"], triples[:, :, :4]), down)
    return scale_runs(_odd_steps(block["d"], triples[:, :, 4]), x)


def decode_iq1_m(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 56] -> float32 [n, 256]: ``x = d * (2s + 1) * (point ± 1/8)``, ``d`` in four pieces.

    ::

        byte 0..31   qs       low 8 bits of the index of each of 32 points
        byte 32..47  qh       a nibble -bbb a point (low nibble first): minus 1/8, top 3 bits of the index
        byte 48..55  scales   4 words: xxxx ddd ccc bbb aaa, s of 4 runs of 16 weights
                              and 4 bits of the half-precision d, its lowest in the first word
    """
    block = raw.view(BLOCK_IQ1_M)[:, 0]
    nibbles = fields(block["qh"], 4).reshape(-1, 32)
    pieces = (block["scales"] >> 12) << np.array([0, 4, 8, 12], np.uint16)  # [n, 4]
    d = np.bitwise_or.reduce(pieces, axis=1).view(np.float16)
    x = _shifted_points(_wide(block["qs"], nibbles & 7), nibbles >> 3)
    return scale_runs(_odd_steps(d, fields(block["scales"], 3)[:, :, :4]), x)
