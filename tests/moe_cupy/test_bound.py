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
from moe_cupy.kernels.host import bound, jobs
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


def test_products_of_one_vector_are_one_list_where_they_round_alike(monkeypatch):
    """Q4_K has another order than Q6_K and Q3_K, which share one; a bias or another vector ends the list."""
    rng, device, lists = np.random.default_rng(0), HostDevice(1, "q8"), []
    x, other = normal(rng, 1, 256), normal(rng, 1, 256)
    given = [("Q4_K", x, {}), ("Q4_K", x, {}), ("Q6_K", x, {}), ("Q3_K", x, {}), ("Q3_K", other, {}),
             ("Q3_K", other, {"bias": normal(rng, 40)}), ("Q3_K", other, {})]  # fmt: skip
    calls = [
        ("linear", {"x": v, "w": random_matrix(rng, kind, 40, 256), "out": np.empty((1, 40), np.float32), **extra})
        for kind, v, extra in given
    ]
    real = bound.multiply_token
    monkeypatch.setattr(
        bound, "multiply_token", lambda state, jobs, *a: (lists.append(len(jobs)), real(state, jobs, *a))
    )
    run, stream = device.bind(calls, device.stream("compute")), device.stream("compute")
    for _ in range(2):
        x[...], other[...] = normal(rng, 1, 256), normal(rng, 1, 256)
        run(0)
        for op, buffers in calls:
            want = np.empty((1, 40), np.float32)
            device.launch(op, stream, **(buffers | {"out": want}))
            assert np.array_equal(buffers["out"], want)
    assert lists == [2, 2, 1, 1] * 2


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
        deadline = time.monotonic() + 5
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
            counts.append(sum(op != "experts" for op in launched))  # those come as they are loaded
            launched.clear()
        assert counts[0] > 10 * engine.config.block_count
        assert counts[1] == counts[2] == 3 + engine.config.block_count  # embedding, head, sums of experts
