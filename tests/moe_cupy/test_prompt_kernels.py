"""Which kernels the engine launches; experts of a prompt go by tiles, whatever is done to their products."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED

from moe_cupy.engine import Engine
from moe_cupy.kernels.cuda import sources
from moe_cupy.kernels.cuda.choice import FEW_VECTORS, TEACHING, TENSOR_CORES, product_variant
from moe_cupy.tools.check import check_ops
from moe_ref.gguf import open_gguf
from moe_ref.model import Model
from moe_ref.quantize import choose_types, write_quantized
from moe_ref.weights import Weights
from tests.eight_bits import RecordingDevice, base_of, product_in_blocks_of_32
from tests.models import Shape, tiny_moe

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here: the emulated device needs it")
GOLDEN = SHARED / "data/golden/archs"
BEFORE = (7, 0)  # a compute capability without tensor cores for bytes
ODD = Shape(layers=2, experts=7, used=1, width=160, inner=96, heads=5, kv_heads=1, head=32, dense_type="Q8_0",
            expert_types=(("Q4_0", "Q4_0", "Q8_0"), ("Q5_1", "Q8_0", "F16")))  # fmt: skip


def test_tensor_cores_multiply_rounded_vectors_where_there_are_any_and_enough_to_do():
    for capability in ((6, 1), (7, 0), (7, 5), (8, 0), (9, 0), (12, 0)):
        has_them = capability >= TENSOR_CORES
        assert product_variant(capability, True, FEW_VECTORS) == ("mma" if has_them else "")
        assert product_variant(capability, True, FEW_VECTORS - 0.1) == ""
        assert product_variant(capability, False, 512) == "", "there is no such kernel for plain numbers"


def launched_by_the_engine(tmp_path: Path) -> set[str]:
    """All that the ops of the table launch on both kinds of devices, and a model driven by the device."""
    seen: set[str] = set()
    for act, capability in (("f32", BEFORE), ("q8", BEFORE), ("q8", (12, 0))):
        device = RecordingDevice(act, capability)
        list(check_ops(device, ("Q8_0", "F16")))
        device.close()
        seen |= device.bases()
    driven = [{"decode": "device", "policy": p, "prefetch": "next-gate", "cache": "slots:4"} for p in ("echo", "lru")]
    for kind, options in (
        ("f16", driven[0]),
        ("f16", driven[1]),
        ("f32", {}),
        ("f16", {}),
        ("bf16", {}),
        ("q8_0", {}),
        ("q4_0", {}),
    ):
        device, types = RecordingDevice(), {"cache_type_k": kind, "cache_type_v": kind}
        with Engine(tiny_moe(tmp_path / "m.gguf", ODD), _device=device, **types, **options) as engine:
            engine.logits(np.arange(40))
            engine.decode(1)
        seen |= device.bases()
    return seen


def test_every_kernel_is_launched_by_the_engine_or_teaches(tmp_path):
    every = {base_of(name) for name in sources.kernels()}
    assert set(TEACHING) | set(TEACHING.values()) <= every
    assert launched_by_the_engine(tmp_path) == every - set(TEACHING)


def test_a_prompt_takes_the_kernels_of_its_device_and_gives_the_same_numbers(tmp_path):
    """Seven experts, one a token, 160 features: nothing divides. The sums of both kernels have one order."""
    path, tokens = tiny_moe(tmp_path / "m.gguf", ODD, seed=2), np.arange(64) % ODD.vocab
    logits, launched = {}, {}
    for capability in (BEFORE, TENSOR_CORES):
        device = RecordingDevice("q8", capability)
        with Engine(path, _device=device) as engine:
            logits[capability], launched[capability] = engine.logits(tokens), device.bases()
    assert 64 / ODD.experts < FEW_VECTORS and "gemm" in launched[TENSOR_CORES], "experts have too few vectors each"
    assert "gemm_mma" in launched[TENSOR_CORES] and "gemm_mma" not in launched[BEFORE]
    assert np.array_equal(logits[BEFORE], logits[TENSOR_CORES])


def quantized_copy(path: Path, target: Path, kind: str) -> Path:
    """The model with its matrices as ``kind``."""
    with open_gguf(path) as file, target.open("wb") as out:
        list(write_quantized(file, choose_types(file, kind, ())[0], 7, out))
    return target


def golden(name: str) -> Path:
    return next(GOLDEN.glob(f"{name}.*.gguf"), None) or pytest.skip(f"no {name} in {GOLDEN}")


@pytest.mark.parametrize("name", ["gpt-oss", "llama4", "granitemoe"])
@pytest.mark.parametrize("capability", [BEFORE, TENSOR_CORES], ids=["dp4a", "tensor cores"])
def test_experts_with_biases_and_weighted_inputs_round_as_the_reference(name, capability, tmp_path, monkeypatch):
    """A prompt of 48 tokens: biases, the clamped activation (gpt-oss), weights on what goes in (llama4)."""
    path = quantized_copy(golden(name), tmp_path / "m.gguf", "Q8_0")
    tokens = np.random.default_rng(1).integers(0, 384, 48)
    exact, device = Model(path).logits(tokens), RecordingDevice("q8", capability)
    monkeypatch.setattr(Weights, "product", product_in_blocks_of_32(Weights.product))
    want = Model(path).logits(tokens)
    with Engine(path, _device=device, cache="100%") as engine:
        got = engine.logits(tokens)
    effect, error = np.median(np.abs(want - exact)), np.median(np.abs(got - want))
    assert not {"expert_gate_up_q8", "expert_down_q8", "expert_gate_up", "expert_down"} & device.bases()
    assert error <= 0.1 * effect, "a number next to a half goes the other way, and 48 tokens spread that"


@pytest.mark.parametrize("name", ["gpt-oss", "llama4", "granitemoe"])
def test_experts_of_exact_prompts_go_by_tiles_too(name):
    path, tokens = golden(name), np.random.default_rng(2).integers(0, 384, 64)
    want, device = Model(path).logits(tokens), RecordingDevice("f32")
    with Engine(path, _device=device, cache="100%") as engine:
        got = engine.logits(tokens)
    assert "gemm_float" in device.bases() and not {"expert_gate_up", "expert_down"} & device.bases()
    assert np.abs(got - want).max() <= 1e-3 * max(1, want.std()) and np.array_equal(got.argmax(1), want.argmax(1))


@pytest.mark.parametrize(("act", "pairs", "experts"), [("q8", 2, 31), ("f32", 8, 7)])
def test_experts_with_few_tokens_each_go_row_by_row(tmp_path, act, pairs, experts):
    """A tile costs what 32 vectors cost; what an expert has on average decides, not what is resident."""
    path = tiny_moe(tmp_path / "m.gguf", replace(ODD, experts=experts, expert_types=(("Q4_0", "Q4_0", "Q8_0"),)))
    for tokens in (np.arange((pairs + 1) * experts), np.arange(8)):
        went = []
        for cache in ("100%", "slots:2"):
            device, crowds = RecordingDevice(act), []
            with Engine(path, _device=device, cache=cache) as engine:
                engine.forward.observe = lambda _, r, all=crowds: all.append(r.ids.size / len(np.unique(r.ids)))
                engine.logits(tokens)
            went.append("group_by_expert" in device.bases())
            assert went[-1] == any(crowd >= pairs for crowd in crowds), crowds
        assert went == [len(tokens) > 8] * 2
