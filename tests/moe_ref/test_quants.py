"""Common tensor formats decode as ggml decodes them, bit for bit; what cannot be decoded is refused by name.

The other formats, and random blocks of all of them: ``test_quants_hand.py`` and ``test_quants_all.py``.
"""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
from arrays import same_bits
from conftest import SHARED
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from moe_ref.quants import BY_ID, BY_NAME, FORMATS, FormatError, dequantize

# Where the half-precision scales lie in a block; in plain types the element itself is what can be odd.
SCALES = {"Q4_0": [0], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "F16": [0]}
# zeros, denormals, smallest normal, largest, infinities, quiet and signalling NaN
ODD_HALVES = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x83FF, 0x0400, 0x7BFF, 0xFBFF]
ODD_HALVES += [0x7C00, 0xFC00, 0x7E00, 0xFE00, 0x7D01, 0x7FFF]
ODD_SINGLES = [0x0000, 0x8000, 0x0001, 0x807F, 0x0080, 0x7F7F, 0x7F80, 0xFF80, 0x7FC0, 0xFFC0, 0x7F81]  # upper halves


def by_gguf_py(raw: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw, GGMLQuantizationType[name])


# ---------------------------------------------------------------------------------------------------------
# Blocks packed by hand. Each gives its bytes, some elements worked out on paper, and all of them in plain Python.

HALF = {0.25: b"\x00\x34", 0.5: b"\x00\x38", 1.0: b"\x00\x3c", 2.0: b"\x00\x40"}  # sign 0, exponent - 15, fraction 0

# scale 0..3 = 1 2 3 4, min 0..3 = 5 6 7 8 in the low six bits; top bits of scale 4..7 = 0 0 2 3, of min 4..7 = 0 1 0 0;
# then the low nibbles of scale 4..7 = 1 3 5 7 and of min 4..7 = 2 4 6 8
PACKED_SCALES = bytes([0x01, 0x02, 0x83, 0xC4, 0x05, 0x46, 0x07, 0x08, 0x21, 0x43, 0x65, 0x87])
SUB_SCALES = [1, 2, 3, 4, 1, 3, 2 * 16 + 5, 3 * 16 + 7]
SUB_MINS = [5, 6, 7, 8, 2, 1 * 16 + 4, 6, 8]
RAMPS = bytes(i % 16 | (15 - i % 16) << 4 for i in range(128))  # nibbles go up in even sub-blocks, down in odd ones


def ramp(sub_block: int, i: int) -> int:
    return 15 - i % 16 if sub_block % 2 else i % 16


def affine(d: float, dmin: float, fifth: int = 0) -> list[float]:
    """Q4_K; with ``fifth`` = 16, element i of sub-block i % 8 has the fifth bit of Q5_K."""
    q = [(s, ramp(s, i) + (fifth if i % 8 == s else 0)) for s in range(8) for i in range(32)]
    return [d * SUB_SCALES[s] * value - dmin * SUB_MINS[s] for s, value in q]


def six_bits() -> list[float]:
    out = []
    for e in range(256):
        half, i = divmod(e, 128)
        nibble = (i % 64) % 16 if i < 64 else 15 - half  # QL_6: low nibbles count up, high nibbles are 15 - half
        q = nibble + 16 * (i // 32) - 32  # QH_6: bit pair p is p
        scale = e // 16 + 1 if e < 128 else 7 - e // 16  # 1..8, then -1..-8
        out.append(2.0 * scale * q)
    return out


QL_6 = bytes(i % 16 | (15 - half) << 4 for half in range(2) for i in range(64))
SCALES_6 = struct.pack("16b", *range(1, 9), *range(-1, -9, -1))

HAND = {
    "F32": (b"\x00\x00\x80\x3f\x00\x00\x20\xc0\x01\x00\x00\x00", {}, [1.0, -2.5, 2.0**-149]),
    "F16": (b"\x00\x3c\x00\xc1\x01\x00\xff\x7b", {}, [1.0, -2.5, 2.0**-24, 65504.0]),
    "BF16": (b"\x80\x3f\x20\xc0\x01\x00\x49\x40", {}, [1.0, -2.5, 2.0**-133, 3.140625]),
    "Q4_0": (
        HALF[0.5] + bytes(j | (15 - j) << 4 for j in range(16)),
        {0: -4.0, 8: 0.0, 15: 3.5, 16: 3.5, 31: -4.0},
        [0.5 * (j - 8) for j in range(16)] + [0.5 * (7 - j) for j in range(16)],
    ),
    "Q8_0": (
        HALF[0.25] + struct.pack("32b", *range(-128, 128, 8)),
        {0: -32.0, 16: 0.0, 31: 30.0},
        [0.25 * q for q in range(-128, 128, 8)],
    ),
    "Q4_K": (  # element 0: 1*0 - 0.5*5; 33: 2*14 - 0.5*6; 170: sub-block 5, 3*(15-10) - 0.5*20; 255: 55*0 - 0.5*8
        HALF[1.0] + HALF[0.5] + PACKED_SCALES + RAMPS,
        {0: -2.5, 33: 25.0, 170: 5.0, 207: 37 * 15 - 3.0, 224: 55 * 15 - 4.0, 255: -4.0},
        affine(1.0, 0.5),
    ),
    "Q5_K": (  # as above, with 16 more where i % 8 is the sub-block: elements 0 and 33 but not 34
        HALF[1.0] + HALF[0.5] + PACKED_SCALES + bytes(1 << i % 8 for i in range(32)) + RAMPS,
        {0: 16 - 2.5, 33: 2 * 30 - 3.0, 34: 2 * 13 - 3.0, 255: 55 * 16 - 4.0},
        affine(1.0, 0.5, fifth=16),
    ),
    "Q6_K": (  # element 0: 2*1*(0-32); 127: 2*8*(15+48-32); 128: 2*-1*(0-32); 255: 2*-8*(14+48-32)
        QL_6 + bytes([0b11100100]) * 64 + SCALES_6 + HALF[2.0],
        {0: -64.0, 127: 496.0, 128: 64.0, 255: -480.0},
        six_bits(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HAND)
def test_hand_made_block_decodes_to_hand_computed_values(name):
    raw, by_hand, values = HAND[name]
    got = dequantize(np.frombuffer(raw, np.uint8), name, (len(values),))
    for i, value in by_hand.items():
        assert got[i] == value, f"{name} element {i}: {got[i]}, by hand {value}"
    same_bits(got, np.array(values, np.float32), name)


# ---------------------------------------------------------------------------------------------------------
# Against gguf-py and against ggml's own C code


def random_blocks(name: str, seed: int, count: int) -> np.ndarray:
    """uint8 [count, block_bytes]: any bytes; in the last third, scales taken from ODD_HALVES (or ODD_SINGLES)."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (count, BY_NAME[name].block_bytes), np.uint8)
    odd = raw[-count // 3 :]
    for offset in SCALES.get(name, []):
        odd[:, offset : offset + 2] = rng.choice(np.array(ODD_HALVES, "<u2"), (len(odd), 1)).view(np.uint8)
    if name in ("F32", "BF16"):
        odd[:] = (rng.choice(np.array(ODD_SINGLES, "<u4"), (len(odd), 1)) << 16).view(np.uint8)[:, -odd.shape[1] :]
    return raw


@pytest.mark.parametrize("name", HAND)
@pytest.mark.parametrize("seed", [0, 1])
def test_random_blocks_equal_gguf_py_bit_for_bit(name, seed):
    assert name in SCALES or BY_NAME[name].block_elements == 1, f"say in SCALES where the scales of {name} lie"
    raw = random_blocks(name, seed, 12_000)
    expected = by_gguf_py(raw, name)
    tiny = (expected != 0) & (np.abs(expected) < 2.0**-14)
    for what, present in {"NaN": np.isnan(expected), "infinity": np.isinf(expected), "denormal": tiny}.items():
        assert present.any(), f"{name}, seed {seed}: no {what} among the cases: they prove less than they say"
    same_bits(dequantize(raw.ravel(), name, expected.shape), expected, f"{name}, seed {seed}, {len(raw)} blocks")


@pytest.mark.parametrize("name", HAND)
def test_rows_of_several_blocks_and_axes_keep_their_order(name):
    shape = (3, 2, 2 * BY_NAME[name].block_elements)
    raw = random_blocks(name, 2, 12)
    expected = by_gguf_py(raw.reshape(3, 2, -1), name)
    same_bits(dequantize(raw.ravel(), name, shape), expected, f"{name} {shape}")
    spread = np.repeat(raw.ravel(), 2)
    spread.setflags(write=False)
    same_bits(dequantize(spread[::2], name, shape), expected, f"{name}, every second byte of a read-only array")


def vectors() -> list[pytest.param]:
    path = SHARED / "data/golden/dequant_vectors.npz"
    if not path.is_file():
        return [pytest.param(None, "", marks=pytest.mark.skip(reason=f"no {path.name} in {SHARED}"))]
    keys = {key.partition("/")[0] for key in np.load(path).files} - {"source"}
    return [pytest.param(path, key, id=key) for key in sorted(keys) if key.upper() in FORMATS]


@pytest.mark.parametrize(("path", "key"), vectors())
@pytest.mark.parametrize("kind", ["src", "rnd"])
def test_ggml_dequant_vectors_are_met_bit_for_bit(path, key, kind):
    with np.load(path) as file:
        raw, expected = file[f"{key}/{kind}_bytes"], file[f"{key}/{kind}_f32"]
    same_bits(dequantize(raw.ravel(), key.upper(), expected.shape), expected, f"{key}/{kind}")


# ---------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("name", FORMATS)
def test_wrong_byte_count_is_refused_by_name(name):
    kind = BY_NAME[name]
    for shape, nbytes in [
        ((2, kind.block_elements), 2 * kind.block_bytes - 1),
        ((2, kind.block_elements), 2 * kind.block_bytes + 1),
        ((2, kind.block_elements), kind.block_bytes),
        ((2, kind.block_elements), 0),
        ((), 0),
    ]:
        with pytest.raises(FormatError, match=rf"blk\.3\.ffn_up_exps\.weight: {nbytes} bytes .* {name}"):
            dequantize(np.zeros(nbytes, np.uint8), name, shape, "blk.3.ffn_up_exps.weight")


@pytest.mark.parametrize("name", [n for n in FORMATS if BY_NAME[n].block_elements > 1])
def test_a_shape_of_broken_blocks_is_refused_whatever_the_byte_count(name):
    kind = BY_NAME[name]
    for nbytes in (kind.block_bytes, 2 * kind.block_bytes):
        with pytest.raises(FormatError, match=r"token_embd: .* elements of"):
            dequantize(np.zeros(nbytes, np.uint8), name, (kind.block_elements + 1,), "token_embd")


@pytest.mark.parametrize("name", [*(n for n in BY_NAME if n not in FORMATS), "Q9_9", "q8_0", ""])
def test_unsupported_type_is_refused_naming_tensor_type_and_what_is_supported(name):
    with pytest.raises(FormatError, match=r"^output\.weight: ") as caught:
        dequantize(np.zeros(1024, np.uint8), name, (256,), "output.weight")
    message = str(caught.value)
    assert f"type {name} is not supported" in message and all(known in message for known in FORMATS), message


# ---------------------------------------------------------------------------------------------------------
# The table of types


# ggml has these and gguf-py 0.19 does not; all but Q2_0 were removed from ggml, but files may have them.
UNLISTED = {"Q2_0", "Q4_0_4_4", "Q4_0_4_8", "Q4_0_8_8", "IQ4_NL_4_4", "IQ4_NL_4_8", "IQ4_NL_8_8"}


def test_type_table_agrees_with_gguf_py_except_for_q8_1():
    """gguf-py counts Q8_1's two scales as float32 (40 bytes); ggml's struct has two halves, 2 + 2 + 32 = 36 bytes."""
    theirs = {int(t): (t.name, *GGML_QUANT_SIZES[t]) for t in GGMLQuantizationType}
    ours = {i: (t.name, t.block_elements, t.block_bytes) for i, t in BY_ID.items()}
    differing = {ours.get(i, theirs.get(i))[0] for i in theirs.keys() | ours.keys() if theirs.get(i) != ours.get(i)}
    assert differing == {"Q8_1"} | UNLISTED, {
        i: (ours.get(i), theirs.get(i)) for i in theirs if theirs[i] != ours.get(i)
    }
    assert ours[9] == ("Q8_1", 32, 36)


def test_types_are_found_by_name_and_by_id():
    assert all(BY_NAME[t.name] is t and t.id == i for i, t in BY_ID.items()) and len(BY_NAME) == len(BY_ID)
    assert FORMATS.keys() <= BY_NAME.keys()


def test_row_bytes_count_whole_blocks_or_refuse():
    assert [BY_NAME[n].row_bytes(512) for n in ("F32", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K")] == [
        2048, 1024, 16 * 18, 16 * 34, 2 * 144, 2 * 210,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="Q4_K: a row of 300 elements is not a multiple of its block of 256"):
        BY_NAME["Q4_K"].row_bytes(300)
