"""The engine on the CUDA kernels themselves: whole models, two tiers of memory, streams that run beside each other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHARED, TESTS

from moe_cupy.cache import BudgetError
from moe_cupy.device import open_device
from moe_cupy.device.base import DeviceError
from moe_cupy.device.emulated import EmulatedDevice
from moe_cupy.engine import Engine
from moe_cupy.kernels.cases import linear_error
from moe_cupy.kernels.cuda.sources import FORMATS
from moe_cupy.kernels.host.matmul import SUPPORTED
from moe_cupy.kernels.samples import normal, random_matrix, unset
from moe_cupy.kernels.table import OPS
from moe_cupy.tools.check import check_ops
from moe_ref.gguf import open_gguf
from moe_ref.model import Model
from tests.models import Shape, tiny_moe

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here: the emulated device needs it")

GOLDEN, BUNDLED = SHARED / "data/golden", TESTS / "data/archs"
FILES = [*sorted(BUNDLED.glob("*.gguf")), *sorted(GOLDEN.glob("archs/*.gguf")), *sorted(GOLDEN.glob("quants/*.gguf"))]
QUICK = ("deepseek-v2.BF16", "qwen35moe.BF16", "gpt-oss.MXFP4_MOE", "gemma4moe.BF16", "qwen3moe-256.Q4_K_M")
MIXED = Shape(layers=2, experts=8, used=3, width=256, inner=256, dense_type="Q8_0",
              expert_types=(("Q4_K", "Q4_K", "Q6_K"), ("Q4_0", "Q8_0", "F16")))  # fmt: skip


def runs(path: Path) -> bool:
    """Whether all matrices are of types that there are CUDA kernels for."""
    with open_gguf(path) as file:
        return {t.type for t in file.tensors.values() if len(t.shape) > 1} <= set(FORMATS)


def smallest(path: Path, **options: Any) -> Engine:
    """An engine with as few slots as it accepts, and as few page-locked experts before them."""
    options = {"device": "emulated", "host_cache": "slots:0", "cache": "slots:0", **options}
    for name in ("cache", "host_cache"):
        try:
            return Engine(path, **options)
        except BudgetError as error:
            options[name] = f"slots:{str(error).split('slots:')[2].split()[0]}"
    return Engine(path, **options)


def stepped(engine: Engine, tokens: np.ndarray) -> np.ndarray:
    engine.reset()
    return np.stack([engine.decode(int(token)) for token in tokens])


@pytest.mark.parametrize("seed", range(2))
def test_every_op_stays_within_its_tolerance(seed):
    device = EmulatedDevice()
    outcomes = list(check_ops(device, SUPPORTED, seed))
    device.close()
    assert {o.name for o in outcomes} == set(OPS)
    for o in outcomes:
        assert o.passed, f"seed {seed}: {o.name} is off by {o.worst} of what is allowed, worst at {o.where}"


def small_set() -> list[Any]:
    """Every file, all but a few of them slow ones."""
    return [
        pytest.param(p, id=p.stem, marks=() if p.name.removesuffix(".gguf") in QUICK else pytest.mark.slow)
        for p in FILES if runs(p)
    ]  # fmt: skip


@pytest.mark.parametrize("path", small_set())
def test_whole_models_agree_with_the_reference_whatever_is_resident(path):
    tokens = np.arange(3, 15)
    want = Model(path).logits(tokens)
    allowed = 1e-3 * max(1, want.std())
    with Engine(path, cache="100%", device="emulated") as engine:
        full, full_steps = engine.logits(tokens), stepped(engine, tokens)
    with smallest(path, prefetch="next-gate") as engine:
        small, small_steps = engine.logits(tokens), stepped(engine, tokens)
        assert engine.stats.evictions or not engine.config.is_moe, "nothing was evicted, so nothing was tested"
    for got in (full, full_steps):
        assert np.abs(got - want).max() <= allowed
        assert np.array_equal(got.argmax(1), want.argmax(1))
    assert np.array_equal(small, full), "evictions must not change a bit"
    assert np.array_equal(small_steps, full_steps), "nor where one token is fed at a time"


@pytest.mark.parametrize("kind", ["Q4_K", "MXFP4", "F16", "F32"])
def test_products_of_many_tokens_stay_within_the_tolerance_of_few(kind):
    """Nine tokens take tiles instead of rows; cols that no tile divides, for plain numbers."""
    device, rng = EmulatedDevice(), np.random.default_rng(1)
    cols = 45 if kind in ("F16", "F32") else 512
    w, x, bias, old = random_matrix(rng, kind, 70, cols), normal(rng, 9, cols), normal(rng, 70), normal(rng, 9, 70)
    for op, start in (("linear", unset(9, 70)), ("linear_add", old)):
        out, want = start.copy(), old.astype(np.float64)
        device.launch(op, device.stream("compute"), x=x, w=w, out=out, bias=bias)
        device.synchronize()
        OPS[op].reference(x=x, w=w, out=want, bias=bias)
        allowed = linear_error(x, w, bias=bias) + 4 * 2.0**-24 * np.abs(old)
        assert (np.abs(out - want) <= allowed).all(), op
    device.close()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Two size classes, one whose gate and up are of different types."""
    return tiny_moe(tmp_path_factory.mktemp("m") / "m.gguf", MIXED, seed=4)


def test_gate_and_up_of_different_types_and_every_division_of_the_experts_give_the_same_bits(mixed):
    tokens = np.arange(20) % MIXED.vocab
    want = Model(mixed).logits(tokens)
    with Engine(mixed, cache="100%", device="emulated") as engine:
        full = engine.logits(tokens)
    assert np.abs(full - want).max() <= 1e-3 * max(1, want.std())
    for slots in (6, 11):
        for host_slots in (6, 24):
            with Engine(mixed, cache=f"slots:{slots}", host_cache=f"slots:{host_slots}", device="emulated") as engine:
                assert np.array_equal(engine.logits(tokens), full), f"{slots} slots before {host_slots}"
                assert engine.stats.evictions


def test_queries_in_chunks_see_what_a_single_prompt_sees(mixed):
    """Eight queries and more take another attention kernel; within what a sum of 20 terms in another order allows."""
    tokens = np.arange(20) % MIXED.vocab
    with Engine(mixed, device="emulated", ubatch_size=20) as engine:
        whole = engine.logits(tokens)
    for size in (3, 13):
        with Engine(mixed, device="emulated", ubatch_size=size) as engine:
            assert np.abs(engine.logits(tokens) - whole).max() <= 1e-3 * max(1, whole.std()), size


@pytest.mark.parametrize("options", [{}, {"window": 40}, {"sinks": True}], ids=["plain", "window", "sinks"])
def test_decode_attention_in_several_parts_is_that_of_the_host(options):
    """600 positions: three parts. The bound is the op's, derived in layer_cases."""
    from moe_cupy.kernels.layer_cases import attention_case

    device, rng = EmulatedDevice(), np.random.default_rng(3)
    case = attention_case(rng, (2, 4, 2, 16, 24), 97, **options)
    long = {"k": normal(rng, 700, 2, 16), "v": normal(rng, 700, 2, 24), "n_past": 600, "out": unset(2, 4, 24)}
    buffers = {**case.buffers, **long}
    want, got = dict(buffers, out=np.zeros((2, 4, 24))), dict(buffers, out=unset(2, 4, 24))
    OPS["attention"].reference(**want)
    device.launch("attention", device.stream("compute"), **got)
    device.synchronize()
    device.close()
    keys = np.repeat(np.abs(long["k"][:602]), 2, axis=1)
    score = 20 * 2.0**-24 * 16**-0.5 * np.einsum("thk,shk->ths", np.abs(buffers["q"]), keys).max()
    assert np.abs(got["out"] - want["out"]).max() <= (2 * score + 618 * 2.0**-24) * np.abs(buffers["v"]).max()


def test_without_a_compiler_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("moe_cupy.device.emulated.emulated", lambda: __import__(
        "moe_cupy.kernels.cuda.emulation.build", fromlist=["build"]).compiler())  # fmt: skip
    with pytest.raises(DeviceError, match="apt-get install g") as caught:
        open_device("emulated")
    assert "\n" not in str(caught.value) and caught.value.is_request
