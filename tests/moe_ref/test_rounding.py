"""Types of the KV cache and rounded activations: as llama.cpp's CPU backend has them, on whole models and by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_model import latent_model

from moe_ref.attention import attend
from moe_ref.kv import KV
from moe_ref.kv_types import Kept, kept_as, rotated
from moe_ref.model import Model
from moe_ref.quants import BY_NAME, FORMATS
from moe_ref.quants.activations import DOT_TYPES, round_to
from moe_ref.quants.dots import decode, multiply

GOLDEN, DATA = SHARED / "data/golden", Path(__file__).resolve().parents[1] / "data/kv"
LATENT = {"latent": False, "latent-old": True}
QUANTS = (
    "Q4_K_M Q5_K_M Q6_K Q8_0 Q4_0 Q5_0 Q2_K Q3_K_M IQ1_S IQ2_XXS IQ2_XS IQ3_XXS IQ4_NL IQ4_XS MXFP4_MOE TQ1_0"
).split()
seeds = st.integers(0, 2**32 - 1)


@cache
def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


CASES = sorted(name for name in arrays(DATA / "logits.npz") if "/" in name)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """name -> its GGUF file: a reference file, or one of the latent models, written when asked for."""
    folder = tmp_path_factory.mktemp("latent")

    def find(name: str) -> Path:
        if name in LATENT:
            return latent_model(folder / f"{name}.gguf", LATENT[name])
        return next(GOLDEN.glob(f"*/{name}.gguf"), None) or pytest.skip(f"no {name}.gguf in {GOLDEN}")

    return find


# ---------------------------------------------------------------------------------------------------------
# The KV cache against llama.cpp


@pytest.mark.parametrize("case", CASES)
def test_cache_types_round_as_llama_cpp_does(case, model_file):
    """What is left is a rounding here and there that falls otherwise; to 16 bits, more of them are needed."""
    name, key, value = case.split("/")
    known = arrays(DATA / "logits.npz")
    last = slice(-len(known[case]), None)
    rounded = Model(model_file(name), cache_type_k=key, cache_type_v=value).logits(known["tokens"])[last]
    plain = Model(model_file(name)).logits(known["tokens"])[last]
    error, without = (float(np.median(np.abs(logits - known[case]))) for logits in (rounded, plain))
    allowed = without * (0.25 if value == "f16" else 0.1)
    assert error < allowed, f"{case}: median |Δ| {error:.2g}, with a float32 cache {without:.2g}"


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
def test_token_by_token_equals_one_batch_with_every_cache_type(kind, model_file):
    """In float64 no rounding to 16, 8 or 4 bits falls otherwise."""
    model = Model(model_file("latent"), dtype=np.float64, cache_type_k=kind, cache_type_v=kind)
    tokens, kv = arrays(DATA / "logits.npz")["tokens"], model.new_cache()
    apart = np.concatenate([model.forward(tokens[i : i + 1], kv) for i in range(len(tokens))])
    assert np.abs(apart - model.logits(tokens)).max() < 1e-9


def test_what_is_cached_is_rounded_and_what_meets_it_too():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(0, 1, (3, heads, 64)).astype(np.float32) for heads in (4, 2, 2))
    kept = Kept("F16", "F16")
    keys, values, _ = KV(kept=kept).append(k, v, 0)
    half = [x.astype(np.float16).astype(np.float32) for x in (q, k, v)]
    assert np.array_equal(keys, half[1]) and np.array_equal(values, half[2])
    scores = np.einsum("thd,shd->hts", half[0], np.repeat(half[1], 2, axis=1)) / 8
    share = np.exp(np.where(np.tri(3, dtype=bool), scores, -np.inf))
    share = (share / share.sum(-1, keepdims=True)).astype(np.float16).astype(np.float32)
    expected = np.einsum("hts,shd->thd", share, np.repeat(half[2], 2, axis=1))
    assert np.abs(attend(q, keys, values, 1 / 8, kept=kept) - expected).max() < 1e-6
    assert np.abs(attend(q, keys, values, 1 / 8) - expected).max() > 1e-5, "without rounding it is another result"


@given(seeds, st.sampled_from([64, 128, 256]), st.integers(1, 3))
@settings(deadline=None, max_examples=20)
def test_rotation_is_orthogonal_symmetric_and_spreads_one_number_over_all(seed, count, runs):
    x = np.random.default_rng(seed).normal(0, 1, (2, runs * count))
    y = rotated(x, count)
    assert np.abs(rotated(y, count) - x).max() < 1e-12
    assert np.allclose(np.linalg.norm(y, axis=1), np.linalg.norm(x, axis=1))
    one = rotated(np.eye(runs * count)[0], count)
    assert np.allclose(one[:count], count**-0.5) and not one[count:].any()
    # Sylvester's construction: row i, column j is minus where i and j share an odd number of bits
    signs = rotated(np.eye(count), count) * count**0.5
    assert all(signs[i, j] * (-1) ** (i & j).bit_count() > 0 for i in (0, 1, 5, 63) for j in range(count))


@pytest.mark.parametrize(
    ("name", "key", "value", "expected"),
    [
        ("qwen3moe-256.Q8_0", "q8_0", "q4_0", Kept("Q8_0", "Q4_0", 64, 64)),
        ("qwen3moe-256.Q8_0", "f32", "q8_0", Kept("F16", "Q8_0", 0, 64)),
        ("qwen3moe-256.Q8_0", "f16", "f32", Kept("F16", "F32")),
        ("qwen3moe.BF16", "q4_0", "q4_0", Kept("Q4_0", "Q4_0")),
        ("latent", "q8_0", "q8_0", Kept("Q8_0", "Q8_0")),
        ("latent-old", "q8_0", "f16", Kept("Q8_0", "F16", 64, 0)),
    ],
)
def test_how_keys_and_values_are_kept(name, key, value, expected, model_file):
    assert set(Model(model_file(name), cache_type_k=key, cache_type_v=value).kept) == {expected}


@pytest.mark.parametrize(
    ("widths", "expected"),
    [((192,) * 3, 64), ((256,) * 3, 256), ((128, 96, 128), 0), ((96,) * 3, 0), ((64, 128, 64), 64), ((32, 64, 32), 0)],
)
def test_how_many_neighbours_of_a_key_are_rotated(widths, expected, model_file):
    """The layer in the middle has no window; the first and the last share a cache, so they need one width."""
    layer = Model(model_file("latent-old")).config.layers[0]
    windows = [8, 0, 8] if len(set(widths)) > 1 and widths[0] == widths[2] and widths != (128, 96, 128) else [8] * 3
    layers = [replace(layer, key_length=w, window=n) for w, n in zip(widths, windows, strict=True)]
    assert kept_as(layers, "q8_0", "f16")[0].key_rotation == expected


REFUSED = [
    ("qwen3moe.BF16", "q5_0", "f16", r"-ctk, --cache-type-k: 'q5_0' .*; accepted: f32, f16, bf16, q8_0, q4_0$"),
    ("qwen3moe.BF16", "f16", "F16", r"-ctv, --cache-type-v: 'F16' .*; accepted: f32, f16, bf16, q8_0, q4_0$"),
    ("granitemoe.F16", "q8_0", "f16", r"-ctk q8_0: its blocks of 32 do not divide the 24 numbers .* layer 0"),
    ("granitemoe.F16", "f16", "q4_0", r"-ctv q4_0: its blocks of 32 do not divide the 24 numbers .* layer 0"),
    ("deepseek-v3.BF16", "q8_0", "q8_0", r"-ctk q8_0: its blocks of 32 do not divide the 48 numbers"),
    ("latent", "q8_0", "f16", r"-ctk q8_0 -ctv f16: .* give both the same type$"),
]


@pytest.mark.parametrize(("name", "key", "value", "message"), REFUSED)
def test_cache_types_that_do_not_fit_are_refused_in_one_line(name, key, value, message, model_file):
    with pytest.raises(ValueError, match=message) as refusal:
        Model(model_file(name), cache_type_k=key, cache_type_v=value)
    assert "\n" not in str(refusal.value)


# ---------------------------------------------------------------------------------------------------------
# Activations


def routes(seen: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> np.ndarray:
    """Positions [T] where each layer chose the experts of llama.cpp's float32 run."""
    names = [name for name in reference if "ffn_moe_topk" in name]
    return np.all([(seen[name[4:]] == reference[name]).all(-1) for name in names], axis=0)


@pytest.mark.parametrize("name", [*(f"qwen3moe-256.{kind}" for kind in QUANTS), "gpt-oss.MXFP4_MOE"])
def test_act_q8_comes_much_nearer_to_llama_cpp_on_quantized_files(name, model_file):
    path = model_file(name)
    reference = arrays(path.with_suffix(".npz"))
    model, seen = Model(path, act="q8"), {}
    model.observe = seen.__setitem__
    rounded, plain = model.logits(reference["tokens"]), Model(path).logits(reference["tokens"])
    agree = routes(seen, reference)
    assert agree.sum() >= 20, f"{name}: routes agree at {agree.sum()} positions"
    error, without = (float(np.median(np.abs(x - reference["logits"])[agree])) for x in (rounded, plain))
    assert error < without / 20, f"{name}: median |Δ| {error:.2g}, in float32 {without:.2g}"


@pytest.mark.parametrize("name", ["granitemoe.F16", "qwen3moe.BF16", "qwen3-dense.BF16", "qwen3next.BF16"])
def test_act_q8_rounds_to_half_precision_for_half_precision_weights(name, model_file):
    path = model_file(name)
    stem, _, kind = name.partition(".")
    reference = arrays(path.with_name(f"{stem}.npz"))
    known = reference[f"logits_{kind.lower()}"]
    error, without = (
        float(np.median(np.abs(Model(path, act=a).logits(reference["tokens"]) - known))) for a in ("q8", "f32")
    )
    assert error < without / 20, f"{name}: median |Δ| {error:.2g}, in float32 {without:.2g}"


def test_act_is_float32_by_default_and_anything_else_is_refused(model_file):
    path, tokens = model_file("latent"), [5, 9, 200]
    assert np.array_equal(Model(path).logits(tokens), Model(path, act="f32").logits(tokens))
    with pytest.raises(ValueError, match=r"^--act: 'q4' .*; accepted: f32, q8$"):
        Model(path, act="q4")


def test_every_type_but_plain_numbers_says_what_it_is_multiplied_with():
    """By hand from ggml's table of types; Q8_K has no product with a matrix."""
    assert set(FORMATS) - set(DOT_TYPES) == {"F64", "F32", "I64", "I32", "I16", "I8", "Q8_K"}
    for kind, dot in DOT_TYPES.items():
        assert BY_NAME[dot].block_elements <= max(32, BY_NAME[kind].block_elements), kind
    chosen = {k: DOT_TYPES[k] for k in ("Q4_0", "Q5_1", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "TQ2_0", "F16")}
    assert list(chosen.values()) == ["Q8_0", "Q8_1", "Q8_K", "Q8_0", "Q8_K", "Q8_0", "Q8_K", "F16"]


def test_rounding_to_8_bits_by_hand():
    x = np.zeros(32, np.float32)
    x[:5] = [127, 0.5, 1.5, -2.5, 63.4]  # step 1: halves go to even
    assert round_to(x, "Q8_0")[:5].tolist() == [127, 0, 2, -2, 63]
    wide = np.zeros(256, np.float32)
    wide[:4] = [-127, 126.7, 0.5, 254 / 127]
    assert round_to(wide, "Q8_K")[:4].tolist() == [-127, 127, 0, 2]
    x[0] = 127 * (1 + 2**-12)  # the step 1 + 2^-12 is not a half-precision number
    assert round_to(x, "Q8_0")[0] == 127
    wide[0] = -127 * (1 + 2**-12)
    assert round_to(wide, "Q8_K")[0] == wide[0]


def test_rounding_to_half_precision_by_hand():
    x = np.array([1 + 2**-9, 1 + 3 * 2**-9, 1 + 2**-8 + 2**-20, 1 + 2**-11, 1 + 3 * 2**-11], np.float32)
    assert (round_to(x, "BF16") - 1).tolist() == [0, 2**-7, 2**-8 * 0 + 2**-7, 0, 0]
    assert (round_to(x, "F16") - 1).tolist() == [2**-9, 3 * 2**-9, 2**-8, 0, 2**-9]
    assert np.isnan(round_to(np.float32([np.nan]), "BF16")) and np.isinf(round_to(np.float32([1e6]), "F16"))


@pytest.mark.parametrize("kind", ["Q4_0", "F16", "BF16", "Q8_0"])
def test_rounding_equals_gguf_where_it_has_the_type(kind):
    """Its Q8_0 is the portable one: halves away from zero; Gaussian numbers have none."""
    x = np.random.default_rng(1).normal(0, 3, (500, 256)).astype(np.float32)
    x[0, :32] = 0
    stored = gguf.GGMLQuantizationType[kind]
    expected = gguf.quants.dequantize(gguf.quants.quantize(x, stored), stored)
    differ = np.count_nonzero(round_to(x, kind) != expected)
    assert differ <= (3 if kind == "Q8_0" else 0), f"{kind}: {differ} of {x.size} differ"


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q8_0", "Q8_1", "Q8_K"])
def test_rounding_keeps_zeros_shape_and_float64(kind):
    assert not round_to(np.zeros((2, 3, 256), np.float32), kind).any()
    x = np.random.default_rng(2).normal(0, 1, (2, 3, 256))
    assert round_to(x, kind).dtype == np.float64 and round_to(x, kind).shape == x.shape
    assert np.array_equal(round_to(x, kind), round_to(x.astype(np.float32), kind))


@pytest.mark.parametrize("kind", sorted(set(DOT_TYPES) | {"F32"}))
@pytest.mark.parametrize("rows", [8, 5])
@pytest.mark.parametrize("is_expert", [True, False])
def test_products_are_those_of_the_rounded_activations(kind, rows, is_expert):
    """However they are added: float32's rounding of the parts is all there is between them and exact sums.

    Random bytes below 60 are finite scales of any type.
    """
    rng = np.random.default_rng(rows)
    raw = rng.integers(0, 60, (rows * 512 // BY_NAME[kind].block_elements, BY_NAME[kind].block_bytes)).astype(np.uint8)
    weights = FORMATS[kind](raw).reshape(rows, 512).astype(np.float64)
    x = rng.normal(0, 1, (3, 512)).astype(np.float32)
    rounded = round_to(x, DOT_TYPES.get(kind, "F32")).astype(np.float64)
    got = multiply(x, decode(raw.reshape(-1), kind, (rows, 512)), is_expert)
    room = np.abs(rounded) @ np.abs(weights).T
    if kind in ("Q4_1", "Q5_1"):  # Q8_1 keeps the sum of a block in half precision
        room *= 2**9
    assert got.dtype == np.float32
    assert (np.abs(got - rounded @ weights.T) <= 2.0**-20 * room + 1e-35).all()


def test_sums_are_added_by_halves_by_hand():
    """Sixteen partial sums: the last eight are added to the first eight, where 2^24 + 1 would lose the 1."""
    x = np.zeros((1, 16), np.float32)
    x[0, [0, 1, 8]] = [2**24, 1, -(2**24)]
    ones = np.ones((1, 16), "<f4").view(np.uint8).reshape(-1)
    assert multiply(x, decode(ones, "F32", (1, 16)), False).tolist() == [[1]]


def test_minimums_meet_a_sum_in_half_precision_by_hand():
    """Q4_1 of zeros with minimum 1: the sum is 127 + 31 * 62 = 2049, between the half-precision 2048 and 2050."""
    x = np.full((1, 32), 62, np.float32)
    x[0, 0] = 127
    raw = np.concatenate([np.array([1, 1], "<f2").view(np.uint8), np.zeros(16, np.uint8)])
    assert multiply(x, decode(raw, "Q4_1", (1, 32)), False).tolist() == [[2048]]


@pytest.mark.parametrize("kind", ["Q8_0", "MXFP4_MOE"])
def test_act_q8_gives_llama_cpps_very_bits(kind, model_file):
    """All of them here; some may change with the order in which a BLAS adds up attention."""
    path = model_file(f"qwen3moe-256.{kind}")
    reference = arrays(path.with_suffix(".npz"))
    same = Model(path, act="q8").logits(reference["tokens"]) == reference["logits"]
    assert same.mean() > 0.7, f"{kind}: {same.mean():.0%} of the logits equal"
