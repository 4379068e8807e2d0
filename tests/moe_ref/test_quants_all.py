"""Every tensor type decodes random blocks as ggml decodes them, bit for bit, in any shape; the table is complete."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import pytest
from arrays import same_bits
from conftest import SHARED
from gguf.constants import GGMLQuantizationType
from gguf_writer import write_gguf

from moe_ref.gguf import open_gguf
from moe_ref.inspect import describe
from moe_ref.quants import BY_ID, BY_NAME, FORMATS, dequantize

# ---------------------------------------------------------------------------------------------------------
# Random blocks, against gguf-py where it decodes the type and otherwise against a second, plainer reading here

# Where the half-precision scales lie in a block; IQ1_M (scattered bits) and Q8_K (single precision) apart.
SCALES = {
    "F16": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ1_S": [0], "IQ2_XXS": [0], "IQ2_XS": [0], "IQ2_S": [0],
    "IQ3_XXS": [0], "IQ3_S": [0], "IQ4_NL": [0], "IQ4_XS": [0], "Q1_0": [0], "Q2_0": [0], "TQ1_0": [52], "TQ2_0": [64],
}  # fmt: skip
# zeros, denormals, smallest normal, largest, infinities, quiet and signalling NaN with and without sign and payload
ODD_HALVES = np.array([0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00,
                       0xFE00, 0x7D01, 0xFD55, 0x7FFF], "<u2")  # fmt: skip
ODD_SINGLES = np.array([0x0000, 0x8000, 0x0001, 0x807F, 0x0080, 0x7F7F, 0x7F80, 0xFF80, 0x7FC0, 0xFFC0, 0x7F81], "<u4")
FINITE = {"I8", "I16", "I32", "I64", "NVFP4"}  # no code of theirs means infinity or NaN
NEVER_NAN = FINITE | {"MXFP4"}
SEEDS = 0, 1
N_BLOCKS = 12_000


def random_blocks(name: str, seed: int, count: int) -> np.ndarray:
    """uint8 [count, block_bytes]: any bytes; in the last third, scales from ODD_HALVES or ODD_SINGLES."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (count, BY_NAME[name].block_bytes), np.uint8)
    odd = raw[-(count // 3) :]
    halves, singles = rng.choice(ODD_HALVES, (len(odd), 2)), rng.choice(ODD_SINGLES, (len(odd), 1)) << 16
    for i, offset in enumerate(SCALES.get(name, [])):
        odd[:, offset : offset + 2] = halves[:, i : i + 1].view(np.uint8)
    if name == "IQ1_M":
        pieces = (halves[:, :1] >> np.array([0, 4, 8, 12], "<u2") & 15) << 12
        odd[:, 48:] = (odd[:, 48:].copy().view("<u2") & 0xFFF | pieces).view(np.uint8)
    if name in ("F32", "Q8_K"):
        odd[:, :4] = singles.view(np.uint8)
    if name == "BF16":
        odd[:] = singles.view(np.uint8)[:, 2:]
    if name == "F64":
        with np.errstate(invalid="ignore"):  # a signalling NaN among them
            odd[:] = singles.view("<f4").astype("<f8").view(np.uint8)
    return raw


def with_scale(raw: np.ndarray, q: np.ndarray) -> np.ndarray:
    return raw[:, :2].copy().view("<f2").astype(np.float32) * q.astype(np.float32)


def q1_0(raw: np.ndarray) -> np.ndarray:
    bits = np.unpackbits(raw[:, 2:], axis=1, bitorder="little").astype(np.uint32)
    return (with_scale(raw, np.ones(128)).view(np.uint32) ^ (1 - bits) << 31).view(np.float32)  # a sign, even a NaN's


def q2_0(raw: np.ndarray) -> np.ndarray:
    bits = np.unpackbits(raw[:, 2:], axis=1, bitorder="little").astype(np.int8)
    return with_scale(raw, bits[:, 0::2] + 2 * bits[:, 1::2] - 1)


# The types that gguf-py cannot decode.
PLAINLY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F64": lambda raw: np.frombuffer(raw.tobytes(), "<f8").astype(np.float32)[:, None],
    "I8": lambda raw: np.frombuffer(raw.tobytes(), "<i1").astype(np.float32)[:, None],
    "I16": lambda raw: np.frombuffer(raw.tobytes(), "<i2").astype(np.float32)[:, None],
    "I32": lambda raw: np.frombuffer(raw.tobytes(), "<i4").astype(np.float32)[:, None],
    "I64": lambda raw: np.frombuffer(raw.tobytes(), "<i8").astype(np.float32)[:, None],
    "Q8_K": lambda raw: raw[:, :4].copy().view("<f4") * raw[:, 4:260].view(np.int8).astype(np.float32),
    "Q1_0": q1_0,
    "Q2_0": q2_0,
}


def expected_of(raw: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return PLAINLY[name](raw) if name in PLAINLY else gguf.quants.dequantize(raw, GGMLQuantizationType[name])


def gguf_decodes(name: str) -> bool:
    try:
        expected_of(np.zeros((1, BY_NAME[name].block_bytes), np.uint8), name)
    except (KeyError, NotImplementedError):
        return False
    return True


def test_every_type_that_gguf_py_decodes_is_supported():
    theirs = {t.name for t in GGMLQuantizationType if t.name not in PLAINLY and gguf_decodes(t.name)}
    assert theirs | PLAINLY.keys() == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("seed", SEEDS)
def test_random_blocks_decode_bit_for_bit(name, seed):
    raw = random_blocks(name, seed, N_BLOCKS)
    expected = expected_of(raw, name)
    tiny = (expected != 0) & (np.abs(expected) < 2.0**-14)
    wanted = {
        "infinity": (np.isinf(expected), FINITE),
        "NaN": (np.isnan(expected), NEVER_NAN),
        "denormal": (tiny, FINITE),
    }
    for what, (present, impossible) in wanted.items():
        assert present.any() != (name in impossible), f"{name}, seed {seed}: the cases have {what} against expectation"
    same_bits(dequantize(raw.ravel(), name, expected.shape), expected, f"{name}, seed {seed}, {len(raw)} blocks")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 2, 1), (5, 1, 3), (2, 3, 1, 2), (0,), (4, 0, 2)], ids=str)
def test_any_shape_of_whole_blocks_keeps_its_order(name, shape):
    kind = BY_NAME[name]
    raw = random_blocks(name, 3, int(np.prod(shape)))
    shape = (*shape[:-1], shape[-1] * kind.block_elements)
    expected = expected_of(raw, name).reshape(shape) if len(raw) else np.empty(shape, np.float32)
    same_bits(dequantize(raw.ravel(), name, shape), expected, f"{name} {shape}")
    spread = np.repeat(raw.ravel(), 2)
    spread.setflags(write=False)
    same_bits(dequantize(spread[::2], name, shape), expected, f"{name}, every second byte of a read-only array")


@pytest.mark.parametrize("name", FORMATS)
def test_decoding_leaves_the_bytes_as_they_were(name):
    raw = random_blocks(name, 4, 6).ravel()
    before = raw.copy()
    dequantize(raw, name, (6 * BY_NAME[name].block_elements,))
    assert (raw == before).all()


def test_every_type_of_the_dequant_vectors_is_supported():
    path = SHARED / "data/golden/dequant_vectors.npz"
    if not path.is_file():
        pytest.skip(f"no {path.name} in {SHARED}")
    keys = {key.partition("/")[0].upper() for key in np.load(path).files} - {"SOURCE"}
    assert keys and keys <= FORMATS.keys(), keys - FORMATS.keys()


# ---------------------------------------------------------------------------------------------------------
# The table of types, beyond what gguf-py lists


@pytest.mark.parametrize(
    ("type_id", "name", "elements", "nbytes"),
    [(42, "Q2_0", 64, 18), (31, "Q4_0_4_4", 32, 18), (33, "Q4_0_8_8", 32, 18), (38, "IQ4_NL_8_8", 32, 18)],
)
def test_types_that_gguf_py_does_not_list_are_known_by_size(type_id, name, elements, nbytes):
    assert BY_ID[type_id] == (name, type_id, elements, nbytes)


def test_every_id_of_a_gguf_type_is_known():
    assert sorted(BY_ID) == [i for i in range(43) if i not in (4, 5)]  # Q4_2 and Q4_3 were gone before GGUF came


def test_inspect_names_the_types_that_it_knows_and_cannot_decode(tmp_path):
    names = [name for name in BY_NAME if name not in FORMATS]
    assert "Q8_1" in names and "Q4_0_4_4" in names
    tensors = {f"{name}.weight": (name, (32,), bytes(BY_NAME[name].block_bytes)) for name in names}
    with open_gguf(write_gguf(tmp_path / "old.gguf", {"general.architecture": "llama"}, tensors)) as file:
        reasons = "\n".join(describe(file)["unsupported"])
    assert all(f"tensor type {name} (1 tensors)" in reasons for name in names), reasons
