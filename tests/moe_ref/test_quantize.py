"""Encoders against outsiders: gguf-py's and ggml's own bytes, and the error of ggml's k-quants."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from moe_ref.quants import BY_NAME, ENCODERS, FormatError, dequantize, quantize

EXACT = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def awkward_rows(width: int) -> np.ndarray:
    """float32 [rows, width]: many seeded scales, and every corner that a rule of rounding may cut."""
    random = np.random.default_rng(4)
    normal = random.standard_normal((10_000, width)).astype(np.float32)
    scales = np.float32(2) ** random.integers(-30, 14, (10_000, 1)).astype(np.float32)
    whole = random.integers(-16, 17, (2_000, width)).astype(np.float32)  # ties, and several equal extremes
    halves = whole / 2
    constant = np.repeat(random.standard_normal((64, 1)).astype(np.float32), width, axis=1)
    zeros = np.zeros((2, width), np.float32)
    zeros[1] *= -1
    single = np.zeros((width, width), np.float32)
    np.fill_diagonal(single, -3)
    tiny = normal[:200] * np.float32(1e-40)  # denormal: 1 / d overflows
    small = normal[:200] * np.float32(1e-37)
    huge = normal[:200] * np.float32(1e37)  # d overflows its half precision
    largest = np.sign(normal[:20]) * np.finfo(np.float32).max
    return np.concatenate([normal * scales, whole, halves, constant, zeros, single, tiny, small, huge, largest])


@pytest.mark.parametrize("name", EXACT)
def test_bytes_equal_those_of_gguf_py(name):
    rows = awkward_rows(64)
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(rows, GGMLQuantizationType[name]).view(np.uint8)
    got = quantize(rows, name)
    assert got.shape == expected.shape == (len(rows), BY_NAME[name].row_bytes(64))
    wrong = np.flatnonzero((got != expected).any(axis=1))
    assert not wrong.size, (name, wrong.size, wrong[0], rows[wrong[0]], got[wrong[0]], expected[wrong[0]])


def test_nan_stays_nan_in_plain_types():
    bits = np.array([[0x7F800001, 0xFFFFFFFF, 0x7FC00000, 0x7F800000]], np.uint32)
    for name in ("F16", "BF16"):
        back = dequantize(quantize(bits.view(np.float32), name).ravel(), name, (4,))
        assert np.isnan(back[:3]).all() and back[3] == np.inf, (name, back)


def test_any_shape_and_any_number_type_is_encoded_row_by_row():
    rows = np.arange(2 * 3 * 64).reshape(2, 3, 64)
    got = quantize(rows, "Q4_0")
    assert got.shape == (2, 3, 36)
    for i, j in np.ndindex(2, 3):
        assert np.array_equal(got[i, j], quantize(rows[i, j].astype(np.float32), "Q4_0"))
    assert quantize(np.zeros((0, 64)), "Q8_0").shape == (0, 68)
    assert quantize(rows.transpose(0, 2, 1)[:, :, :1], "F32").shape == (2, 64, 4)


@pytest.mark.parametrize("name", ["IQ2_XXS", "NVFP4", "Q9_9", "q8_0", ""])
def test_a_type_without_an_encoder_is_refused_by_name(name):
    with pytest.raises(FormatError, match=f"blk.0.ffn_up.weight: nothing here encodes type {name}; accepted: F32"):
        quantize(np.zeros((2, 256)), name, "blk.0.ffn_up.weight")


@pytest.mark.parametrize("name", [n for n in ENCODERS if BY_NAME[n].block_elements > 1])
def test_a_row_of_broken_blocks_is_refused_by_name(name):
    width = BY_NAME[name].block_elements + 8
    with pytest.raises(FormatError, match=f"output: a row of {width} elements .* of {name}"):
        quantize(np.zeros((4, width)), name, "output")
