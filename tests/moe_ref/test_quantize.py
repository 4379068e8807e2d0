"""Encoders against outsiders: gguf-py's and ggml's own bytes, and the error of ggml's k-quants."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from moe_ref.gguf import open_gguf
from moe_ref.quants import BY_NAME, ENCODERS, FormatError, dequantize, quantize

EXACT = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"]


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


# ---------------------------------------------------------------------------------------------------------
# Formats with a search: as good as ggml's own encoder

# Root-mean-square error of ggml 0.25.3's ``ggml_quantize_chunk`` without importances, computed with libggml:
# on GAUSSIAN below, and on tensors of the trained model as its Q8_0 file has them.
GGML_ERROR = {
    "gaussian": (0.296119, 0.150583, 0.0713492, 0.0361575, 0.0177231, 0.0760071),
    "token_embd.weight": (0.0176746, 0.00894617, 0.00423526, 0.00214203, 0.00104946, 0.00452726),
    "blk.0.attn_k.weight": (0.0130705, 0.0066593, 0.0031659, 0.00159939, 0.000790517, 0.00335549),
    "blk.3.ffn_down_exps.weight": (0.0116058, 0.00590885, 0.00279404, 0.0014132, 0.000696912, 0.00298333),
}
SEARCHED = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"]
GAUSSIAN = np.random.default_rng(7).standard_normal((64, 2048)).astype(np.float32)


def back(raw: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Decoded by gguf-py."""
    return gguf.quants.dequantize(raw.reshape(*shape[:-1], -1), GGMLQuantizationType[name]).reshape(shape)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x, dtype=np.float64).mean()))


@pytest.mark.parametrize("name", SEARCHED)
def test_error_on_gaussian_data_is_at_most_that_of_ggml(name):
    error = rms(GAUSSIAN - back(quantize(GAUSSIAN, name), name, GAUSSIAN.shape))
    most = 1.0005 if name == "IQ4_NL" else 1.02  # there nothing but the order of sums differs
    assert error <= most * GGML_ERROR["gaussian"][SEARCHED.index(name)]


@pytest.mark.parametrize("tensor", list(GGML_ERROR)[1:])
def test_error_on_the_trained_model_is_at_most_that_of_ggml(shared, tensor):
    with open_gguf(shared / "data/trained/moe-40m-Q8_0.gguf") as file:
        info = file.tensors[tensor]
        weights = dequantize(file.read(tensor), info.type, info.shape)
    for name, theirs in zip(SEARCHED, GGML_ERROR[tensor], strict=True):
        error = rms(weights - back(quantize(weights, name), name, weights.shape))
        assert error <= 1.02 * theirs, (name, error / theirs)


@pytest.mark.parametrize("name", [*SEARCHED, "Q8_0", "MXFP4"])
def test_error_on_the_shared_vectors_is_at_most_that_of_ggml(shared, name):
    """ggml had an importance matrix of ones there, with which it searches more and has smaller errors than without."""
    with np.load(shared / "data/golden/dequant_vectors.npz") as file:
        key = next(k for k in file.files if k.upper() == f"{name}/SRC_BYTES")
        source, theirs = file["source"], file[key]
    ours = quantize(source, name)
    if name in EXACT:
        assert np.array_equal(ours.ravel(), theirs.ravel())
    error, limit = rms(source - back(ours, name, source.shape)), rms(source - back(theirs, name, source.shape))
    assert error <= 1.02 * limit, error / limit


@pytest.mark.parametrize("name", [*SEARCHED, "Q8_K"])
def test_corners_never_decode_to_something_worse_than_zero(name):
    rows = awkward_rows(256)
    rows = rows[np.abs(rows).max(axis=1) < 1e4]
    decoded = dequantize(quantize(rows, name).ravel(), name, rows.shape)
    assert np.isfinite(decoded).all()
    error, size = (np.sqrt(np.square(a.astype(np.float64)).mean(axis=1)) for a in (rows - decoded, rows))
    normal = size > 1e-4  # below, the step of a half-precision scale is coarse
    assert (error[normal] <= 0.4 * size[normal]).all(), (error / size)[normal].max()
    assert (decoded[size == 0] == 0).all() and (size == 0).sum() == 2


@pytest.mark.parametrize("name", SEARCHED)
def test_a_constant_is_kept(name):
    """The largest magnitude decides; the two steps of a block's scales are rounded to half precision and few bits."""
    rows = np.repeat(np.float32([[-3.5], [0.75], [1.0], [-0.5]]), 256, axis=1)
    decoded = dequantize(quantize(rows, name).ravel(), name, rows.shape)
    assert np.abs(decoded / rows - 1).max() < 2e-3


@pytest.mark.parametrize("name", [*SEARCHED, "Q8_K", "MXFP4"])
def test_a_block_does_not_depend_on_its_neighbours(name):
    rows = awkward_rows(256)[::37]
    together = quantize(rows, name)
    assert np.array_equal(together, np.concatenate([quantize(row[None], name) for row in rows]))


def test_numbers_on_the_grid_of_iq4_nl_are_exact():
    values = np.float32([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
    row = np.tile(values, 2)[None] * np.float32(0.25)
    assert np.array_equal(dequantize(quantize(row, "IQ4_NL").ravel(), "IQ4_NL", row.shape), row)


def test_q8_k_by_hand():
    """The largest, 12.7, becomes -127 steps of -0.1, whose sums of 16 are kept."""
    x = np.zeros((1, 256), np.float32)
    x[0, :3], x[0, 255] = [12.7, -1.0, 0.26], -12.7
    raw = quantize(x, "Q8_K")[0]
    assert np.isclose(raw[:4].view("<f4")[0], -0.1, rtol=1e-6)
    assert raw[4:260].view("i1").tolist() == [-127, 10, -3, *[0] * 252, 127]
    assert raw[260:].view("<i2").tolist() == [-120, *[0] * 14, 127]
