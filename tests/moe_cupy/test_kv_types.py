"""Keys and values as f16, bf16, q8_0 and q4_0 on every device, against ``moe_ref`` and llama.cpp."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED, TESTS
from fake_cupy import Cupy
from latent_model import latent_model

from moe_cupy.device.cuda import CudaDevice
from moe_cupy.engine import Engine
from moe_ref.kv_types import Kept, rotated
from moe_ref.model import Model
from tests.models import Shape, tiny_moe

GOLDEN = SHARED / "data/golden"
KNOWN = np.load(TESTS / "data/kv/logits.npz")
TOKENS = KNOWN["tokens"]
NAMES = ("qwen3moe-256.Q8_0", "llama4.BF16", "gpt-oss.BF16", "qwen3next.BF16", "latent")
PAIRS = [*((name, "q8_0") for name in NAMES), ("qwen3moe-256.Q8_0", "q4_0"), ("latent", "q4_0")]
DEVICES = ["host", pytest.param("emulated", marks=pytest.mark.skipif(not shutil.which("g++"), reason="no g++"))]
FIVE_TO_ONE = Shape(layers=2, experts=5, used=1, width=96, inner=64, heads=10, kv_heads=2, head=96)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    def find(name: str) -> Path:
        if name == "latent":
            return latent_model(tmp_path_factory.mktemp("latent") / "m.gguf", False)
        return next(GOLDEN.glob(f"*/{name}.gguf"), None) or pytest.skip(f"no {name}.gguf in {GOLDEN}")

    return find


def off(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.median(np.abs(a - b)))


def exact_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's CPU kernels round queries as they round keys, ``moe_ref`` with them; the runtime does not."""
    monkeypatch.setattr(Kept, "as_query", lambda self, q: rotated(q, self.key_rotation))
    monkeypatch.setattr(Kept, "as_share", lambda self, share: share)


def stepped(engine: Engine, tokens: np.ndarray) -> np.ndarray:
    engine.reset()
    return np.stack([engine.decode(int(token)).copy() for token in tokens])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_blocks_are_the_references_and_nearer_to_llama_cpp_than_float32(name, kind, device, model_file, monkeypatch):
    """Rotated where llama.cpp rotates. What is left to it is what rounding queries does, in ``moe_ref`` as here."""
    path, known = model_file(name), KNOWN[f"{name}/{kind}/{kind}"]
    plain = Model(path).logits(TOKENS)
    exact_queries(monkeypatch)
    want = Model(path, cache_type_k=kind, cache_type_v=kind).logits(TOKENS)
    with Engine(path, device=device, cache_type_k=kind, cache_type_v=kind, ctx_size=32) as engine:
        got, steps = engine.logits(TOKENS), stepped(engine, TOKENS)
    for logits in (got, steps):
        assert off(logits, want) <= 0.01 * off(want, plain)
        assert off(logits[-6:], known) <= 1.02 * off(want[-6:], known) < 0.9 * off(plain[-6:], known)


@pytest.fixture(scope="module")
def five_to_one(tmp_path_factory) -> Path:
    """Five query heads a key head, heads of 96 (rotated by none), top-1 of five experts."""
    return tiny_moe(tmp_path_factory.mktemp("m") / "m.gguf", FIVE_TO_ONE, seed=8)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
def test_all_devices_and_both_ways_to_decode_keep_the_same(five_to_one, kind, monkeypatch):
    if not shutil.which("g++"):
        pytest.skip("no g++")
    tokens, types = np.arange(20), {"cache_type_k": kind, "cache_type_v": kind, "ctx_size": 32}
    plain = Model(five_to_one).logits(tokens)
    exact_queries(monkeypatch)
    want = Model(five_to_one, cache_type_k=kind, cache_type_v=kind).logits(tokens)
    ways = {"host": {}, "emulated": {}, "driven": {"decode": "device", "device": "emulated"}}
    for name, options in ways.items():
        with Engine(five_to_one, **{"device": name, **types, **options}) as engine:
            assert off(stepped(engine, tokens), want) <= 0.1 * off(want, plain), name
    with Engine(five_to_one, device="emulated", **types) as engine:
        logits = engine.logits(tokens)
    with Engine(five_to_one, _device=CudaDevice(Cupy()), **types) as engine:
        assert np.array_equal(engine.logits(tokens), logits)


@pytest.mark.parametrize("types", [("q8_0", "f16"), ("f16", "q8_0"), ("f32", "q8_0"), ("q4_0", "bf16")])
def test_the_host_takes_two_types(five_to_one, types, monkeypatch):
    tokens = np.arange(20)
    plain = Model(five_to_one).logits(tokens)
    exact_queries(monkeypatch)
    want = Model(five_to_one, cache_type_k=types[0], cache_type_v=types[1]).logits(tokens)
    with Engine(five_to_one, device="host", cache_type_k=types[0], cache_type_v=types[1]) as engine:
        error = off(engine.logits(tokens), want)
    assert error <= (0.5 if types[0] == "f32" else 0.01) * off(want, plain), "llama.cpp makes float32 keys f16 then"


def test_what_it_takes_is_counted_and_said(five_to_one):
    rows = 2 * 2 * 2 * 64 * 96  # layers, k and v, heads, positions, numbers
    blocks = rows // 32
    sizes = {"f32": 4 * rows, "f16": 2 * rows, "bf16": 2 * rows, "q8_0": 34 * blocks, "q4_0": 18 * blocks}
    for kind, nbytes in sizes.items():
        with Engine(five_to_one, device="host", cache_type_k=kind, cache_type_v=kind, ctx_size=64) as engine:
            assert engine.kv.nbytes == nbytes
            assert engine.kv.line().endswith(f"{nbytes / 2**20:.1f} MiB  64 tokens, {kind}")


def refused(path: Path, key: str, value: str, device: str = "host") -> str:
    with pytest.raises(ValueError) as caught:
        Engine(path, device=device, cache_type_k=key, cache_type_v=value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_no_kernel_serves_is_refused_in_one_line(five_to_one, model_file, tmp_path):
    unknown = refused(five_to_one, "f32", "q5_1")
    assert unknown == "cache_type_v: KV cache type 'q5_1' is not supported; supported: f32, f16, bf16, q8_0, q4_0"
    odd = tiny_moe(tmp_path / "odd.gguf", Shape(head=48))
    blocks = "cache_type_k='q8_0': its blocks of 32 do not divide the 48 numbers that layer 0"
    assert blocks in refused(odd, "q8_0", "f16")
    assert "cache_type_v='q4_0': its blocks of 32" in refused(odd, "f16", "q4_0")
    assert "caches one vector as both; give both the same type" in refused(model_file("latent"), "q8_0", "f16")
    if shutil.which("g++"):
        given = "cache_type_k='q8_0' cache_type_v='f16'"
        words = refused(five_to_one, "q8_0", "f16", "emulated")
        assert words == f"{given}: kernels of the emulated device take keys and values of one type"
