"""Keys and values as f16 and q8_0 on every device, against ``moe_ref`` and llama.cpp."""

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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_q8_0_is_the_references_and_as_near_to_llama_cpp(name, device, model_file, monkeypatch):
    path = model_file(name)
    known = KNOWN[f"{name}/q8_0/q8_0"]
    plain = Model(path).logits(TOKENS)
    exact_queries(monkeypatch)
    want = Model(path, cache_type_k="q8_0", cache_type_v="q8_0").logits(TOKENS)
    with Engine(path, device=device, cache_type_k="q8_0", cache_type_v="q8_0", ctx_size=32) as engine:
        got = engine.logits(TOKENS)
        engine.reset()
        steps = np.stack([engine.decode(int(token)).copy() for token in TOKENS])
        assert engine.kv.nbytes < Engine_bytes(path, device)
    effect = off(want, plain)
    print(name, device, effect, off(got, want), off(steps, got), off(got[-6:], known), off(want[-6:], known), off(plain[-6:], known))


def Engine_bytes(path, device):
    with Engine(path, device=device, ctx_size=32) as e:
        return e.kv.nbytes
