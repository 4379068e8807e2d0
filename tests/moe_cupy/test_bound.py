"""Launches made ready for many tokens do what they do one by one, at whatever position."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import numpy as np
import pytest

from moe_cupy.device.host import HostDevice
from moe_cupy.engine import Engine
from moe_cupy.kernels.cases import all_cases
from moe_cupy.kernels.host import attention, bound, jobs, steps, token
from moe_cupy.kernels.host.experts import MATRICES
from moe_cupy.kernels.samples import normal, random_matrix
from tests.models import Shape, tiny_moe

TRAINED = Path(__file__).resolve().parents[2] / "data" / "moe-40m-Q4_K_M.gguf"


@pytest.fixture(params=["f32", "q8"])
def device(request):
    opened = HostDevice(2, request.param)
    yield opened
    opened.close()


def test_every_op_that_is_made_ready_writes_what_a_launch_writes(device):
    stream, seen = device.stream("compute"), set()
    for case in all_cases(("F32", "Q4_K", "Q6_K", "MXFP4")):
        want, got = copy.deepcopy(case.buffers), copy.deepcopy(case.buffers)
        position = next((want[name] for name in bound.POSITIONS if name in want), 0)
        device.launch(case.op, stream, **want)
        device.bind([(case.op, got)], stream)(position)
        for name in case.outputs:
            assert np.array_equal(got[name], want[name], equal_nan=True), f"{case.op} {case.label}: {name}"
        seen.add(case.op)
    assert seen >= {"linear", "linear_add", *bound.READY}


@pytest.mark.parametrize("activation", ["silu", "gelu", "swiglu_oai"])
@pytest.mark.parametrize("kinds", [("F32", "F32", "F32"), ("Q4_K", "Q4_K", "Q6_K"), ("MXFP4", "Q8_0", "BF16")])
@pytest.mark.parametrize("extra", [(), ("weights",), ("scales", "biases"), ("weights", "biases")])
def test_experts_that_are_made_ready_write_what_a_launch_writes(device, activation, kinds, extra):
    rng, stream = np.random.default_rng(3), device.stream("compute")
    three = [dict(zip(MATRICES, (random_matrix(rng, kind, 256, 256) for kind in kinds), strict=True)) for _ in range(5)]
    given = {
        "weights": normal(rng, 1, 3), "scales": {"up": normal(rng, 5), "down": normal(rng, 5)},
        "biases": {"gate": normal(rng, 5, 256), "down": normal(rng, 5, 256)},
    }  # fmt: skip
    buffers = {
        "x": normal(rng, 1, 256), "ids": np.array([[4, 0, 2]], np.int32), "parts": np.zeros((1, 3, 256), np.float32),
        "activation": activation, "weights": None, **{name: given[name] for name in extra},
    }  # fmt: skip
    run = device.bind_experts(three[0], stream, **buffers)
    for wanted in ([4, 0, 2], [2], [0, 4]):  # some come later than others
        buffers["x"][...], want = normal(rng, 1, 256), np.zeros((1, 3, 256), np.float32)
        each = {name: [three[e][name] for e in wanted] for name in MATRICES}
        device.launch("experts", stream, wanted=np.array(wanted), **each, **(buffers | {"parts": want}))
        buffers["parts"][...] = 0
        run(wanted, [three[e] for e in wanted])
        assert want.any() and np.array_equal(buffers["parts"], want)


def test_products_of_one_vector_are_one_list_where_they_round_alike(monkeypatch):
    """Q4_K has another order than Q6_K and Q3_K, which share one; another vector ends the list, a bias does not."""
    rng, device, lists = np.random.default_rng(0), HostDevice(1, "q8"), []
    x, other = normal(rng, 1, 256), normal(rng, 1, 256)
    given = [("Q4_K", x, {}), ("Q4_K", x, {}), ("Q6_K", x, {}), ("Q3_K", x, {}), ("Q3_K", other, {}),
             ("Q3_K", other, {"bias": normal(rng, 40)}), ("Q3_K", other, {})]  # fmt: skip
    calls = [
        ("linear", {"x": v, "w": random_matrix(rng, kind, 40, 256), "out": np.empty((1, 40), np.float32), **extra})
        for kind, v, extra in given
    ]
    real = steps.run_steps

    def run_steps(state, rows, position):
        lists.extend(int(row[steps.N]) for row in rows if row[steps.OP] == steps.MULTIPLY)
        real(state, rows, position)

    monkeypatch.setattr(steps, "run_steps", run_steps)
    run, stream = device.bind(calls, device.stream("compute")), device.stream("compute")
    for _ in range(2):
        x[...], other[...] = normal(rng, 1, 256), normal(rng, 1, 256)
        run(0)
        for op, buffers in calls:
            want = np.empty((1, 40), np.float32)
            device.launch(op, stream, **(buffers | {"out": want}))
            assert np.array_equal(buffers["out"], want)
    assert lists == [2, 2, 3] * 2


def test_half_precision_in_whole_numbers_is_numpys():
    bits = np.arange(1 << 16, dtype=np.uint16).view(np.int16)
    want = bits.view(np.float16).astype(np.float32)
    got = np.array([attention.from_half(b) for b in bits], np.float32)
    assert np.array_equal(got, want, equal_nan=True) and np.array_equal(np.signbit(got), np.signbit(want))
    rng = np.random.default_rng(0)
    some = rng.integers(0, 1 << 32, 50_000, dtype=np.uint32).view(np.float32)
    near = rng.normal(size=50_000).astype(np.float32) * np.float32(10) ** rng.integers(-9, 6, 50_000)
    for x in (some[~np.isnan(some)], near.astype(np.float32), want[~np.isnan(want)]):
        with np.errstate(over="ignore"):
            rounded = x.astype(np.float16).view(np.int16)
        assert np.array_equal(np.array([attention.half_bits(v) for v in x], np.int16), rounded)


@pytest.mark.parametrize(("heads", "groups", "window"), [(8, 2, 0), (6, 6, 0), (8, 1, 7), (12, 3, 50)])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_what_a_query_gets_does_not_depend_on_who_it_meets_keys_with(heads, groups, window, kind):
    """A prompt at once, in parts, token by token, and by one, two or five threads: the same bits."""
    rng, n, width = np.random.default_rng(5), 75, 40
    k, v = (normal(rng, n, groups, width).astype(kind) for _ in range(2))
    q, given = normal(rng, n, heads, width), {"scale": 0.2, "window": window, "sinks": normal(rng, heads)}
    results = []
    for threads, step in ((1, n), (2, 1), (5, 1), (1, 7)):
        device, out = HostDevice(threads), np.empty((n, heads, width), np.float32)
        for t in range(0, n, step):
            part = {"q": q[t : t + step], "k": k, "v": v, "n_past": t, "out": out[t : t + step]}
            bound_call = device.bind([("attention", part | given)], device.stream("compute"))
            bound_call(t)
        device.close()
        results.append(out)
    assert all(np.array_equal(one, results[0]) for one in results[1:])


@pytest.mark.parametrize("act", ["f32", "q8"])
def test_tokens_one_by_one_get_the_same_logits_with_recorded_launches_and_without(act, tmp_path):
    types = ("Q4_K", "Q5_0", "Q6_K"), ("Q8_0", "Q8_0", "IQ4_XS")
    path = tiny_moe(tmp_path / "m.gguf", Shape(width=256, inner=256, experts=8, used=3, expert_types=types))
    tokens = np.random.default_rng(0).integers(0, 96, 20)
    with Engine(path, act=act, cache="100%") as engine:
        engine.device.binds = False
        want = np.stack([engine.decode(int(t)).copy() for t in tokens])
    with Engine(path, act=act, cache="100%") as engine:
        for _ in range(2):  # the second sequence begins with what the first has recorded
            engine.reset()
            assert np.array_equal(np.stack([engine.decode(int(t)).copy() for t in tokens]), want)


def test_helpers_sleep_after_launches_that_were_made_ready(device):
    rng, stream = np.random.default_rng(0), device.stream("compute")
    x, w, out = normal(rng, 1, 256), random_matrix(rng, "F32", 40, 256), np.empty((1, 40), np.float32)
    run, state = device.bind([("linear", {"x": x, "w": w, "out": out})], stream), device.split.crew.state
    for _ in range(2):
        run(0)
        deadline = time.monotonic() + 300
        while not state[jobs.ASLEEP] and time.monotonic() < deadline:
            time.sleep(0.01)
        asleep, state[jobs.MORE] = state[jobs.ASLEEP], 0  # where it stays 1, the device could not be closed
        assert asleep == 1


def test_a_layer_is_recorded_with_the_first_token_and_run_from_the_record_thereafter():
    launched: list[str] = []
    with Engine(TRAINED, act="q8", cache="100%") as engine:
        real = engine.forward._launch
        engine.forward._launch = lambda op, **buffers: (launched.append(op), real(op, **buffers))
        counts = []
        for token in (1, 2, 3):
            engine.decode(token)
            counts.append(len(launched))
            launched.clear()
        assert counts[0] > 10 * engine.config.block_count
        assert counts[1] == counts[2] == 3  # embedding, head


def decoded(path, tokens, binds: bool, **options):
    """Logits of tokens one by one, what the cache counts, and who is resident."""
    with Engine(path, act="q8", **options) as engine:
        engine.device.binds = binds
        logits = np.stack([engine.decode(int(t)).copy() for t in tokens])
        stats, pools = engine.stats, engine.forward.mover.cache.pools
        return logits, (stats.hits, stats.misses, stats.evictions, stats.bytes_demand), [p.slot_of for p in pools]


@pytest.mark.parametrize("policy", ["echo", "lru", "lfu", "hobbit"])
@pytest.mark.parametrize("cache", ["100%", "60%", "slots:6"])
def test_layers_done_in_one_call_use_the_cache_as_layers_one_by_one_do(policy, cache, tmp_path):
    types = ("Q4_K", "Q8_0", "Q6_K"), ("Q8_0", "Q8_0", "IQ4_XS")
    path = tiny_moe(tmp_path / "m.gguf", Shape(layers=4, width=256, inner=256, experts=8, used=3, expert_types=types))
    tokens, options = np.random.default_rng(1).integers(0, 96, 40), {"policy": policy, "cache": cache, "threads": 2}
    want, got = (decoded(path, tokens, binds, **options) for binds in (False, True))
    assert np.array_equal(got[0], want[0])
    assert got[1:] == want[1:]


def test_a_call_ends_where_an_expert_is_missing_and_else_with_the_token(monkeypatch, tmp_path):
    path = tiny_moe(tmp_path / "m.gguf", Shape(layers=4, experts=8, used=2))
    ends, real = [], token.run_layers

    def run_layers(*given):
        ends.append((given[3], real(*given)))  # of layers up to, where it came
        return ends[-1][1]

    monkeypatch.setattr(token, "run_layers", run_layers)
    with Engine(path, cache="100%") as engine:
        for t in np.random.default_rng(2).integers(0, 96, 60):
            engine.decode(int(t))
        assert engine.stats.misses > 8
    missing = [end for last, end in ends if end % 2]
    assert len(missing) > 4, "no layer was left for want of an expert"
    assert all(end == 2 * last for last, end in ends if not end % 2), "a layer is not all steps"
    assert ends[-1][1] == 2 * 4  # by now all experts are there
