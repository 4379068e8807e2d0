"""Activations in 8 bits on the CUDA kernels: ops and whole models against NumPy that rounds blocks of 32 as they do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHARED
from fake_cupy import Cupy

from moe_cupy.device import open_device
from moe_cupy.device.cuda import CudaDevice
from moe_cupy.engine import Engine
from moe_cupy.kernels.cuda.cases import gemm_error, quantized, sum_error
from moe_cupy.kernels.cuda.sources import BLOCK_FORMATS
from moe_cupy.kernels.matrix import Matrix
from moe_cupy.kernels.reference import expand
from moe_cupy.kernels.samples import U, normal, random_matrix, unset
from moe_cupy.tools.check import FINER, check_model
from moe_ref.model import Model
from moe_ref.quants import FormatError
from moe_ref.weights import Weights
from tests.eight_bits import RecordingDevice, product_in_blocks_of_32
from tests.models import Shape, tiny_moe

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here: the emulated device needs it")

QUANTS = SHARED / "data/golden/quants"
KINDS = "Q4_K_M Q8_0 MXFP4_MOE Q2_K Q3_K_M Q5_K_M Q6_K Q4_0 Q5_0 IQ4_NL IQ4_XS IQ3_XXS IQ2_XXS IQ1_S TQ1_0".split()
QUICK = ("Q4_K_M", "Q8_0")
SAME = 0.001  # of what rounding changes: what the order of additions, which decides over few roundings, may do
MIXED = Shape(layers=2, experts=8, used=3, width=256, inner=256, dense_type="Q8_0",
              expert_types=(("Q4_K", "Q4_K", "Q6_K"), ("Q4_0", "Q8_0", "F16")))  # fmt: skip


@pytest.fixture
def device():
    one = RecordingDevice()
    yield one
    one.close()


def run(device: Any, op: str, **buffers: Any) -> None:
    device.launch(op, device.stream("compute"), **buffers)
    device.synchronize()


@pytest.mark.parametrize("kind", BLOCK_FORMATS)
@pytest.mark.parametrize("n_tokens", [1, 9], ids=["row", "tiles"])
def test_products_are_those_of_the_rounded_vector(device, kind, n_tokens):
    rng = np.random.default_rng(2)
    w, x, bias, old = (random_matrix(rng, kind, 70, 512), normal(rng, n_tokens, 512), normal(rng, 70),
                       normal(rng, n_tokens, 70))  # fmt: skip
    _, rounded = quantized(x)
    product = rounded @ expand(w).T + bias
    error = (sum_error if n_tokens == 1 else lambda *a: gemm_error(*a))(rounded, w, True)
    allowed = error + 8 * U * (np.abs(product) + np.abs(old) + np.abs(bias))
    for op, start in (("linear", 0 * old), ("linear_add", old)):
        out = old.copy()
        run(device, op, x=x, w=w, out=out, bias=bias)
        assert (np.abs(out - start - product) <= allowed).all(), op
    assert device.launched == ["quantize_q8", *2 * [f"{'gemv_q8' if n_tokens == 1 else 'gemm'}_{kind}"]]


def test_plain_numbers_meet_activations_as_they_are(device):
    rng = np.random.default_rng(3)
    w, x, out = random_matrix(rng, "F16", 30, 64), normal(rng, 1, 64), unset(1, 30)
    run(device, "linear", x=x, w=w, out=out)
    assert (np.abs(out - x @ expand(w).T) <= sum_error(x, w, False)).all() and device.launched == ["gemv_F16"]


def test_heads_are_rounded_each_for_itself_unless_their_vectors_are_no_blocks(device):
    rng = np.random.default_rng(4)
    w = random_matrix(rng, "Q8_0", 3 * 10, 64)
    for length, kernels in ((96, ["quantize_q8", "gemv_q8_Q8_0"]), (70, ["gemv_Q8_0"])):
        device.launched.clear()
        x, out = normal(rng, 2, 3, length), unset(2, 3, 10)
        run(device, "linear_heads", x=x, w=w, out=out)
        given = quantized(np.ascontiguousarray(x[..., :64]))[1] if length == 96 else x[..., :64]
        for h in range(3):
            one = Matrix("Q8_0", 10, 64, w.data.reshape(3, -1)[h])
            allowed = sum_error(given[:, h], one, length == 96)
            assert (np.abs(out[:, h] - given[:, h] @ expand(one).T) <= allowed).all(), (length, h)
        assert device.launched == kernels


def test_a_vector_is_rounded_once_for_all_its_products_and_anew_once_it_changed(device):
    rng = np.random.default_rng(5)
    w, x, out = random_matrix(rng, "Q8_0", 32, 64), normal(rng, 1, 64), unset(1, 32)

    def right() -> bool:
        rounded = quantized(x)[1]
        run(device, "linear", x=x, w=w, out=out)
        return bool((np.abs(out - rounded @ expand(w).T) <= sum_error(rounded, w, True)).all())

    assert right() and right() and device.launched.count("quantize_q8") == 1
    run(device, "scale", x=out, factor=2.0)
    assert right() and device.launched.count("quantize_q8") == 1, "another buffer was written"
    run(device, "scale", x=x, factor=3.0)
    assert right(), "an op wrote all of it"
    run(device, "add", x=normal(rng, 1, 32), factor=1.0, out=x[:, 32:])
    assert right(), "an op wrote a part of it"
    run(device, "linear", x=x[:, :64].copy(), w=random_matrix(rng, "F32", 64, 64), out=x)
    assert right(), "a product wrote it"
    device.put(x, normal(rng, 1, 64), device.stream("compute"))
    device.synchronize()
    assert right(), "the host sent another"


def experts_case(rng: np.random.Generator, n_tokens: int) -> dict[str, Any]:
    """Five experts, of which tokens choose three, one of them seldom; 64 hidden features of 96."""
    chances = [0.3, 0.3, 0.2, 0.17, 0.03]
    ids = np.stack([rng.choice(5, 3, replace=False, p=chances) for _ in range(n_tokens)]).astype(np.int32)
    gate, up, down = (
        [random_matrix(rng, kind, rows, cols) for _ in range(5)]
        for kind, rows, cols in (("Q4_0", 64, 96), ("Q4_0", 64, 96), ("Q8_0", 96, 64))
    )
    return {"x": normal(rng, n_tokens, 96), "ids": ids, "gate": gate, "up": up, "down": down}


def expert_and_error(x: np.ndarray, gate: Matrix, up: Matrix, down: Matrix) -> tuple[np.ndarray, np.ndarray]:
    """down h [n, D] of one expert, x and h in 8 bits, and its allowed error: a step of h where it is near a half."""
    given = quantized(x)[1]
    g, u = given @ expand(gate).T, given @ expand(up).T
    h = (g / (1 + np.exp(-g)) * u).astype(np.float32)
    _, rounded = quantized(h)
    step = np.repeat(np.abs(h.reshape(len(h), -1, 32)).max(-1) / 127, 32, -1)
    off = 2 * gemm_error(given, gate, True) * np.abs(u) + 2 * gemm_error(given, up, True) * np.abs(g) + 8 * U * abs(h)
    by_step = np.repeat(off.reshape(len(h), -1, 32).max(-1), 32, -1)  # each number, and the step by its largest
    near = np.abs(h / step % 1 - 0.5) <= (off + by_step) / step
    weight = np.abs(expand(down)).T
    return rounded @ expand(down).T, (near * step + by_step) @ weight + gemm_error(rounded, down, True)


@pytest.mark.parametrize("n_tokens", [1, 3, 80])
@pytest.mark.parametrize("waves", [[[0, 1, 2, 3, 4]], [[3, 0], [4], [1, 2]]], ids=["at once", "three waves"])
def test_experts_round_what_goes_in_and_what_lies_between(device, n_tokens, waves):
    case = experts_case(np.random.default_rng(6), n_tokens)
    parts, three = unset(n_tokens, 3, 96), ("gate", "up", "down")
    for i, wave in enumerate(waves):
        some = {name: [case[name][e] for e in wave] for name in three}
        run(device, "experts", x=case["x"], ids=case["ids"], wanted=np.array(wave), on_host=case["ids"], parts=parts,
            first=i == 0, **some)  # fmt: skip
    for e in np.unique(case["ids"]):
        tokens, ranks = np.nonzero(case["ids"] == e)
        want, allowed = expert_and_error(case["x"][tokens], *(case[name][e] for name in three))
        assert (np.abs(parts[tokens, ranks] - want) <= allowed).all(), e
    assert device.launched.count("quantize_q8") == 1 + len(waves), "once x, and in each wave what lies between"
    kernels = device.bases() - {"quantize_q8"}
    tiles = {"gemm_mma", "group_by_expert", "activate"}
    assert kernels == (tiles if n_tokens == 80 else {"expert_gate_up_q8", "expert_down_q8"})


def each_alone(logits: Any, tokens: np.ndarray) -> np.ndarray:
    """Every token as a sequence of its own, so that a step more or less stays where it is."""
    return np.stack([logits(np.array([token]))[0] for token in tokens])


def rounded_elsewhere(path: Path, tokens: np.ndarray) -> np.ndarray:
    """As llama.cpp's CPU kernels round, by the host device, or by ``moe_ref`` where the host has no such types."""
    try:
        with Engine(path, act="q8", device="host") as engine:
            return each_alone(engine.logits, tokens)
    except FormatError:
        return each_alone(Model(path, act="q8").logits, tokens)


def median(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.median(np.abs(a - b)))


@pytest.mark.skipif(not QUANTS.is_dir(), reason=f"{QUANTS} is absent")
@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in QUICK else pytest.mark.slow) for k in KINDS])
def test_whole_models_round_as_the_reference_does_in_blocks_of_32(kind, monkeypatch):
    """Tokens alone, by rows; prompts, by tiles. A number next to a half may go the other way, and a prompt spreads it:
    so it is the median of the tokens, and one of the prompts, that has to be the reference's."""
    path, rng = QUANTS / f"qwen3moe-256.{kind}.gguf", np.random.default_rng(0)
    tokens, prompts = rng.integers(0, 64, 12), rng.integers(0, 64, (5, 9))
    exact, whole = each_alone(Model(path).logits, tokens), np.stack([Model(path).logits(p) for p in prompts])
    host = rounded_elsewhere(path, tokens)
    monkeypatch.setattr(Weights, "product", product_in_blocks_of_32(Weights.product))
    want, want_whole = each_alone(Model(path).logits, tokens), np.stack([Model(path).logits(p) for p in prompts])
    with Engine(path, act="q8", device="emulated", cache="100%") as engine:
        got, got_whole = each_alone(engine.logits, tokens), np.stack([engine.logits(p) for p in prompts])
    effect, by_prompt = median(want, exact), [median(*pair) for pair in zip(got_whole, want_whole, strict=True)]
    assert effect > 0 and median(got, want) <= SAME * effect
    assert median(got, exact) <= FINER * median(host, exact)
    assert min(by_prompt) <= SAME * effect and max(by_prompt) <= 2 * median(want_whole, whole), (by_prompt, effect)
    assert sum(got.argmax(1) == want.argmax(1)) >= 11 and sum(got.argmax(1) == host.argmax(1)) >= 9


@pytest.mark.skipif(not QUANTS.is_dir(), reason=f"{QUANTS} is absent")
@pytest.mark.parametrize("kind", QUICK)
def test_check_accepts_rounding_in_blocks_of_32_and_nothing_coarser(kind, monkeypatch):
    tokens = np.arange(3, 12)
    with Engine(QUANTS / f"qwen3moe-256.{kind}.gguf", act="q8", device="emulated") as engine:
        outcomes = list(check_model(engine, tokens))
        assert [o.name for o in outcomes] == ["by token, in one", "model, rounded"]
        assert all(o.passed for o in outcomes) and outcomes[1].worst > 0.4, outcomes
        logits = engine.logits
        monkeypatch.setattr(engine, "logits", lambda tokens: 1.05 * logits(tokens))
        assert not any(o.passed for o in check_model(engine, tokens)), "5 % off"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("m") / "m.gguf", MIXED, seed=4)


def stepped(engine: Engine, tokens: np.ndarray) -> np.ndarray:
    engine.reset()
    return np.stack([engine.decode(int(token)).copy() for token in tokens])


def test_what_is_resident_and_how_experts_are_divided_does_not_change_a_bit(mixed):
    tokens = np.arange(12)
    with Engine(mixed, cache="100%", device="emulated", act="q8") as engine:
        full, full_steps = engine.logits(tokens), stepped(engine, tokens)
    with Engine(mixed, cache="100%", device="emulated", act="f32") as engine:
        assert not np.array_equal(engine.logits(tokens), full)
    for options in ({"cache": "slots:6"}, {"cache": "slots:11", "host_cache": "slots:6", "prefetch": "next-gate"}):
        with Engine(mixed, device="emulated", act="q8", **options) as engine:
            assert np.array_equal(engine.logits(tokens), full), options
            assert np.array_equal(stepped(engine, tokens), full_steps), options
            assert engine.stats.evictions
    with Engine(mixed, _device=CudaDevice(Cupy(), "q8"), cache="slots:6") as engine:
        assert np.array_equal(engine.logits(tokens), full)


def test_the_launches_of_a_captured_token_round_too(mixed):
    tokens, device = np.random.default_rng(5).integers(0, 96, 12), RecordingDevice()
    with Engine(mixed, device="emulated", act="q8", cache="100%") as engine:
        want = stepped(engine, tokens)
    with Engine(mixed, _device=device, decode="device", cache="slots:7", ctx_size=32) as engine:
        got, again = stepped(engine, tokens), stepped(engine, tokens)
        assert engine.stats.evictions and np.array_equal(got, again)
    assert {"quantize_q8", "expert_gate_up_q8_Q4_K", "expert_down_q8_Q6_K", "expert_down_F16"} <= set(device.launched)
    assert np.array_equal(got.argmax(1), want.argmax(1)) and median(got, want) <= 1e-5 * want.std()


def test_it_is_said_how_activations_are_rounded():
    for act, said in (("q8", True), ("f32", False)):
        device, why = open_device("emulated", act=act)
        device.close()
        assert ("activations rounded to 8 bits in blocks of 32" in why) == said and device.act == act
